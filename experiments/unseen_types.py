"""What a compressor is worth on a question type that it was not trained on, and what a hedge is worth there.

    python experiments/unseen_types.py                          # trains 14 runs (about 10 minutes of a core each)
    python experiments/unseen_types.py --types relation --no-training --runs runs/unseen
    python experiments/unseen_types.py --split selection --out runs/unseen_selection.csv

For each type, the long nano recipe is trained without it (data.leave_out), as it is (`plain`) and with half of the
selected tokens chosen by a training-free order (`hedged`, compressor.hedge=0.5). Runs go to RUNS/plain_TYPE and
RUNS/hedged_TYPE; finished ones are not repeated. All are judged on the same questions: on the type left out, on the
other types together (`seen`), and on `relation` where it was trained on. The plain ones are judged with hedges that
are applied at inference only, too. Paired differences to CLS attention with context tokens and to the plain run have
95 % intervals over images. Shares and orders are chosen on one sequence of scenes, results come from another.
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
from evocomp.config.schema import RunConfig
from evocomp.data.splits import test_questions
from evocomp.evaluation.outcome import Outcome
from evocomp.evaluation.panel import Panel
from evocomp.evaluation.run import build_rival
from evocomp.evaluation.statistics import ImageBootstrap
from evocomp.log import UserError, exit_code
from evocomp.mllm.hf import FrozenMLLM
from evocomp.training.build import run

HERE = Path(__file__).resolve().parent
TYPES = ("relation", "find", "count", "digit", "exist", "color", "shape")
SCENES = {"test": 9103, "selection": 202}
QUESTIONS = 2700
KEPT = (16, 8, 4)
EPOCHS = 32  # 18 on-policy rounds: enough for the loss on an unseen type to show
RIVALS = ("cls_attention+context", "cls_attention", "divprune+context")
BASE = "cls_attention+context"
HEDGES = {
    "plain": ((0.0, "cls_attention"), (0.25, "cls_attention"), (0.5, "cls_attention"), (0.5, "divprune"),
              (0.5, "uniform_stride")),
    "hedged": ((0.5, "cls_attention"),),
}  # fmt: skip
FIELDS = ["scenes", "left_out", "seed", "method", "hedge", "hedge_by", "kept", "types", "n", "accuracy", "low", "high"]
DIFFERENCES = [f"{against}{part}" for against in ("over_cls", "over_plain") for part in ("", "_low", "_high")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(TYPES), help="types to leave out, one at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=tuple(SCENES), default="test", help="choose on one, report the other")
    parser.add_argument("--no-training", action="store_true", help="judge the runs that are there")
    parser.add_argument("--runs", type=Path, default=Path("runs/unseen"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "unseen_types.csv")
    args = parser.parse_args()
    types = args.types.split(",")
    if unknown := sorted(set(types) - set(TYPES)):
        raise UserError(f"--types: unknown {', '.join(unknown)}; types: {', '.join(TYPES)}")
    judge = Judge(load([HERE / "nano_long.yaml"]), SCENES[args.split], args.seed)
    for left_out in types:
        compressors = {}
        for training in HEDGES:
            folder = args.runs / f"{training}_{left_out}{f'-{args.seed}' if args.seed else ''}"
            if not args.no_training:
                run(settings(folder, left_out, training, args.seed))
            if (folder / "trained.json").is_file():
                compressors[training] = EvoCompCompressor.from_pretrained(folder / "compressor").eval()
        if compressors:
            write(args.out, judge.rows(left_out, compressors))


def settings(folder: Path, left_out: str, training: str, seed: int) -> RunConfig:
    """The long recipe without one question type."""
    changes = [f"run_dir={folder}", f"seed={seed}", f"data.leave_out=[{left_out}]", "data.test_samples=0"]
    changes += [f"trainer.max_epochs={EPOCHS}", "logger=none"]
    return load([HERE / "nano_long.yaml"], changes + (["compressor.hedge=0.5"] if training == "hedged" else []))


class Judge:
    """The same fresh questions for all runs; methods without training answer them once."""

    def __init__(self, config: RunConfig, scenes: int, seed: int):
        self.scenes, self.seed = scenes, seed
        examples = test_questions(replace(config.data, relation=True), QUESTIONS, scenes)
        self.panel = Panel(FrozenMLLM.load(config.model.name), examples, batch=200, max_new_tokens=1)
        self.kinds = np.array([example.kind for example in examples])
        self.images = np.array([example.image_id for example in examples])
        with torch.inference_mode():
            rivals = [build_rival(name, self.panel.mllm, config.compressor.sharp) for name in RIVALS]
            found = [self.panel.full(), *self.panel.selectors(rivals, KEPT)]
        self.free = {(outcome.method, outcome.kept): np.asarray(outcome.correct) for outcome in found}

    @torch.inference_mode()
    def rows(self, left_out: str, compressors: dict[str, EvoCompCompressor]) -> list[dict]:
        """Rows of every method on the type left out and on the others."""
        right = {(method, 0.0, "", kept): correct for (method, kept), correct in self.free.items()}
        for training, compressor in compressors.items():
            for hedge, order in HEDGES[training]:
                compressor.config.hedge, compressor.config.hedge_by = hedge, order
                for kept in KEPT:
                    outcome: Outcome = self.panel.compressor(compressor, kept, training)
                    right[training, hedge, order if hedge else "", kept] = np.asarray(outcome.correct)
        parts = {left_out: self.kinds == left_out, "seen": self.kinds != left_out}
        if left_out != "relation":
            parts["relation"] = self.kinds == "relation"
        return [self.row(left_out, key, types, own, right) for key in right for types, own in parts.items()]

    def row(self, left_out: str, key: tuple, types: str, own: np.ndarray, right: dict[tuple, np.ndarray]) -> dict:
        method, hedge, order, kept = key
        bootstrap = ImageBootstrap(self.images[own])
        interval = bootstrap.interval(right[key][own])
        row = {"scenes": self.scenes, "left_out": left_out, "seed": self.seed, "method": method, "hedge": hedge}
        row |= {"hedge_by": order, "kept": kept, "types": types, "n": int(own.sum())}
        row |= {"accuracy": interval.mean, "low": interval.low, "high": interval.high}
        references = {"over_cls": (BASE, 0.0, "", kept), "over_plain": ("plain", 0.0, "", kept)}
        for name, reference in references.items():
            if reference in right and reference != key:
                gap = bootstrap.difference(right[key][own], right[reference][own])
                row |= {name: gap.mean, f"{name}_low": gap.low, f"{name}_high": gap.high}
        print(" ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
        return row


def write(path: Path, rows: list[dict]) -> None:
    """Replace rows of the same scenes, type left out and seed."""
    old = list(csv.DictReader(path.open())) if path.exists() else []
    new = {(str(row["scenes"]), row["left_out"], str(row["seed"])) for row in rows}
    kept = [row for row in old if (row["scenes"], row["left_out"], row["seed"]) not in new]
    tidy = [{key: f"{v:.4f}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, [*FIELDS, *DIFFERENCES])
        table.writeheader()
        table.writerows([*kept, *tidy])
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(exit_code(main, "unseen_types"))
