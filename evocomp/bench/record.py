"""`evocomp bench KIND`: run a benchmark, print its rows, and append them to a CSV file if one is given."""

import csv
import datetime
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evocomp.log import UserError, logger

KINDS = {
    "label-search": "label_search",
    "label-processes": "label_processes",
    "ops": "ops",
    "inference": "inference",
    "training": "training",
}
"""Kind -> module of this package with `run(device)`, which returns rows."""
AT_SHAPE = {"label-search": "scorer", "ops": "ops", "inference": "prefill"}
"""Kind -> module with `at_shape(name, device)`, which returns rows at the sizes of a real model."""

Row = dict[str, Any]


def run_bench(kind: str, out: Path | None = None, shapes: Sequence[str] = ()) -> list[Row]:
    """Run a benchmark on the GPU if there is one, print its table, append its rows to `out`.

    Args:
        kind: a key of `KINDS`.
        out: CSV file, or a folder that gets KIND.csv.
        shapes: names of real models' sizes (`mllm.sizes.SHAPES`), run in order; empty: the default small sizes.

    Raises:
        UserError: the benchmark does not exist.
    """
    modules = AT_SHAPE if shapes else KINDS
    if kind not in modules:
        raise UserError(f"evocomp bench {kind}{' --shape' if shapes else ''}: choose one of {', '.join(modules)}")
    name = f"evocomp.bench.{modules[kind]}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"evocomp bench {kind}: this version has no such benchmark") from None
    path = out / f"{kind}.csv" if out is not None and out.suffix != ".csv" else out
    if path is not None and not path.parent.exists():
        path.parent.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    try:
        for found in [module.at_shape(shape, device) for shape in shapes] or [module.run(device)]:
            for row in found:
                rows.append(row)
                if path is not None:
                    append(path, [row])  # immediately, so that an interruption loses no finished row
    finally:
        if rows:
            print(table(rows))
    if path is not None:
        logger.info("%d rows appended to %s", len(rows), path)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Rows as a text table: benchmark, baseline, times, and the ratio with its 20 % and 80 % quantiles."""
    cells = [("bench", "shape", "baseline", "ours", "baseline", "ours", "ratio (p20 to p80)")]
    cells += [(row["bench"], row["shape"], row["baseline"], row["ours"], *_values(row), _ratio(row)) for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    machine = ", ".join(f"{key} {rows[0][key]}" for key in ("device", "threads", "torch") if key in rows[0])
    return "\n".join([line.rstrip() for line in lines] + [machine])


def _values(row: Row) -> tuple[str, str]:
    for unit, name in (("ms", "ms"), ("MiB", "mib")):
        if f"ours_{name}" in row:
            return f"{row[f'baseline_{name}']:.2f} {unit}", f"{row[f'ours_{name}']:.2f} {unit}"
    if "ours_waits" in row:
        return f"{row['baseline_waits']} waits", f"{row['ours_waits']} waits"
    return "", ""


def _ratio(row: Row) -> str:
    if "break_even_kept" in row:
        kept = row["break_even_kept"]
        return "never faster as measured" if kept is None else f"faster up to {kept:.0f} kept"
    spread = f" ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})" if "ratio_p20" in row else ""
    floor = f", floor {row['floor_ms']:.2f} ms" if "floor_ms" in row else ""
    return f"{row['ratio']:.2f}{spread}{floor}"


def append(path: Path, rows: Sequence[Row]) -> None:
    """Append rows with the date to a CSV file; new columns are added to the existing rows as empty cells."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    new = [{"day": day} | row for row in rows]
    old: list[Row] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    columns = list(dict.fromkeys(key for row in [*old, *new] for key in row))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *new])
    temporary.replace(path)


def overview(paths: Sequence[Path]) -> str:
    """Summary of CSV files of benchmarks, one short line per row: times, ratio, lower bound."""
    lines = []
    for path in paths:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        lines.append(f"{path.stem} ({rows[-1]['device']}, torch {rows[-1]['torch']})" if rows else path.stem)
        lines += [_brief(row) for row in rows]
    return "\n".join(lines)


def _brief(row: dict[str, str]) -> str:
    pairs = ((f"{row.get(f'baseline_{name}')}", f"{row.get(f'ours_{name}')}") for name in ("ms", "mib", "waits"))
    before, after = next(((a, b) for a, b in pairs if b not in ("", "None")), ("nan", "nan"))
    floor = f" floor {float(row['floor_ms']):.2f}" if row.get("floor_ms") else ""
    difference = f" difference {float(row['largest_difference']):.1g}" if row.get("largest_difference") else ""
    ratio = float(row["ratio"] or "nan")
    names = f"{row['bench'][:32]:32} {row['shape'][:36]:36} {row['ours'][:30]:30}"
    return f"  {names} {float(before):9.3f} {float(after):9.3f} x{ratio:.2f}{floor}{difference}"


if __name__ == "__main__":
    print(overview([Path(name) for name in sys.argv[1:]]))
