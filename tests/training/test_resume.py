"""Small runs of both recipes: after a stop or a crash, resuming gives exactly the same weights."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from evocomp.compressor.model import EvoCompCompressor
from evocomp.config.load import load
from evocomp.labels import build as labelling
from evocomp.labels.labeller import Interrupted
from evocomp.labels.store import LabelStore
from evocomp.log import UserError
from evocomp.mllm.hf import FrozenMLLM
from evocomp.runs.claims import DONE
from evocomp.scoring.scorer import CandidateScorer
from evocomp.training import build
from evocomp.training.build import check_trainer, run
from evocomp.training.module import CompressorModule
from evocomp.training.monitors import SelectionAccuracy
from evocomp.training.optim import learning_rate

EPOCHS = 4
TINY = [
    "recipe=published",
    # explicit, so that compared runs do not depend on a measurement
    "labels.dtype=model",
    "optim.muon_dtype=bfloat16",
    "data.max_samples=16",
    "data.val_samples=6",
    "data.test_samples=0",
    "labels.chunk_size=8",
    "labels.passes=2",
    "search.population=12",
    "search.parents=4",
    "search.generations=1",
    "optim.batch_size=8",
    "optim.warmup_steps=2",
    "eval.kept=[16,4]",
    "logger=none",
    "threads=1",
    "trainer.accelerator=cpu",
    f"trainer.max_epochs={EPOCHS}",
]
PLUS = [
    "recipe=plus",
    "labels.target=credit",
    "labels.refresh=on_policy",
    "labels.refresh_start=2",
    "labels.credit_masks=16",
    "labels.proposals=6",
    "labels.samples_per_refresh=12",
    "labels.flat=0.001",
    "compressor.budget_input=true",
    "loss.name=listwise",
    "optim.ema=0.9",
]


class Steps:
    """Records the batch of each training step; can call a function in the middle of a given step."""

    def __init__(self, monkeypatch):
        self.seen: list[tuple] = []
        self.at: dict[int, object] = {}
        original = CompressorModule.training_step

        def step(module, batch, batch_index):
            loss = original(module, batch, batch_index)
            number = module.global_step
            kind = "populations" if batch.populations else "targets"
            self.seen.append((module.current_epoch, batch.round, kind, tuple(batch.ids), float(loss.detach())))
            self.at.get(number, lambda: None)()
            return loss

        monkeypatch.setattr(CompressorModule, "training_step", step)


@pytest.fixture(scope="module")
def shared_mllm(nano):
    """Load the MLLM once for all runs, because it never changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "load_mllm", lambda config: FrozenMLLM(nano.model, nano.processor, "nano"))
        yield


@pytest.fixture
def steps(monkeypatch, shared_mllm):
    return Steps(monkeypatch)


def config(folder, *settings):
    return load([], [*TINY, f"run_dir={folder}", *settings])


@pytest.fixture(scope="module", params=["published", "plus"])
def whole(request, tmp_path_factory, shared_mllm):
    """(settings, folder, steps) of an uninterrupted run."""
    settings = PLUS if request.param == "plus" else []
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch)
        assert run(config(folder, *settings)) is True
    return settings, folder, steps.seen


def weights(folder) -> dict[str, torch.Tensor]:
    return EvoCompCompressor.from_pretrained(folder / "compressor").state_dict()


def assert_same_weights(one, other) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


# ------------------------------------------------------------ a run


def test_every_batch_is_of_the_round_of_its_epoch(whole):
    settings, folder, seen = whole
    assert [step[0] for step in seen] == [epoch for epoch in range(EPOCHS) for _ in range(4)]
    rounds = {epoch: {step[1] for step in seen if step[0] == epoch} for epoch in range(EPOCHS)}
    kinds = {epoch: {step[2] for step in seen if step[0] == epoch} for epoch in range(EPOCHS)}
    if settings:
        assert rounds == {0: {0}, 1: {0}, 2: {1}, 3: {2}}
        assert kinds == {0: {"targets"}, 1: {"targets"}, 2: {"populations"}, 3: {"populations"}}
    else:
        assert rounds == {epoch: {epoch} for epoch in range(EPOCHS)} and set.union(*kinds.values()) == {"targets"}
        for epoch in range(EPOCHS):
            ids = [id for step in seen if step[0] == epoch for id in step[3]]
            assert sorted(ids) == sorted(2 * list(set(ids))) and len(ids) == 32


