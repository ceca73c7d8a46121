"""What context tokens and the question are worth to a compressor, without training anything.

    python experiments/attribution.py                                           # the shipped nano compressor
    python experiments/attribution.py --compressor runs/nano_long/compressor --name long

A few minutes of one CPU core. The compressor selects tokens for each question as trained (`own question`), for another
question about the same image (`other question`; the LLM is asked the own one), without any question (`no question`),
and with all R tokens selected (`no context tokens`). CLS attention, with and without context tokens, reads no
question at all. Accuracy on the six types, and on `relation`, with paired differences to `own question` and 95 %
intervals over images.
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from evocomp.compressor.model import EvoCompCompressor
from evocomp.config.load import load
from evocomp.data.example import Example
from evocomp.data.splits import test_questions
from evocomp.evaluation.outcome import Outcome
from evocomp.evaluation.panel import Panel
from evocomp.evaluation.run import build_rival
from evocomp.evaluation.statistics import ImageBootstrap
from evocomp.log import exit_code
from evocomp.mllm.hf import FrozenMLLM

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "evocomp" / "assets" / "nano_compressor"
SCENES = 9103
QUESTIONS = 2700
KEPT = (48, 32, 16, 8, 4)
RIVALS = ("cls_attention+context", "cls_attention")
OWN = "own question"
FIELDS = [
    "name",
    "scenes",
    "tokens",
    "kept",
    "types",
    "n",
    "accuracy",
    "low",
    "high",
    "worth",
    "worth_low",
    "worth_high",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compressor", type=Path, default=SHIPPED)
    parser.add_argument("--name", default="shipped", help="of the compressor in the rows")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "attribution.csv")
    args = parser.parse_args()
    config = load([HERE / "nano_long.yaml"])
    compressor = EvoCompCompressor.from_pretrained(args.compressor).eval()
    examples = test_questions(replace(config.data, relation=True), QUESTIONS, SCENES)
    mllm = FrozenMLLM.load(config.model.name)
    own, other = (Panel(mllm, some, batch=200, max_new_tokens=1) for some in (examples, swapped(examples)))
    with torch.inference_mode():
        found = outcomes(own, other, compressor)
        found += own.selectors([build_rival(name, mllm, compressor.config.sharp) for name in RIVALS], KEPT)
    write(args.out, args.name, rows(found, examples))


def swapped(examples: list[Example]) -> list[Example]:
    """Each question's example with the prompt of the next question about its image that asks something else."""
    by_image: dict[str, list[str]] = {}
    for example in examples:
        by_image.setdefault(example.image_id, []).append(example.prompt)
    found = []
    for example in examples:
        asked = by_image[example.image_id]
        start = asked.index(example.prompt)
        later = [*asked[start:], *asked[:start]]
        found.append(replace(example, prompt=next((p for p in later if p != example.prompt), example.prompt)))
    return found


def outcomes(own: Panel, other: Panel, compressor: EvoCompCompressor) -> list[Outcome]:
    """The compressor as trained, and with a part taken away."""
    config, found = compressor.config, []
    for kept in KEPT:
        found.append(own.compressor(compressor, kept, OWN))
        chosen = [shown.alone for shown in other.compressor_tokens(compressor, kept)]
        found.append(own.given("other question", kept, lambda i, asked, r, rows=chosen: rows[i], config.sharp))
    for label, change in (("no question", {"use_text": False}), ("no context tokens", {"sharp": 0.0})):
        kept_as = {name: getattr(config, name) for name in change}
        for name, value in change.items():
            setattr(config, name, value)
        found += [own.compressor(compressor, kept, label) for kept in KEPT]
        for name, value in kept_as.items():
            setattr(config, name, value)
    return found


def rows(found: list[Outcome], examples: list[Example]) -> list[dict]:
    relation = np.array([example.kind == "relation" for example in examples])
    images = np.array([example.image_id for example in examples])
    right = {(outcome.method, outcome.kept): np.asarray(outcome.correct) for outcome in found}
    table = []
    for types, part in (("six types", ~relation), ("relation", relation)):
        bootstrap = ImageBootstrap(images[part])
        for (tokens, kept), correct in right.items():
            interval = bootstrap.interval(correct[part])
            row = {"scenes": SCENES, "tokens": tokens, "kept": kept, "types": types, "n": int(part.sum())}
            row |= {"accuracy": interval.mean, "low": interval.low, "high": interval.high}
            if tokens != OWN:
                worth = bootstrap.difference(right[OWN, kept][part], correct[part])
                row |= {"worth": worth.mean, "worth_low": worth.low, "worth_high": worth.high}
            table.append(row)
            print(" ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
    return table


def write(path: Path, name: str, table: list[dict]) -> None:
    """Replace the rows of this name."""
    old = [row for row in csv.DictReader(path.open()) if row["name"] != name] if path.exists() else []
    tidy = [{"name": name} | {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in table]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        out = csv.DictWriter(file, FIELDS)
        out.writeheader()
        out.writerows([*old, *tidy])
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(exit_code(main, "attribution"))
