"""Write the tables of RESULTS.md from the rows in results/.

Each table is between the comments `<!-- table NAME -->` and `<!-- end -->`; other text is not changed. A test checks
that the file agrees with the rows.

    python experiments/tables.py
"""

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"

Group = tuple[str, dict[str, str]]
"""Heading of a group of rows, and the methods in it with their printed names."""

NANO: list[Group] = [
    ("references", {"full": "all 144 tokens", "wrong_image": "image of another scene", "no_image": "no image"}),
    (
        "select or merge before the LLM",
        {
            "divprune": "DivPrune",
            "cls_attention": "CLS attention (= HiRED on one image)",
            "vispruner": "VisPruner",
            "visionzip": "VisionZip",
            "prumerge": "PruMerge",
            "prumerge_plus": "PruMerge+",
            "tome": "ToMe",
            "uniform_stride": "uniform stride",
            "random": "random",
            "average_pool": "average pooling",
            "downsampling": "downsampled image",
            "evocomp_published": "EvoComp, recipe `published`",
        },
    ),
    (
        "select before the LLM, with context tokens",
        {
            "evocomp": "EvoComp, recipe `plus`",
            "cls_attention+context": "CLS attention",
            "divprune+context": "DivPrune",
            "uniform_stride+context": "uniform stride",
            "random_tokens+context": "random",
        },
    ),
    (
        "select before the LLM by attention scores of an extra LLM pass over all tokens",
        {"pyramiddrop": "PyramidDrop", "dart": "DART", "fastv": "FastV", "sparsevlm": "SparseVLM"},
    ),
    (
        "enter the LLM with all 144 tokens; drop some between layers",
        {
            "pyramiddrop_inside": "PyramidDrop",
            "dart_inside": "DART",
            "fastv_inside": "FastV",
            "sparsevlm_inside": "SparseVLM",
        },
    ),
]

NANO576: list[Group] = [
    ("references", {"full": "all 576 tokens", "wrong_image": "image of another scene"}),
    (
        "select or merge before the LLM",
        {
            "divprune": "DivPrune",
            "cls_attention": "CLS attention",
            "visionzip": "VisionZip",
            "dart": "DART (after an extra LLM pass)",
            "tome": "ToMe",
            "uniform_stride": "uniform stride",
            "random_tokens": "random",
            "average_pool": "average pooling",
            "published": "EvoComp, recipe `published`",
            "dropping": "EvoComp, recipe `plus` without context tokens",
        },
    ),
    (
        "with context tokens",
        {"plus": "EvoComp, recipe `plus`", "cls_attention+context": "CLS attention", "divprune+context": "DivPrune"},
    ),
]