def test_what_lies_in_the_folder(whole):
    settings, folder, seen = whole
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "labels", "checkpoints", "compressor", DONE}
    assert load([folder / "config.yaml"]) == config(folder, *settings)
    done = json.loads((folder / DONE).read_text())
    assert (done["steps"], done["epochs"]) == (len(seen), EPOCHS)
    assert done["cost"]["labelled"] == 16 and done["cost"]["labelling"]["forwards"] > 0
    compressor = EvoCompCompressor.from_pretrained(folder / "compressor")
    assert compressor.config.base_model_name_or_path == "nano" and compressor.config.keep == 16
    assert compressor.config.metadata["recipe"] == ("plus" if settings else "published")
    stored = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)
    assert all(key.startswith("compressor.") for key in stored["state_dict"])


def test_what_is_saved_is_what_was_trained(whole):
    settings, folder, _ = whole
    stored = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    for key, value in weights(folder).items():
        assert torch.equal(value, stored[f"compressor.{key}"]), key


def test_old_rounds_are_deleted_and_no_refresh_lost_a_best(whole):
    settings, folder, _ = whole
    store = LabelStore(folder / "labels")
    if settings:
        assert store.rounds() == [0, 1, 2]
        return
    assert store.rounds() == [0, 2, 3]  # round 0, the current round and the one from which it was made
    first, before, last = (store.read(round) for round in (0, 2, 3))
    for id in first:
        assert last[id]["best_loss"] <= before[id]["best_loss"] <= first[id]["best_loss"]
        assert last[id]["full_loss"] == first[id]["full_loss"]


def test_a_finished_run_is_left_alone(whole, steps):
    settings, folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(config(folder, *settings)) is False
    # settings that may change between starts
    assert run(config(folder, *settings, "threads=2", "trainer.max_epochs=9")) is False
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before and steps.seen == []


def test_without_refreshes_and_with_a_number_of_steps(steps, tmp_path, monkeypatch):
    """The schedule covers the whole run, and accuracy is measured after the last epoch, even if that is cut short."""
    rates, measured = [], []
    step, count = CompressorModule.training_step, SelectionAccuracy.right_answers
    monkeypatch.setattr(
        CompressorModule,
        "training_step",
        lambda module, *batch: rates.append(module.optimizers().param_groups[0]["lr"]) or step(module, *batch),
    )
    monkeypatch.setattr(
        SelectionAccuracy, "right_answers", lambda self, *rest: measured.append(len(rates)) or count(self, *rest)
    )
    settings = ["labels.refresh=none", "labels.refresh_start=1", "eval.monitor_every=4", "trainer.max_steps=6"]
    mine = config(tmp_path / "run", *PLUS, *settings)
    run(mine)
    assert rates == pytest.approx([mine.optim.lr * learning_rate(number, 6, 2, mine.optim.flat) for number in range(6)])
    assert measured == [6]


def test_passes_and_costs_are_of_the_questions_that_are_labelled(steps, tmp_path):
    settings = ["labels.credit_samples=4", "labels.refresh=none", "trainer.max_epochs=2", "data.val_samples=0"]
    run(config(tmp_path / "run", *PLUS, *settings))
    for epoch in range(2):
        ids = [id for step in steps.seen if step[0] == epoch for id in step[3]]
        assert len(set(ids)) == 4 and sorted(ids) == sorted(2 * list(set(ids)))
    assert json.loads((tmp_path / "run" / DONE).read_text())["cost"]["labelled"] == 4


