"""Run a study, by default `experiments/study/runs.yaml`, and write one row per run and number of kept tokens.

    python experiments/study.py --only published,plus --seeds 0,1,2 --out experiments/results/panel_nano.csv
    python experiments/study.py --split selection --out experiments/results/panel_nano_selection.csv

Runs are in runs/study/NAME-SEED; finished runs are not repeated and interrupted ones are resumed. `plus` with three
seeds takes about 35 minutes of one CPU core, `published` about 8. Rows of the same name and seed are replaced. If a
study has the key `rivals`, rows of these selectors are added, and rows of the uncompressed model with the correct image
and with another image.
"""

import argparse
import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

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
FIELDS = ["name", "seed", "kept", "accuracy", "low", "high", "relative", "relation", "count", "n", "n_relation"]
PURPOSES = ("labelling", "refresh", "training")
COSTS = ["labelled", *(f"{purpose}_cpu_s" for purpose in PURPOSES), "forwards", "tflop"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=HERE / "study" / "runs.yaml")
    parser.add_argument("--only", default="", help="names of runs, or `rivals`, separated by commas; default: all")
    parser.add_argument("--seeds", default="", help="seeds separated by commas; default: those of the study")
    parser.add_argument(
        "--split", choices=("test", "selection"), default="test", help="test: for reports; selection: for choices"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "panel_nano.csv")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    args = parser.parse_args()
    study = OmegaConf.to_container(OmegaConf.load(args.study))
    known = [*study["runs"], *(["rivals"] if "rivals" in study else [])]
    asked = args.only.split(",") if args.only else known
    if unknown := sorted(set(asked) - set(known)):
        raise UserError(f"--only: {args.study} has no {', '.join(unknown)}; it has {', '.join(known)}")
    names = [name for name in study["runs"] if name in asked]
    seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else study["seeds"]
    judge = None
    for name in names:
        entry = study["runs"][name]
        for seed in seeds:
            folder = args.runs / f"{name}-{seed}"
            settings = [*entry["set"], f"seed={seed}", f"run_dir={folder}", "logger=none"]
            config = load([HERE / entry["config"]], settings)
            run(config)
            judge = judge or Judge(config, study, args.split)
            write(args.out, judge.rows(name, seed, folder, config.eval.kept))
    if "rivals" in asked:
        config = load([HERE / study["runs"]["plus"]["config"]])
        judge = judge or Judge(config, study, args.split)
        write(args.out, judge.rivals(study["rivals"], config.eval.kept, config.compressor.sharp))


class Judge:
    """Evaluates all runs on the same test questions."""

    def __init__(self, config: RunConfig, study: dict, split: str):
        data = replace(config.data, relation=True)
        examples = test_questions(data, study["questions"], study["scenes"][split])
        self.panel = Panel(FrozenMLLM.load(config.model.name), examples, batch=200, max_new_tokens=1)
        self.kinds = np.array([example.kind for example in examples])
        images = [example.image_id for example in examples if example.kind != "relation"]
        self.bootstrap = ImageBootstrap(images)
        self.whole = self.panel.full()
        self.full = np.asarray(self.whole.correct)

    @torch.inference_mode()
    def rows(self, name: str, seed: int, folder: Path, kept) -> list[dict]:
        compressor = EvoCompCompressor.from_pretrained(folder / "compressor").eval()
        cost = json.loads((folder / "trained.json").read_text())["cost"]
        parts = [share for share in cost.values() if isinstance(share, dict)]
        spent = {
            "labelled": cost["labelled"],
            **{f"{purpose}_cpu_s": cost[purpose]["cpu_seconds"] for purpose in PURPOSES},
            "forwards": sum(share["forwards"] for share in parts),
            "tflop": sum(share["flops"] for share in parts) / 1e12,
        }
        outcomes = [self.panel.compressor(compressor, count, name) for count in kept]
        return [self.row(outcome, seed) | spent for outcome in outcomes]

    @torch.inference_mode()
    def rivals(self, names: list[str], kept, sharp: float) -> list[dict]:
        """Rows of the uncompressed model with the correct and with another image, and of training-free selectors.

        sharp: see `build_rival`.
        """
        rivals = [build_rival(name, self.panel.mllm, sharp) for name in names]
        outcomes = [self.whole, self.panel.wrong_image(), *self.panel.selectors(rivals, kept)]
        return [self.row(outcome, 0) for outcome in outcomes if outcome.not_applicable is None]

    def row(self, outcome: Outcome, seed: int) -> dict:
        right, plain = np.asarray(outcome.correct), self.kinds != "relation"
        interval = self.bootstrap.interval(right[plain])
        row = {
            "name": outcome.method,
            "seed": seed,
            "kept": outcome.kept,
            "accuracy": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "relative": interval.mean / self.full[plain].mean(),
            "relation": right[~plain].mean(),
            "count": right[self.kinds == "count"].mean(),
            "n": int(plain.sum()),
            "n_relation": int((~plain).sum()),
        }
        share = f"{interval.mean:.3f} ({100 * row['relative']:.1f} %)"
        print(f"{outcome.method} seed {seed}  {outcome.kept}: {share}", flush=True)
        return row


def write(path: Path, rows: list[dict]) -> None:
    """Write rows to a CSV file; existing rows of the same name and seed are replaced."""
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
    sys.exit(exit_code(main, "study"))
