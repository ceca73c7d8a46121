"""Reads the curves, labels and report rows of a finished or unfinished run as plain lists and dicts."""

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
    """The path itself if it exists, else the same relative path in the nearest parent of the working directory.

    Jupyter runs a notebook in the folder of its file; with this function, `runs/nano` is also found from `notebooks/`.

    Raises:
        UserError: the path exists in none of these folders.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / path).exists():
            return folder / path
    raise UserError(f"{path} is neither in {here} nor in a parent folder of it; give the full path, or train it first")


def read_curves(run_dir: str | Path) -> dict[str, list[Point]]:
    """All scalars that a run logged, by name and ordered by step, from TensorBoard's event files or the CSV file.

    A resumed run has several event files, whose curves are joined; if a step was logged twice, the later value is used.
    Baselines are separate runs in TensorBoard; here their names are prefixes, as in `random/accuracy/kept_16`.

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
        raise UserError(f"{folder} has no curves; give the folder of a run with logger=tensorboard or logger=csv")
    curves: dict[str, dict[int, float]] = {}
    folders = {path.parent for path in events}
    for path in events:
        own = path.parent.with_name("compressor")
        prefix = f"{path.parent.name}/" if own in folders - {path.parent} else ""
        # 0 = all values: by default only a sample of long curves is loaded
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
    """The label records of all complete rounds in the store: round -> sample id -> record.

        rounds = read_labels("runs/nano")
        frame = pandas.DataFrame(label_summaries(rounds))

    Args:
        run_dir: a run folder of `evocomp train` or `evocomp label`, or the folder of a label store.

    Raises:
        UserError: there is no label store, or it is damaged.
    """
    folder = Path(run_dir)
    place = next((path for path in (folder / "labels", folder) if (path / "meta.json").is_file()), None)
    if place is None:
        raise UserError(f"{folder} has no label store; give a run folder, or the folder given as --labels.dir")
    store = LabelStore(place)
    return {round: store.read(round) for round in store.rounds()}


def label_summaries(rounds: dict[int, dict[int, Record]]) -> list[dict[str, Any]]:
    """One row per round and sample, with all scalars of its record and summaries of its arrays.

    The summaries: `groups`, number of groups; `kept`, number of kept tokens; `tokens`, number of tokens;
    `population_mean`, mean loss of the last population; `distinct`, number of different masks in it; `proposals`,
    number of proposed masks. Scalars of the record are `best_loss`, `first_mean`, `spread`, ... Losses are in nats.

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
    """Share of the masks in the last populations that keep each token [N].

    Args:
        records: records of searches.
        tokens: number of tokens N of each record.

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
        UserError: the run has no report.
    """
    path = Path(run_dir) / "report.json"
    if not path.is_file():
        raise UserError(f"{run_dir} has no report; make it with evocomp eval --run {run_dir}")
    return json.loads(path.read_text())