# ------------------------------------------------------------ resuming


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_in_mid_epoch_costs_no_step(whole, steps, tmp_path, recwarn):
    settings, folder, seen = whole
    handler = signal.getsignal(signal.SIGTERM)
    steps.at[10] = stop  # in the third epoch, after a refresh
    with pytest.raises(Interrupted, match="resume from this step"):
        run(config(tmp_path / "run", *settings))
    assert steps.seen == seen[:11]
    assert not (tmp_path / "run" / DONE).exists() and not (tmp_path / "run" / "compressor").exists()
    steps.at.clear()
    steps.seen.clear()
    assert run(config(tmp_path / "run", *settings)) is True
    assert steps.seen == seen[11:]
    assert_same_weights(folder, tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is handler
    # Lightning's warning about resuming does not apply
    assert not [w for w in recwarn if "resum" in str(w.message) or "Checkpoint directory" in str(w.message)]


def test_a_crash_in_mid_epoch_costs_that_epochs_steps(whole, steps, tmp_path):
    settings, folder, seen = whole

    def crash():
        raise ZeroDivisionError("a bug")

    steps.at[10] = crash
    with pytest.raises(ZeroDivisionError):
        run(config(tmp_path / "run", *settings))
    steps.at.clear()
    steps.seen.clear()
    assert run(config(tmp_path / "run", *settings)) is True
    assert steps.seen == seen[8:]
    assert_same_weights(folder, tmp_path / "run")


def test_a_crash_where_epochs_are_cut_short_costs_no_more(steps, tmp_path):
    """The next epoch starts with its first question, although the previous one did not use all questions."""
    settings = ["labels.refresh=none", "trainer.limit_train_batches=2", "trainer.max_epochs=2", "data.val_samples=0"]
    run(config(tmp_path / "whole", *settings))
    whole = list(steps.seen)
    assert [step[0] for step in whole] == [0, 0, 1, 1]

    def crash():
        raise ZeroDivisionError("a bug")

    steps.at[2] = crash
    with pytest.raises(ZeroDivisionError):
        run(config(tmp_path / "run", *settings))
    steps.at.clear()
    steps.seen.clear()
    run(config(tmp_path / "run", *settings))
    assert steps.seen == whole[2:]


def test_a_crash_between_labels_and_their_epoch_costs_nothing(whole, steps, tmp_path, monkeypatch):
    settings, folder, seen = whole
    commit, made = LabelStore.commit, []

    def crash_after(store, round, chunks, *samples):
        commit(store, round, chunks, *samples)
        made.append(round)
        if len(made) == 2:  # the first refresh is complete, but its epoch has not started
            raise ZeroDivisionError("a bug")

    monkeypatch.setattr(LabelStore, "commit", crash_after)
    with pytest.raises(ZeroDivisionError):
        run(config(tmp_path / "run", *settings))
    done = len(steps.seen)
    assert steps.seen == seen[:done] and done in (4, 8)
    assert run(config(tmp_path / "run", *settings)) is True
    assert steps.seen == seen
    assert made == sorted(set(made))  # no round was made twice
    assert_same_weights(folder, tmp_path / "run")


def test_rounds_are_kept_as_long_as_a_checkpoint_needs_them(steps, tmp_path, whole):
    settings, _, _ = whole
    if settings:
        pytest.skip("one recipe will do")
    mine = config(tmp_path / "run", "trainer.max_epochs=6")
    old = tmp_path / "run" / "checkpoints" / "mine.ckpt"
    steps.at[8] = lambda: shutil.copy(old.with_name("last.ckpt"), old)  # of the second epoch: round 1
    run(mine)
    store = LabelStore(tmp_path / "run" / "labels")
    assert store.rounds() == [0, 1, 2, 3, 4, 5]
    assert int(torch.load(old, weights_only=False)["callbacks"]["RefreshLabels"]["round"]) == 1


def test_sigterm_in_a_refresh_goes_on_with_that_refresh(whole, steps, tmp_path, monkeypatch):
    settings, folder, seen = whole
    score = CandidateScorer._in_parts

    def stop_later(self, *arguments, **options):
        if len(steps.seen) == 8:  # after two epochs: these masks are from a refresh
            stop()
        return score(self, *arguments, **options)

    monkeypatch.setattr(CandidateScorer, "_in_parts", stop_later)
    with pytest.raises(Interrupted):
        run(config(tmp_path / "run", *settings))
    monkeypatch.setattr(CandidateScorer, "_in_parts", score)
    assert steps.seen == seen[:8]
    steps.seen.clear()
    assert run(config(tmp_path / "run", *settings)) is True
    assert steps.seen == seen[8:]
    assert_same_weights(folder, tmp_path / "run")
    stores = [LabelStore(f / "labels") for f in (folder, tmp_path / "run")]
    assert stores[0].rounds() == stores[1].rounds()
    assert [stores[0].digest(r) for r in stores[0].rounds()] == [stores[1].digest(r) for r in stores[1].rounds()]


def test_labels_made_before_are_used(steps, tmp_path, whole):
    """`evocomp label` first, then `evocomp train` into the same folder."""
    settings, folder, seen = whole
    mine = config(tmp_path / "run", *settings)
    build.label_only(mine)
    before = LabelStore(tmp_path / "run" / "labels").digest(0)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "labels" / "round-0000").iterdir()}
    steps.at[0] = stop
    with pytest.raises(Interrupted):
        run(mine)
    assert steps.seen == seen[:1]
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "labels" / "round-0000").iterdir()} == stamps
    assert before == LabelStore(folder / "labels").digest(0)


