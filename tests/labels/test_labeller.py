"""Rounds of a label store: bytes do not depend on how they were made, and a crash loses the current chunk only."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from evocomp import cli
from evocomp.config.load import load
from evocomp.data.conversations import write_scenes
from evocomp.data.splits import load_splits
from evocomp.labels.build import build_labeller
from evocomp.labels.labeller import Interrupted, LabelProgress, cut
from evocomp.labels.store import LabelStore
from evocomp.log import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = [
    "recipe=published",
    "data.max_samples=12",
    "data.val_samples=0",
    "data.test_samples=0",
    "labels.chunk_size=3",
    "search.population=12",
    "search.parents=4",
    "search.generations=1",
    "threads=1",
]


@pytest.fixture
def labeller(nano, tmp_path):
    """labeller(name, *settings): a labeller whose store is in a folder of that name."""

    def build(name: str, *settings: str):
        config = load([], [*TINY, *settings])
        return build_labeller(config, nano, load_splits(config.data), tmp_path / name)

    return build


def digest(folder: Path, round: int = 0) -> str:
    return LabelStore(folder).digest(round)


def chunks(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("round-0000/chunk-*.safetensors")}


# ------------------------------------------------------------ rounds


def test_two_runs_give_the_same_bytes(labeller):
    one, other = labeller("one"), labeller("other")
    records = one.ensure(0)
    other.ensure(0)
    assert digest(one.store.path) == digest(other.store.path)
    third = labeller("third", "seed=1")
    third.ensure(0)
    assert digest(third.store.path) != digest(one.store.path)
    assert sorted(records) == sorted(one.examples) and len(records) == 12


def test_later_rounds_give_the_same_bytes(labeller):
    one, other = labeller("one"), labeller("other")
    for round in range(3):
        one.ensure(round)
    for round in range(3):
        other = labeller("other")  # a new labeller for every round
        other.ensure(round)
    digests = [digest(one.store.path, round) for round in range(3)]
    assert digests == [digest(other.store.path, round) for round in range(3)] and len(set(digests)) == 3


@pytest.mark.parametrize("batch", [1, 1000])
def test_the_batch_size_changes_labels_by_rounding_only(labeller, batch):
    """Settings that are not in the store's fingerprint must not change labels."""
    one, other = labeller("one"), labeller("other", f"labels.batch={batch}")
    records, again = one.ensure(0), other.ensure(0)
    for id, record in records.items():
        assert np.array_equal(record["kept"], again[id]["kept"])
        assert record["best_loss"] == pytest.approx(again[id]["best_loss"], abs=1e-5)


def test_a_complete_round_is_not_made_again(labeller):
    one = labeller("one")
    records = one.ensure(0)
    spent = one.scorer.forwards
    stamps = {path: path.stat().st_mtime_ns for path in one.store.path.rglob("*")}
    reported = []
    again = one.ensure(0, report=reported.append)
    assert one.scorer.forwards == spent and reported == []
    assert {path: path.stat().st_mtime_ns for path in one.store.path.rglob("*")} == stamps
    assert all(np.array_equal(again[id]["kept"], records[id]["kept"]) for id in records)


def test_only_missing_chunks_are_made(labeller):
    one = labeller("one")
    one.ensure(0)
    whole, before = digest(one.store.path), chunks(one.store.path)
    (one.store.path / "round-0000" / "COMMIT.json").unlink()
    (one.store.path / "round-0000" / "chunk-000002.safetensors").unlink()
    again = labeller("one")
    states = []
    again.ensure(0, report=lambda progress: states.append((progress.done, progress.made, progress.total)))
    assert states == [(10, 1, 12), (11, 2, 12), (12, 3, 12)]
    after = chunks(one.store.path)
    assert digest(one.store.path) == whole
    assert {name: after[name] for name in before if "2." not in name} == {n: before[n] for n in before if "2." not in n}


def test_the_most_expensive_chunks_come_first(labeller):
    one = labeller("one")
    written = []
    write = one.store.write
    one.store.write = lambda round, chunk, records: (written.append(chunk), write(round, chunk, records))
    one.ensure(0)
    texts = {id: example.prompt + example.answer for id, example in one.examples.items()}
    words = [sum(len(texts[id]) for id in ids) for ids in cut(list(one.examples), 3)]
    assert [words[chunk] for chunk in written] == sorted(words, reverse=True) and len(set(words)) > 2


def test_after_sigterm_finished_chunks_remain_and_the_next_run_resumes(labeller):
    whole = labeller("whole")
    whole.ensure(0)
    one = labeller("one")
    handler = signal.getsignal(signal.SIGTERM)

    def stop_in_the_third_chunk(progress: LabelProgress) -> None:
        if progress.made == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="finished chunks are stored, run the same command to resume"):
        one.ensure(0, report=stop_in_the_third_chunk)
    assert signal.getsignal(signal.SIGTERM) is handler
    finished = chunks(one.store.path)
    assert len(finished) == 2 and not one.store.committed(0)
    assert not list(one.store.path.rglob("*.tmp.*"))
    labeller("one").ensure(0)
    after = chunks(one.store.path)
    assert {name: after[name] for name in finished} == finished
    assert digest(one.store.path) == digest(whole.store.path)


