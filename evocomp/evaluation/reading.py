"""Curves, labels and rows of a finished or running run as plain lists and dicts, ready for data frames."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evocomp.grouping.groups import Groups
from evocomp.labels.records import Record
from evocomp.labels.store import LabelStore
from evocomp.log import UserError

Point = tuple[int, float]
"""(optimizer step, value)."""


def find_path(path: str | Path) -> Path:
    """The path itself if it exists, else the same relative path from the nearest parent of the working directory.

    Notebooks run in the folder that they are in; with this, `runs/nano` is also found from `notebooks/`.

    Raises:
        UserError: it exists in none of them.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / path).exists():
            return folder / path
    raise UserError(f"{path} is neither in {here} nor in a folder above it; give the full path, or train it first")


def read_curves(run_dir: str | Path) -> dict[str, list[Point]]:
    """Every scalar that a run logged, by name, in the order of steps; from TensorBoard's event files or the CSV file.

    A run that was stopped and resumed has several event files, whose curves are joined; where a step was run twice
    the later value counts. The names of baselines, which TensorBoard has as runs of their own, begin with theirs:
    `random/accuracy/kept_16`.

        frame = pandas.DataFrame(read_curves("runs/nano")["accuracy/kept_16"], columns=["step", "accuracy"])

    Args:
        run_dir: the folder of a run, or any folder with event files.

    Raises:
        UserError: there are no curves in the folder.
    """
    folder = Path(run_dir)
    events = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.name)
    tables = sorted(folder.rglob("metrics.csv"))
    if not events and not tables:
        raise UserError(f"{folder} holds no curves; give the folder of a run with logger=tensorboard or logger=csv")
    curves: dict[str, dict[int, float]] = {}
    folders = {path.parent for path in events}
    for path in events:
        own = path.parent.with_name("compressor")
        prefix = f"{path.parent.name}/" if own in folders - {path.parent} else ""
        # 0 = every value: the default keeps a sample of long curves
        reader = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 1, "images": 1, "histograms": 1})
        reader.Reload()
        for name in reader.Tags()["scalars"]:
            points = {event.step: float(event.value) for event in reader.Scalars(name)}
            curves.setdefault(prefix + name, {}).update(points)
    for path in tables:
        for name, points in _csv_curves(path).items():
            curves.setdefault(name, {}).update(points)
    return {name: sorted(points.items()) for name, points in sorted(curves.items())}


def _csv_curves(path: Path) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            step = int(float(row.pop("step")))
            for name, value in row.items():
                if value:
                    curves.setdefault(name, {})[step] = float(value)
    return curves


def read_labels(run_dir: str | Path) -> dict[int, dict[int, Record]]:
    """The label records that are still stored: complete round -> sample id -> record.

        rounds = read_labels("runs/nano")
        frame = pandas.DataFrame(label_summaries(rounds))

    Args:
        run_dir: what `evocomp train` or `evocomp label` wrote, or a label store itself.

    Raises:
        UserError: there is no label store, or it is broken.
    """
    folder = Path(run_dir)
    place = next((path for path in (folder / "labels", folder) if (path / "meta.json").is_file()), None)
    if place is None:
        raise UserError(f"{folder} holds no label store; give a run folder, or the folder given as --labels.dir")
    store = LabelStore(place)
    return {round: store.read(round) for round in store.rounds()}


def label_summaries(rounds: dict[int, dict[int, Record]]) -> list[dict[str, Any]]:
    """A row for each round and sample: its numbers as they are, of its arrays what one looks at.

    `groups` G, `kept` tokens kept, `tokens` N, `population_mean` loss, `distinct` masks in the last population,
    `proposals` K, and every number of the record (`best_loss`, `first_mean`, `spread`, ...). Losses in nats.

    >>> groups, population = np.array([0, 1, 1]), np.array([[0, 0], [0, 1]])
    >>> record = {"id": 7, "groups": groups, "kept": np.array([0, 2]), "population": population, "best_loss": 0.5}
    >>> label_summaries({0: {7: record}})
    [{'round': 0, 'id': 7, 'best_loss': 0.5, 'groups': 2, 'tokens': 3, 'kept': 2, 'distinct': 2}]
    """
    return [_summary(round, record) for round, records in rounds.items() for record in records.values()]


def _summary(round: int, record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {"round": round, "id": record["id"]}
    row |= {name: value for name, value in record.items() if np.ndim(value) == 0 and name != "id"}
    if "groups" in record:
        row |= {"groups": int(record["groups"].max()) + 1, "tokens": len(record["groups"])}
    if "kept" in record:
        row["kept"] = len(record["kept"])
    if "losses" in record:
        row["population_mean"] = float(record["losses"].mean())
    if "population" in record:
        row["distinct"] = len(np.unique(record["population"], axis=0))
    if "credits" in record:
        row["tokens"] = len(record["credits"])
    if "draws" in record:
        row["proposals"] = len(record["draws"])
    return row


def agreement(records: list[Record], tokens: int) -> np.ndarray:
    """Share of the last populations' masks that keep each token [N]; records of searches on N = `tokens` tokens.

    >>> record = {"groups": np.array([0, 1, 1]), "population": np.array([[0, 0], [0, 1], [0, 1], [0, 1]])}
    >>> agreement([record], 3).tolist()
    [1.0, 0.25, 0.75]
    """
    counts, masks = np.zeros(tokens), 0
    for record in records:
        kept = Groups(record["groups"]).kept(record["population"].astype(np.int32))
        counts += np.bincount(kept.ravel(), minlength=tokens)
        masks += len(kept)
    return counts / masks


def read_rows(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's report.json: method, kept, accuracy, low, high, relative, ...

    Raises:
        UserError: the run has not been judged.
    """
    path = Path(run_dir) / "report.json"
    if not path.is_file():
        raise UserError(f"{run_dir} has no report; make it: evocomp eval --run {run_dir}")
    return json.loads(path.read_text())
