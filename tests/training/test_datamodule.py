"""Loader workers return indices; the main process joins samples and labels of the current round."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evocomp import distributed
from evocomp.log import UserError
from evocomp.training.batch import TrainBatch
from evocomp.training.datamodule import LabelledQuestions
from evocomp.training.sampler import epoch_order


def records(questions, round: int) -> dict:
    """Records whose label in round r is token r."""
    return {e.id: {"id": e.id, "kept": np.array([round], np.uint16)} for e in questions}


@pytest.fixture
def data(nano, questions):
    def build(workers: int = 0, count: int = 10, **options) -> LabelledQuestions:
        return LabelledQuestions(nano, questions[:10], 4, count, workers=workers, **options)

    return build


def epoch(data: LabelledQuestions, loader) -> list[TrainBatch]:
    return [data.on_before_batch_transfer(batch, 0) for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_are_of_the_round_that_holds_now(data, questions, workers):
    """Persistent workers start and prefetch before the later rounds exist."""
    one = data(workers)
    loader = one.train_dataloader()
    assert loader.num_workers == workers and loader.persistent_workers == (workers > 0)
    for number, round in enumerate((0, 1, 7)):
        one.use(round, records(questions[:10], round), epoch=number)
        batches = epoch(one, loader)
        assert [batch.round for batch in batches] == [round, round]
        for batch in batches:
            assert batch.targets.argmax(1).tolist() == [round] * 4 and batch.targets.sum() == 4
        ids = [id for batch in batches for id in batch.ids]
        assert ids == epoch_order([e.id for e in questions[:10]], 0, number, 10)[:8].tolist()
    if workers:
        for worker in loader._iterator._workers:
            assert worker.pid != os.getpid()


def test_features_and_labels_belong_to_their_ids(data, questions, nano):
    one = data()
    own = {e.id: {"id": e.id, "kept": np.array([place], np.uint16)} for place, e in enumerate(questions[:10])}
    one.use(0, own, 0)
    by_id = {e.id: f for e, f in zip(questions[:10], nano.features(questions[:10]), strict=True)}
    for batch in epoch(one, one.train_dataloader()):
        for row, id in enumerate(batch.ids):
            assert torch.equal(batch.inputs.visual[row], by_id[id].visual)
            assert batch.targets[row].nonzero()[:, 0].tolist() == own[id]["kept"].tolist()
            text = nano.prompt_embeds(by_id[id])
            assert torch.equal(batch.inputs.prompt[row, : len(text)], text)


def test_samples_without_a_record_do_not_come_up(data, questions):
    one = data(count=12)
    labelled = records(questions[2:5], 0)
    one.use(0, labelled, 0)
    ids = [id for batch in epoch(one, one.train_dataloader()) for id in batch.ids]
    assert set(ids) == set(labelled) and len(ids) == 12


def test_a_round_without_labels_and_an_epoch_without_a_batch_are_told(data):
    with pytest.raises(UserError, match="round 3 of the label store has no usable label"):
        data().use(3, {}, 0)
    with pytest.raises(UserError, match="3 training questions are too few for a batch of optim.batch_size=4"):
        data(count=3).train_dataloader()


def test_a_resumed_loader_begins_where_it_was(data, questions):
    one = data(count=16)
    one.use(0, records(questions[:10], 0), epoch=2)
    whole = [batch.ids for batch in epoch(one, one.train_dataloader())]
    again = data(count=16)
    again.use(0, records(questions[:10], 0), epoch=2)
    again.load_state_dict({"epoch": 2, "consumed": 8, "batches": 2})
    loader = again.train_dataloader()
    assert [batch.ids for batch in epoch(again, loader)] == whole[2:]
    assert [batch.ids for batch in epoch(again, loader)] == whole  # the next epoch is complete


def processed(one: LabelledQuestions, batches: int, of: float = float("inf")) -> dict[str, int]:
    """State of the datamodule in a checkpoint after a number of batches of an epoch."""
    progress = SimpleNamespace(current=SimpleNamespace(processed=batches))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    one.trainer = SimpleNamespace(fit_loop=loop, num_training_batches=of)
    return one.state_dict()


def test_a_resume_by_fewer_processes_counts_its_own_epoch_only(data, questions, monkeypatch):
    first, again = data(count=96), data(count=96)
    for one in (first, again):
        one.use(0, records(questions[:10], 0), epoch=1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    state = processed(first, 5)
    assert state == {"epoch": 1, "consumed": 40, "batches": 5}
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    again.load_state_dict(state)
    assert processed(again, 7)["consumed"] == 40 + 2 * 4
    again.use(0, records(questions[:10], 0), epoch=2)
    assert [processed(again, batches)["consumed"] for batches in (3, 8)] == [12, 32]


def test_an_epoch_that_is_cut_short_is_over(data, questions):
    one = data(count=32)
    one.use(0, records(questions[:10], 0), epoch=0)
    assert [processed(one, batches, of=2)["consumed"] for batches in (1, 2)] == [4, 0]


def test_batches_move_with_all_that_they_hold(data, questions):
    one = data()
    one.use(0, records(questions[:10], 0), 0)
    (batch, *_) = epoch(one, one.train_dataloader())
    moved = one.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved.inputs.visual.device.type == moved.targets.device.type == "meta"
    assert moved.ids == batch.ids and moved.round == batch.round
    assert moved.inputs.visual_mask is None
