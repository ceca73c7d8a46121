"""Train every combination of some settings, a run folder each, and write a table of their accuracies.

    python experiments/sweep.py --config nano --vary optim.lr=1e-3,2e-3 --vary compressor.layers=1,2 --out runs/sweep

Runs are chosen by their accuracy on the selection split (`accuracy/mean`), so the sweep judges none on the test split.
The same command goes on after an interruption: finished runs are not repeated, the interrupted one continues from its
last checkpoint, and labels are shared where the settings allow it (give --labels.dir among the settings). Further
settings (`--trainer.max_epochs=2`) are passed to every run.
"""

import argparse
import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from evocomp.config.load import load
from evocomp.log import UserError, exit_code
from evocomp.runs.claims import DONE
from evocomp.training.build import run

TABLE = "sweep.csv"


def combinations(vary: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of `KEY=VALUE,VALUE,...`.

    >>> combinations(["optim.lr=1e-3,2e-3", "seed=0"])
    [{'optim.lr': '1e-3', 'seed': '0'}, {'optim.lr': '2e-3', 'seed': '0'}]
    """
    axes = []
    for text in vary:
        key, equals, values = text.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"--vary {text}: write KEY=VALUE,VALUE,...")
        axes.append([(key, value) for value in values.split(",")])
    return [dict(chosen) for chosen in itertools.product(*axes)]


def train(files: Sequence[str], settings: Sequence[str], folder: Path) -> float:
    """Accuracy on the selection split after training in `folder`; an unfinished run goes on, a finished one is read.

    Raises:
        UserError: mistakes in the settings, or a folder that holds another run.
    """
    config = load(files, [*settings, f"run_dir={folder}", "data.test_samples=0", "logger=csv"])
    if not config.data.val_samples:
        raise UserError("data.val_samples=0: a sweep needs a selection split")
    run(config)
    return accuracy(folder)


def accuracy(folder: Path) -> float:
    """The last `accuracy/mean` of a finished run.

    Raises:
        UserError: the folder holds no finished run with curves.
    """
    path = folder / "curves" / "metrics.csv"
    if not (folder / DONE).is_file() or not path.is_file():
        raise UserError(f"{folder} holds no finished run; run the sweep again")
    with path.open() as file:
        found = [row["accuracy/mean"] for row in csv.DictReader(file) if row.get("accuracy/mean")]
    if not found:
        raise UserError(f"{path} has no accuracy/mean; delete {folder} and run the sweep again")
    return float(found[-1])


def sweep(files: Sequence[str], settings: Sequence[str], vary: Sequence[str], out: Path) -> list[dict[str, str]]:
    """Rows of the table, best first: the varied settings, the accuracy and the folder."""
    rows = []
    for chosen in combinations(vary):
        folder = out / ("_".join(f"{key}={value}" for key, value in chosen.items()) or "run")
        value = train(files, [*settings, *(f"{key}={value}" for key, value in chosen.items())], folder)
        rows.append({**chosen, "accuracy": f"{value:.4f}", "run_dir": str(folder)})
        rows.sort(key=lambda row: -float(row["accuracy"]))
        temporary = out / f"{TABLE}.tmp"
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(out / TABLE)
    return rows


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[], help="YAML file or name of an installed one")
    parser.add_argument("--vary", action="append", required=True, metavar="KEY=VALUE,VALUE", help="settings to combine")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs and of the table")
    args, settings = parser.parse_known_args(words)
    if wrong := [word for word in settings if "=" not in word]:
        raise UserError(f"{wrong[0]}: write settings as --KEY=VALUE")
    rows = sweep(args.config, [word.removeprefix("--") for word in settings], args.vary, args.out)
    print(json.dumps(rows[0]))


if __name__ == "__main__":
    raise SystemExit(exit_code(main, "sweep"))
