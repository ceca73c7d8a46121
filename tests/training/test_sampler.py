from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evocomp.training.sampler import ResumableSampler, Slots, epoch_order

sizes = st.integers(1, 60)


@given(sizes, st.integers(1, 5))
def test_ranks_share_an_epoch_evenly(count, world):
    parts = [list(ResumableSampler(count, rank, world)) for rank in range(world)]
    assert {len(part) for part in parts} == {count // world} == {len(ResumableSampler(count, 0, world))}
    # in step s the ranks have the indices s * world .. s * world + world - 1
    assert [p for step in zip(*parts, strict=True) for p in step] == list(range(count // world * world))


@given(sizes, st.integers(1, 4), st.integers(0, 20))
def test_resuming_gives_what_is_left_and_the_next_epoch_all(count, world, steps):
    consumed = min(steps, count // world) * world
    for rank in range(world):
        sampler = ResumableSampler(count, rank, world)
        whole = list(sampler)
        sampler.consumed = consumed
        assert list(sampler) == whole[consumed // world :]
        assert list(sampler) == whole


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=20, unique=True), sizes, st.integers(0, 5))
def test_an_epoch_is_one_shuffle_after_another(ids, count, epoch):
    order = epoch_order(ids, seed=1, epoch=epoch, count=count).tolist()
    assert len(order) == count
    for start in range(0, count, len(ids)):
        part = order[start : start + len(ids)]
        assert len(set(part)) == len(part) and set(part) <= set(ids)
    seen = Counter(order)
    assert max(seen.values()) - min(seen.get(id, 0) for id in ids) <= 1
    assert order == epoch_order(ids[::-1], seed=1, epoch=epoch, count=count).tolist()


def test_epochs_and_seeds_differ_and_stay_what_they_are():
    ids = list(range(50))
    orders = [epoch_order(ids, seed, epoch, 50).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]
    # expected values: a checkpoint of one version must resume with the same samples in the next
    assert epoch_order([5, 6, 7, 8], seed=0, epoch=1, count=6).tolist() == [7, 5, 6, 8, 6, 7]


def test_slots_are_their_positions():
    assert [Slots(4)[i] for i in range(len(Slots(4)))] == [0, 1, 2, 3]
    assert isinstance(epoch_order([1], 0, 0, 1), np.ndarray)