OTHER = [*PLUS, "optim.lr=0.02", "compressor.use_text=false"]
"""Another compressor from the same first round of labels: what it proposes itself is not what PLUS proposes."""


@pytest.fixture
def alone(steps, tmp_path):
    """Batches of the run OTHER with its own label store."""
    assert run(config(tmp_path / "alone", *OTHER)) is True
    seen, steps.seen = steps.seen, []
    return seen


def test_runs_that_share_a_store_share_no_round_of_their_compressors(steps, alone, tmp_path):
    store = f"labels.dir={tmp_path / 'store'}"
    assert run(config(tmp_path / "one", *PLUS, store)) is True
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("chunk-*")}
    steps.seen.clear()
    assert run(config(tmp_path / "other", *OTHER, store)) is True
    assert steps.seen == alone
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in made.items())
    assert sorted(path.name.split("-")[1] for path in (tmp_path / "store").glob("refreshed-*")) == ["one", "other"]


def test_a_run_begun_anew_takes_no_round_of_the_one_that_was_there(steps, alone, tmp_path):
    folder = tmp_path / "run"
    assert run(config(folder, *PLUS)) is True
    steps.seen.clear()
    for entry in folder.iterdir():
        if entry.name != "labels":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    assert run(config(folder, *OTHER)) is True
    assert steps.seen == alone


def test_a_checkpoint_that_was_cut_short_gives_way_to_the_one_before(steps, whole, tmp_path, caplog):
    settings, folder, seen = whole
    steps.at[5] = stop
    with pytest.raises(Interrupted):
        run(config(tmp_path / "run", *settings))
    steps.at.clear()
    steps.seen.clear()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    (before,) = (path for path in last.parent.glob("*.ckpt") if path != last)
    last.write_bytes(last.read_bytes()[:1000])
    with caplog.at_level("WARNING", "evocomp"):
        assert run(config(tmp_path / "run", *settings)) is True
    assert steps.seen == seen[-len(steps.seen) :] and before.name in caplog.text
    assert_same_weights(folder, tmp_path / "run")


def test_no_readable_checkpoint_is_one_line(steps, tmp_path):
    steps.at[5] = stop
    with pytest.raises(Interrupted):
        run(config(tmp_path / "run"))
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"")
    refused(config(tmp_path / "run"), "no checkpoint in .* is readable; restore one, or start again")


def test_control_c_in_training_is_an_interruption_and_the_next_one_too(steps, whole, tmp_path):
    settings, folder, seen = whole
    steps.at[3] = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path / "run", *settings))
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    steps.at.clear()
    assert run(config(tmp_path / "run", *settings)) is True
    assert_same_weights(folder, tmp_path / "run")