def test_progress_is_counted_and_reported(labeller):
    one = labeller("one")
    states = []
    records = one.ensure(0, report=lambda p: states.append((p.done, p.forwards, p.saved, p.mean_best)))
    assert [state[0] for state in states] == list(range(1, 13))
    assert states[-1][1] == one.scorer.forwards == sum(r["evaluations"] + 1 for r in records.values())
    assert states[-1][2] == sum(r["saved"] for r in records.values())
    assert states[-1][3] == pytest.approx(np.mean([r["best_loss"] for r in records.values()]), rel=1e-5)
    progress = LabelProgress(2, total=10, done=4, made=2, forwards=50, saved=3, loss_sum=1.0, seconds=4.0)
    assert progress.line() == "refresh 2: 4/10 questions, 0.5 per second" and progress.seconds_left == 12
    side_by_side = LabelProgress(0, total=10, done=4, made=2, seconds=4.0, workers=3)
    assert side_by_side.line() == "labels: 4/10 questions, 1.5 per second" and side_by_side.seconds_left == 4


def test_questions_that_are_not_drawn_are_not_counted_as_progress(nano, tmp_path):
    """A refresh scores 4 of 12 questions; the others are copied."""
    settings = ["recipe=plus", "labels.credit_masks=4", "labels.samples_per_refresh=4", "labels.proposals=4"]
    config = load([], [word for word in TINY if "recipe" not in word] + settings)
    one = build_labeller(config, nano, load_splits(config.data), tmp_path)
    one.ensure(0)
    states = []

    def scores(features, budgets):
        return [np.zeros(len(feature.visual), np.float32) for feature in features]

    records = one.ensure(1, scores, lambda p: states.append((p.done, p.made, p.total)))
    assert len(records) == 12 and states == [(n, n, 4) for n in range(1, 5)]


# ------------------------------------------------------------ the command


def label(folder: Path, *settings: str) -> int:
    return cli.main(["label", f"--labels.dir={folder}", f"--run_dir={folder}-run", *TINY, *settings])


LONGER = ["data.max_samples=18", "search.population=48", "search.parents=12", "search.generations=5"]


def test_sigkill_loses_the_current_chunk_only(tmp_path):
    folder = tmp_path / "killed"
    words = ["label", f"--labels.dir={folder}", f"--run_dir={folder}-run", *TINY, *LONGER]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "evocomp", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 300
    while len(chunks(folder)) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    finished = chunks(folder)
    store = LabelStore(folder)
    assert 2 <= len(finished) < 6 and not store.committed(0)

    assert label(folder, *LONGER) == 0
    after = chunks(folder)
    assert len(after) == 6 and {name: after[name] for name in finished} == finished
    assert not list(folder.rglob("*.tmp.*"))
    assert label(tmp_path / "whole", *LONGER) == 0
    assert digest(folder) == digest(tmp_path / "whole")


def test_a_store_of_other_settings_is_refused_and_replaced_only_if_asked(tmp_path, capsys):
    folder = tmp_path / "labels"
    assert label(folder) == 0
    first = digest(folder)
    capsys.readouterr()
    assert label(folder, "--search.generations=2") == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1
    assert "was made with search.generations=1 (this run has search.generations=2)" in said.err
    assert said.err.strip().endswith("choose another folder or --labels.overwrite=true")
    assert digest(folder) == first
    assert label(folder, "--search.generations=2", "--labels.overwrite=true") == 0
    assert digest(folder) != first
    # overwrite does not delete labels of the same settings
    before = chunks(folder)
    assert label(folder, "--search.generations=2", "--labels.overwrite=true") == 0
    assert chunks(folder) == before


@pytest.mark.parametrize(
    "setting",
    ["seed=3", "data.train_seed=7", "data.max_samples=11", "grouping.centre=true", "search.mutation=0.3",
     "labels.target=random", "labels.generations_per_refresh=2", "model.dtype=bfloat16"],
)  # fmt: skip
def test_the_fingerprint_contains_settings_that_labels_depend_on(labeller, nano, tmp_path, setting):
    from evocomp.log import UserError

    labeller("one")
    if setting.startswith("model"):
        from evocomp.mllm.hf import FrozenMLLM

        config = load([], [*TINY, setting])
        with pytest.raises(UserError, match="was made with dtype=float32"):
            build_labeller(config, FrozenMLLM.load("nano", "bfloat16"), load_splits(config.data), tmp_path / "one")
        return
    with pytest.raises(UserError, match="was made with"):
        labeller("one", setting)


@pytest.mark.parametrize(
    "setting", ["labels.batch=3", "labels.passes=1", "optim.lr=1", "eval.kept=[8]", "run_dir=x", "threads=2"]
)
def test_the_fingerprint_contains_no_other_settings(labeller, setting):
    labeller("one")
    labeller("one", setting)