def read(name: str) -> list[dict[str, str]]:
    """Rows of results/NAME.csv."""
    with (HERE / "results" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def accuracies(rows: Sequence[dict[str, str]], key: str, column: str = "accuracy") -> dict[str, dict[int, float]]:
    """{method: {kept: value}} of the rows that have a value; only the first of several seeds."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row[column]:
            found.setdefault(row[key], {}).setdefault(int(row["kept"]), float(row[column]))
    return found


def grouped(groups: Sequence[Group], values: dict[str, dict[int, float]], counts: Sequence[int]) -> list[str]:
    """Lines of a table with one block per group; the highest printed value of a block is bold, including ties."""
    lines = ["| | " + " | ".join(f"{count} kept" for count in counts) + " |", "| --- |" + " ---: |" * len(counts)]
    for heading, names in groups:
        lines.append(f"| *{heading}* |" + " |" * len(counts))
        present = {label: values[name] for name, label in names.items() if name in values}
        printed = {label: [_shown(row, count) for count in counts] for label, row in present.items()}
        best = [max((row[i] for row in printed.values()), default="") for i in range(len(counts))]
        for label, row in printed.items():
            if heading == "references":
                value = next(iter(present[label].values()))
                lines.append(f"| {label} | {value:.3f} |" + " |" * (len(counts) - 1))
            else:
                cells = [f"**{cell}**" if cell == top else cell for cell, top in zip(row, best, strict=True)]
                lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _shown(row: dict[int, float], count: int) -> str:
    return f"{row[count]:.3f}" if count in row else ""


def nano() -> list[str]:
    return grouped(NANO, accuracies(read("panel_full_nano"), "method"), (48, 32, 16, 8, 4))


def relation() -> list[str]:
    return grouped(NANO, accuracies(read("panel_full_nano"), "method", "relation"), (48, 32, 16, 8, 4))


def nano576() -> list[str]:
    return grouped(NANO576, accuracies(read("panel_nano576"), "name"), (192, 128, 64, 32, 16, 8))


def seeds() -> list[str]:
    """Ablations with several seeds: range over the seeds, in percent of the uncompressed accuracy."""
    names = {
        "plus": "`plus`",
        "dropping": "`plus` without context tokens, smaller pool, no probes",
        "bce_only": "published labels, cross-entropy only",
        "bce_cs": "published labels, cross-entropy + separation",
        "focal_cs": "published labels, focal loss + separation",
        "random_bce": "random labels, cross-entropy only",
        "no_text_bce": "published labels, cross-entropy only, no text input",
        "ghm_exact": "published, GHM-C by the paper's window",
        "ghm_only": "published without separation",
        "published": "published: GHM-C (ten bins) + separation",
        "no_text": "published without text input",
        "random_labels": "published with random labels",
    }
    rows, counts = read("panel_nano"), (48, 32, 16, 8, 4)
    lines = ["| three seeds each | " + " | ".join(f"{c} kept" for c in counts) + " |"]
    lines.append("| --- |" + " ---: |" * len(counts))
    for name, label in names.items():
        cells = []
        for count in counts:
            values = [100 * float(r["relative"]) for r in rows if r["name"] == name and int(r["kept"]) == count]
            low, high = f"{min(values):.1f}", f"{max(values):.1f}"
            cells.append(low if low == high else f"{low} to {high}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


UNSEEN = (
    ("cls_attention+context", 0.0, "", "CLS attention with context tokens"),
    ("divprune+context", 0.0, "", "DivPrune with context tokens"),
    ("plain", 0.0, "", "`plus`"),
    ("plain", 0.25, "cls_attention", "`plus`, hedge 1/4"),
    ("plain", 0.5, "cls_attention", "`plus`, hedge 1/2"),
    ("plain", 0.5, "divprune", "`plus`, hedge 1/2 by DivPrune"),
    ("plain", 0.5, "uniform_stride", "`plus`, hedge 1/2 by stride"),
    ("hedged", 0.5, "cls_attention", "`plus` trained with hedge 1/2"),
)
"""Method, hedge and its order as in the rows, and the printed name."""


def unseen(of: str = "left out") -> list[str]:
    """Accuracy on types left out of training, or on the other types (`seen`), at each kept count.

    In brackets points over CLS attention with context tokens (left out), or over `plus` as it is (seen), 95 % interval.
    """
    rows, counts, lines = [row for row in read("unseen_types") if row["scenes"] == "9103"], (16, 8, 4), []
    reference = "over_plain" if of == "seen" else "over_cls"
    for left_out in dict.fromkeys(row["left_out"] for row in rows):
        part = [row for row in rows if row["left_out"] == left_out and row["types"] in (of, left_out)]
        part = [row for row in part if (row["types"] == "seen") == (of == "seen")]
        heading = f"without `{left_out}`: the other types" if of == "seen" else f"`{left_out}`"
        lines.append(f"| *{heading}, {part[0]['n']} questions* |" + " |" * len(counts))
        for method, hedge, order, label in UNSEEN:
            key = (method, f"{hedge:.4f}", order)
            own = {int(row["kept"]): row for row in part if (row["method"], row["hedge"], row["hedge_by"]) == key}
            if own:
                lines.append(f"| {label} | " + " | ".join(_paired(own[count], reference) for count in counts) + " |")
    return ["| | " + " | ".join(f"{c} kept" for c in counts) + " |", "| --- |" + " ---: |" * len(counts), *lines]


def _paired(row: dict[str, str], reference: str) -> str:
    """An accuracy, and the points by which it is above a reference with their interval."""
    if not row[reference]:
        return f"{float(row['accuracy']):.3f}"
    return _with_points(row, [float(row[reference + part]) for part in ("", "_low", "_high")])


def _with_points(row: dict[str, str], difference: Sequence[float]) -> str:
    gap, low, high = (round(100 * value, 1) + 0.0 for value in difference)  # + 0.0: no minus sign before zero
    return f"{float(row['accuracy']):.3f} ({gap:+.1f} [{low:.1f}, {high:.1f}])"


def unseen_cost() -> list[str]:
    return unseen("seen")


def attribution() -> list[str]:
    """The six types: accuracy of the shipped compressor with parts taken away, and what each is worth in points."""
    rows, counts = read("attribution"), (48, 32, 16, 8, 4)
    labels = {
        "own question": "as trained",
        "other question": "tokens chosen for another question about the image",
        "no question": "tokens chosen without a question",
        "no context tokens": "no context tokens",
        "cls_attention+context": "CLS attention with context tokens",
        "cls_attention": "CLS attention",
    }
    lines = ["| | " + " | ".join(f"{c} kept" for c in counts) + " |", "| --- |" + " ---: |" * len(counts)]
    for name, label in labels.items():
        own = {
            int(row["kept"]): row
            for row in rows
            if (row["name"], row["types"], row["tokens"]) == ("shipped", "six types", name)
        }
        lines.append(f"| {label} | " + " | ".join(_worth(own[count]) for count in counts) + " |")
    return lines


def _worth(row: dict[str, str]) -> str:
    if not row["worth"]:
        return f"{float(row['accuracy']):.3f}"
    return _with_points(row, [-float(row["worth" + part]) for part in ("", "_high", "_low")])


TABLES: dict[str, Callable[[], list[str]]] = {
    "nano": nano,
    "relation": relation,
    "nano576": nano576,
    "seeds": seeds,
    "unseen": unseen,
    "unseen_cost": unseen_cost,
    "attribution": attribution,
}


def filled(text: str) -> str:
    """The text with all tables replaced by new ones."""

    def table(match: re.Match) -> str:
        return "\n".join([match[1], *TABLES[match[2]](), match[3]])

    return re.sub(r"(<!-- table (\w+) -->).*?(<!-- end -->)", table, text, flags=re.S)


if __name__ == "__main__":
    RESULTS.write_text(filled(RESULTS.read_text()))
