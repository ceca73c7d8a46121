import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evocomp.grouping import Groups

IDS = st.lists(st.integers(-3, 6), min_size=1, max_size=25)


def test_ids_are_numbered_by_first_appearance():
    groups = Groups.from_ids(np.array([31999, 5, 31999, 7, 5, 5]))
    assert groups.of.tolist() == [0, 1, 0, 2, 1, 1]
    assert groups.count == 3
    assert groups.sizes.tolist() == [2, 3, 1]
    assert groups.members.tolist() == [[0, 2, -1], [1, 4, 5], [3, -1, -1]]
    assert groups.kept(np.array([[1, 2, 0], [0, 0, 0]])).tolist() == [[2, 3, 5], [0, 1, 3]]


@given(IDS)
def test_partition_covers_every_token_once(ids):
    groups = Groups.from_ids(np.array(ids))
    seen = {}
    expected = [seen.setdefault(id, len(seen)) for id in ids]  # brute force
    assert groups.of.tolist() == expected
    for g in range(groups.count):
        mine = [i for i, e in enumerate(expected) if e == g]
        assert [i for i in groups.members[g].tolist() if i >= 0] == mine
        assert groups.sizes[g] == len(mine)
        assert [groups.places[i] for i in mine] == list(range(len(mine)))


@given(IDS, st.integers(0, 2**32 - 1))
def test_kept_takes_the_chosen_member_of_every_group(ids, seed):
    groups = Groups.from_ids(np.array(ids))
    genomes = np.random.default_rng(seed).integers(0, groups.sizes, size=(4, groups.count))
    kept = groups.kept(genomes)
    for genome, tokens in zip(genomes, kept, strict=True):
        assert tokens.tolist() == sorted(groups.members[g][place] for g, place in enumerate(genome))
    assert np.array_equal(groups.genomes(kept), genomes)
    assert np.array_equal(groups.kept(genomes[0]), kept[0])


def test_not_compact_ids_are_refused():
    for ids in ([1, 0], [0, 2], [0, -1], []):
        with pytest.raises(AssertionError):
            Groups(np.array(ids, dtype=int))


def test_groups_do_not_change_with_the_callers_array():
    ids = np.array([0, 1, 1])
    groups = Groups(ids)
    ids[0] = 1
    assert groups.of.tolist() == [0, 1, 1]
    with pytest.raises(ValueError):
        groups.of[0] = 1


def test_genomes_refuses_a_mask_that_leaves_a_group_out():
    with pytest.raises(AssertionError):
        Groups(np.array([0, 1, 1])).genomes(np.array([1, 2]))