def test_a_lost_round_that_cannot_be_made_again_is_an_error(labeller):
    from evocomp.log import UserError

    one = labeller("one")
    one.ensure(0)
    one.ensure(1)
    one.store.remove(1)
    with pytest.raises(UserError, match="round 1 of label store .* is missing or corrupt.*start a new --run_dir"):
        one.ensure(2)
    assert one.ensure(1) and one.ensure(2)


def test_runs_with_different_context_tokens_share_round_0(labeller):
    settings = ["recipe=plus", "labels.refresh=on_policy", "labels.credit_masks=4"]
    assert labeller("one", *settings, "compressor.sharp=9").rounds.sharp == 9
    assert labeller("one", *settings, "compressor.sharp=5").rounds.sharp == 5


def test_other_weights_change_the_fingerprint(labeller, nano, tmp_path):
    import copy

    from evocomp.log import UserError
    from evocomp.mllm.hf import FrozenMLLM

    labeller("one")
    model = copy.deepcopy(nano.model)
    model.get_output_embeddings().weight[0, 0] += 1
    config = load([], TINY)
    with pytest.raises(UserError, match="was made with weights="):
        build_labeller(config, FrozenMLLM(model, nano.processor, "nano"), load_splits(config.data), tmp_path / "one")


# ------------------------------------------------------------ incomplete or invalid labels


@pytest.fixture
def own_data(tmp_path):
    """Nine records about six images in LLaVA's format."""
    write_scenes(tmp_path / "data", seed=5, count=6)
    records = json.loads((tmp_path / "data" / "data.json").read_text())
    some = [record for number, record in enumerate(records) if number % 4 == 0][:12]
    (tmp_path / "data" / "data.json").write_text(json.dumps(some))
    return tmp_path / "data", some


def test_only_questions_about_broken_images_have_no_label(labeller, own_data, nano, caplog):
    folder, records = own_data
    settings = [f"data.source={folder}"]
    whole = labeller("whole", *settings).ensure(0)
    bad = records[4]["image"]
    (folder / bad).write_bytes((folder / bad).read_bytes()[:-40])
    nano._pictures.clear()
    nano._left_out.clear()
    about = [record["id"] for record in records if record["image"] == bad]
    progress = []
    left = labeller("left", *settings).ensure(0, report=lambda p: progress.append((p.done, p.total)))
    assert progress[-1] == (len(left), len(left))
    assert len(whole) == len(records) and len(left) == len(whole) - len(about)
    for id, record in left.items():
        for name, value in record.items():
            assert np.array_equal(value, whole[id][name], equal_nan=True), name
    assert [m for m in caplog.messages if m.startswith("left out")] == [
        m for id in about for m in caplog.messages if m.startswith(f"left out record {id}: image ")
    ]
    nano._pictures.clear()
    nano._left_out.clear()
    again = labeller("again", *settings)
    assert again.ensure(0).keys() == left.keys()
    assert digest(again.store.path) == digest(labeller("left", *settings).store.path)
    nano._left_out.clear()


def test_a_commit_with_missing_chunks_is_incomplete(labeller):
    one = labeller("one")
    records, before = one.ensure(0), digest(one.store.path)
    path = one.store.path / "round-0000" / "COMMIT.json"
    commit = json.loads(path.read_text())
    for kept in (["0", "1"], []):
        path.write_text(json.dumps({"chunks": {key: commit["chunks"][key] for key in kept}}))
        (one.store.path / "round-0000" / "chunk-000003.safetensors").unlink()
        assert labeller("one").ensure(0).keys() == records.keys()
        assert digest(one.store.path) == before and json.loads(path.read_text()) == commit
    path.write_text(json.dumps({"chunks": {key: commit["chunks"][key] for key in ("0", "2", "3")}}))
    assert not one.store.committed(0), "a gap"


def test_nan_labels_are_not_stored(labeller, monkeypatch):
    one = labeller("one")
    make = one.rounds.make

    def broken(*arguments):
        for record in make(*arguments):
            yield {**record, "best_loss": np.float32("nan")}

    monkeypatch.setattr(one.rounds, "make", broken)
    with pytest.raises(UserError, match=r"label of sample \d+ is not finite \(best_loss\)"):
        one.ensure(0)
    assert not one.store.committed(0) and one.store.stored(0) == []


def test_stored_nan_labels_are_not_read(tmp_path):
    store = LabelStore.open(tmp_path / "s", {})
    store.write(0, 0, [{"id": 5, "credits": np.array([0.1, np.inf], np.float16)}])
    store.commit(0, [0])
    with pytest.raises(UserError, match=r"chunk-000000.safetensors: .*sample 5 .*credits.*delete this file"):
        store.read(0)
    drawn = {"id": 6, "losses": np.full(1, np.nan, np.float32), "evaluations": np.int32(0)}
    store.write(1, 0, [drawn])
    store.commit(1, [0])
    assert 6 in store.read(1), "random labels have no losses"