def test_a_finished_run_is_judged_as_asked_and_trained_no_further(whole, tmp_path, caplog):
    settings, folder, _ = whole
    shutil.copytree(folder, tmp_path / "run")
    with caplog.at_level("WARNING", "evocomp"):
        assert run(config(tmp_path / "run", *settings, "eval.kept=[7]")) is True
        assert not caplog.text
        assert run(config(tmp_path / "run", *settings, "eval.kept=[7]", "trainer.max_epochs=9")) is False
    assert load([tmp_path / "run" / "config.yaml"], []).eval.kept == (7,)
    assert "max_epochs" in caplog.text and "requested 9" in caplog.text


# ------------------------------------------------------------ errors


def test_two_jobs_in_one_folder_are_refused(steps, tmp_path):
    mine = config(tmp_path / "run")
    steps.at[1] = lambda: refused(mine, "another process is training in")
    assert run(mine) is True


def test_a_dry_run_does_not_count_as_the_run(tmp_path, shared_mllm):
    refused(config(tmp_path / "run", "trainer.fast_dev_run=true"), "use --trainer.max_epochs=1")
    assert not (tmp_path / "run").exists()


def refused(mine, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        run(mine)
    assert "\n" not in str(caught.value)


def test_a_folder_with_other_files_is_refused(steps, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    refused(config(tmp_path), "holds other files; choose a new or empty folder")
    refused(config(tmp_path / "thesis.tex"), "thesis.tex is a file; give a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("data.source=nowhere", "data.source=nowhere: no such file or folder"),
        ("eval.kept=[8,145]", "eval.kept=145 is more than the 144 visual tokens of an image"),
        ("model.name=nowhere", "model.name=nowhere does not load"),
        ("search.population=4", "fewer parents than candidates"),
        ("trainer.max_epoch=3", r"unknown setting trainer.max_epoch; did you mean trainer.max_epochs\?"),
        ("trainer.accelerator=gpux", "trainer: .*gpux"),
        ("trainer.max_epochs=x", "trainer.max_epochs=x: must be a whole number"),
    ],
)
def test_a_mistake_can_be_put_right_in_the_same_folder(steps, tmp_path, monkeypatch, setting, match):
    if setting.startswith("model"):
        monkeypatch.setattr(build, "load_mllm", lambda config: FrozenMLLM.load(config.model.name))
    refused(config(tmp_path / "run", setting), match)
    # the folder was not claimed, so the corrected command is not refused for other settings
    assert not (tmp_path / "run" / "config.yaml").exists()
    if setting.startswith("search"):
        assert not (tmp_path / "run" / "labels").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"typo": 1}, "unknown setting trainer.typo; see the arguments of lightning.Trainer"),
        ({"device": 1}, r"unknown setting trainer.device; did you mean trainer.devices\?"),
        ({"default_root_dir": "x"}, "trainer.default_root_dir is set by the run itself; see --run_dir"),
        ({"logger": False}, r"trainer.logger: False is no \{class_path: .*; to log nothing, give --logger=none"),
        ({"callbacks": "EarlyStopping"}, r"trainer.callbacks: 'EarlyStopping' is no \{class_path"),
    ],
)
def test_trainer_settings_are_checked_against_lightnings_signature(settings, match):
    with pytest.raises(UserError, match=match):
        check_trainer(settings)
    assert check_trainer({"max_epochs": 3, "precision": "bf16-mixed"}) == {"max_epochs": 3, "precision": "bf16-mixed"}


def test_features_that_do_not_fit_on_the_disk_are_refused(steps, tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr(labelling.shutil, "disk_usage", lambda path: free)
    mine = config(tmp_path / "run", f"model.feature_cache={tmp_path}/features")
    refused(mine, "100 kB are free; choose a folder on a larger disk")
    assert not (tmp_path / "run").exists()


def test_too_few_questions_for_a_batch(steps, tmp_path):
    mine = config(tmp_path / "run", "optim.batch_size=64")
    refused(mine, "32 training questions are too few for a batch of optim.batch_size=64")


def test_seeds_matter(steps, whole, tmp_path):
    settings, folder, seen = whole
    steps.at[1] = stop
    with pytest.raises(Interrupted):
        run(config(tmp_path / "run", *settings, "seed=1"))
    assert steps.seen[0][3] != seen[0][3] and np.isfinite(steps.seen[0][4])
