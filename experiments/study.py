"""Run the study of `experiments/study/runs.yaml` and write one row a run and kept count.

    python experiments/study.py --only published,plus --seeds 0,1,2 --out experiments/results/panel_nano.csv
    python experiments/study.py --split selection --out experiments/results/panel_nano_selection.csv

Runs go to runs/study/NAME-SEED; finished ones are not repeated, interrupted ones go on. `plus` with three seeds takes
about 20 minutes of one CPU core, `published` about 8. Rows of the same name and seed are replaced.
"""

import argparse
import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from evocomp.compressor.model import EvoCompCompressor
from evocomp.config.load import load
from evocomp.data.splits import test_questions
from evocomp.evaluation.panel import Panel
from evocomp.evaluation.statistics import ImageBootstrap
from evocomp.mllm.hf import FrozenMLLM
from evocomp.training.build import run

HERE = Path(__file__).resolve().parent
FIELDS = ["name", "seed", "kept", "accuracy", "low", "high", "relative", "relation", "count", "n", "n_relation"]
PURPOSES = ("labelling", "refresh", "training")
COSTS = ["labelled", *(f"{purpose}_cpu_s" for purpose in PURPOSES), "forwards", "tflop"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas; default: all")
    parser.add_argument("--seeds", default="", help="default: those of runs.yaml")
    parser.add_argument(
        "--split", choices=("test", "selection"), default="test", help="choose on one, report the other"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "panel_nano.csv")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    args = parser.parse_args()
    study = OmegaConf.to_container(OmegaConf.load(HERE / "study" / "runs.yaml"))
    names = [name for name in study["runs"] if not args.only or name in args.only.split(",")]
    seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else study["seeds"]
    judge = None
    for name in names:
        entry = study["runs"][name]
        for seed in seeds:
            folder = args.runs / f"{name}-{seed}"
            settings = [*entry["set"], f"seed={seed}", f"run_dir={folder}", "logger=none"]
            config = load([HERE / entry["config"]], settings)
            run(config)
            if judge is None:
                data = replace(config.data, relation=True)
                examples = test_questions(data, study["questions"], study["scenes"][args.split])
                judge = Judge(examples)
            write(args.out, judge.rows(name, seed, folder, config.eval.kept))


class Judge:
    """The same fresh questions for all runs."""

    def __init__(self, examples):
        self.panel = Panel(FrozenMLLM.load("nano"), examples, batch=200, max_new_tokens=1)
        self.kinds = np.array([example.kind for example in examples])
        self.images = [example.image_id for example in examples]
        self.full = np.asarray(self.panel.full().correct)

    @torch.inference_mode()
    def rows(self, name: str, seed: int, folder: Path, kept) -> list[dict]:
        compressor = EvoCompCompressor.from_pretrained(folder / "compressor").eval()
        plain, relation = self.kinds != "relation", self.kinds == "relation"
        bootstrap = ImageBootstrap([image for image, own in zip(self.images, plain, strict=True) if own])
        cost = json.loads((folder / "trained.json").read_text())["cost"]
        parts = [share for share in cost.values() if isinstance(share, dict)]
        rows = []
        for count in kept:
            right = np.asarray(self.panel.compressor(compressor, count).correct)
            interval = bootstrap.interval(right[plain])
            rows.append(
                {
                    "name": name,
                    "seed": seed,
                    "kept": count,
                    "accuracy": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "relative": interval.mean / self.full[plain].mean(),
                    "relation": right[relation].mean(),
                    "count": right[self.kinds == "count"].mean(),
                    "n": int(plain.sum()),
                    "n_relation": int(relation.sum()),
                    "labelled": cost["labelled"],
                    **{f"{purpose}_cpu_s": cost[purpose]["cpu_seconds"] for purpose in PURPOSES},
                    "forwards": sum(share["forwards"] for share in parts),
                    "tflop": sum(share["flops"] for share in parts) / 1e12,
                }
            )
        listed = "  ".join(f"{row['kept']}: {row['accuracy']:.3f} ({100 * row['relative']:.1f} %)" for row in rows)
        print(f"{name} seed {seed}  {listed}", flush=True)
        return rows


def write(path: Path, rows: list[dict]) -> None:
    """Replace rows of the same name and seed."""
    old = list(csv.DictReader(path.open())) if path.exists() else []
    new = {(row["name"], str(row["seed"])) for row in rows}
    kept = [row for row in old if (row["name"], row["seed"]) not in new]
    tidy = [{key: f"{v:.4f}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, [*FIELDS, *COSTS])
        table.writeheader()
        table.writerows([*kept, *tidy])
    temporary.replace(path)


if __name__ == "__main__":
    main()
