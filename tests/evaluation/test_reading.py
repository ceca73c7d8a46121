import csv

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from evocomp.evaluation.reading import agreement, find_path, label_summaries, read_curves, read_labels, read_rows
from evocomp.labels.records import kept_by
from evocomp.labels.store import LabelStore
from evocomp.log import UserError


def test_every_point_of_a_long_curve_comes_back(tmp_path):
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step in range(12_000):  # more than TensorBoard's reader keeps by default
            writer.add_scalar("train/loss", step / 2, step)
    assert read_curves(tmp_path) == {"train/loss": [(step, step / 2) for step in range(12_000)]}


def test_a_resumed_run_is_one_curve_and_the_later_value_counts(tmp_path):
    for number, (start, value) in enumerate([(0, 1.0), (3, 2.0)]):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{number}") as writer:
            for step in range(start, start + 5):
                writer.add_scalar("loss", value, step)
    assert read_curves(tmp_path)["loss"] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2), (7, 2)]


def test_csv_curves_have_gaps_where_nothing_was_logged(tmp_path):
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "a", "b"])
        writer.writeheader()
        writer.writerows([{"step": 0, "a": 0.5}, {"step": 2, "b": 3}, {"step": 2, "a": 0.25}])
    assert read_curves(tmp_path) == {"a": [(0, 0.5), (2, 0.25)], "b": [(2, 3.0)]}


def test_labels_of_complete_rounds_come_back(tmp_path):
    store = LabelStore.open(tmp_path / "labels", {"made": "by this test"})
    record = {"id": 5, "kept": np.array([1, 2], np.uint16), "best_loss": np.float32(0.5)}
    store.write(0, 0, [record])
    store.commit(0, [0])
    store.write(1, 0, [record])  # a round without COMMIT file
    for place in (tmp_path, tmp_path / "labels"):
        rounds = read_labels(place)
        assert list(rounds) == [0] and rounds[0][5]["kept"].tolist() == [1, 2]
    assert label_summaries(rounds) == [{"round": 0, "id": 5, "best_loss": 0.5, "kept": 2}]


@pytest.mark.parametrize("read", [read_curves, read_labels, read_rows])
def test_an_empty_folder_is_a_users_mistake(read, tmp_path):
    with pytest.raises(UserError):
        read(tmp_path)


def test_agreement_is_the_share_of_masks_counted_one_by_one():
    rng = np.random.default_rng(0)
    of = np.array([0, 1, 0, 2, 1, 2, 2, 0])
    members = [np.flatnonzero(of == g) for g in range(3)]
    population = np.stack([[rng.integers(len(m)) for m in members] for _ in range(9)])
    expected = np.zeros(8)
    for genome in population:
        for group, place in enumerate(genome):
            expected[members[group][place]] += 1 / 9
    assert agreement([{"groups": of, "population": population}], 8) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"kept": np.array([0, 3], np.uint16)}, [0, 3]),
        ({"credits": np.array([0.0, 2.0, 1.0, -1.0], np.float16)}, [1, 2]),
        ({"draws": np.array([[2, 0], [3, 1]], np.uint16), "advantages": np.array([-1.0, 1.0])}, [1, 3]),
        ({"draws": np.zeros((0, 0), np.uint16), "advantages": np.zeros(0)}, []),
    ],
    ids=["mask", "credits", "proposals", "nothing"],
)
def test_what_a_record_would_keep(record, expected):
    assert np.flatnonzero(kept_by({"id": 0, **record}, tokens=4, keep=2)).tolist() == expected


def test_baselines_are_named_by_their_run(tmp_path):
    for run, value in (("compressor", 0.5), ("random", 0.25)):
        with SummaryWriter(str(tmp_path / "tensorboard" / run)) as writer:
            writer.add_scalar("accuracy/kept_16", value, 3)
    assert read_curves(tmp_path) == {"accuracy/kept_16": [(3, 0.5)], "random/accuracy/kept_16": [(3, 0.25)]}


def test_a_path_is_found_from_a_folder_below(tmp_path, monkeypatch):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "notebooks" / "deep").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "notebooks", tmp_path / "notebooks" / "deep"):
        monkeypatch.chdir(folder)
        assert find_path("runs/a") == tmp_path / "runs" / "a"
        assert find_path(tmp_path / "runs") == tmp_path / "runs"
    with pytest.raises(UserError, match="runs/b is neither in .*deep nor in a parent folder of it"):
        find_path("runs/b")
