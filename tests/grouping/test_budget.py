import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.grouping import Groups
from evocomp.grouping.budget import fit_groups
from evocomp.log import UserError


def deviation(points, of):
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    return sum(((points[of == g] - points[of == g].mean(0)) ** 2).sum() for g in set(of.tolist()))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 25), st.integers(1, 8), st.integers(1, 30), st.integers(0, 2**32))
def test_the_number_is_reached_by_splits_or_merges_only(n, present, count, seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 3))
    before = Groups.from_ids(rng.integers(0, present, n))
    after = fit_groups(torch.from_numpy(points), before, count)
    assert after.count == min(count, n)
    pairs = {(a, b) for a, b in zip(before.of.tolist(), after.of.tolist(), strict=True)}
    if after.count >= before.count:  # every new group is a subset of an old one
        assert len(pairs) == after.count
        assert deviation(points, after.of) <= deviation(points, before.of) + 1e-9
    else:
        assert len(pairs) == before.count


def test_the_widest_group_is_split_where_its_two_parts_are():
    # group 0: directions near x and near y; group 1: near z only
    tokens = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0], [9, 1, 0], [0, 1, 9], [1, 9, 0], [0, 0, 5.0]])
    groups = Groups(np.array([0, 1, 0, 0, 1, 0, 1]))
    assert fit_groups(tokens, groups, 3).of.tolist() == [0, 1, 2, 0, 1, 2, 1]


def test_the_smallest_group_joins_the_nearest():
    tokens = torch.tensor([[1, 0.0], [1, 0.1], [0, 1], [0.1, 1], [0.2, 1], [1, 0.5]])
    groups = Groups(np.array([0, 0, 1, 1, 1, 2]))
    assert fit_groups(tokens, groups, 2).of.tolist() == [0, 0, 1, 1, 1, 0]
    assert fit_groups(tokens, groups, 1).of.tolist() == [0] * 6


def test_equal_tokens_and_zero_tokens_are_split_by_index():
    for value in (0.0, 2.0):
        groups = Groups(np.zeros(4, dtype=int))
        assert fit_groups(torch.full((4, 3), value), groups, 2).of.tolist() == [0, 0, 1, 1]


def test_groups_of_the_right_number_are_unchanged(generator):
    groups = Groups.from_ids(np.array([3, 1, 3, 0]))
    assert fit_groups(torch.randn(4, 2, generator=generator), groups, 3).of.tolist() == groups.of.tolist()
    with pytest.raises(UserError):
        fit_groups(torch.ones(4, 2), groups, 0)


def test_a_merged_group_counts_with_all_its_tokens():
    angles = np.radians([0.0, 5.0, 60.0, 70.0, 70.0])
    tokens = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    # group 0 is merged into 1; then 2 is the smallest and is merged into 3
    assert fit_groups(tokens, Groups(np.array([0, 1, 2, 3, 3])), 2).of.tolist() == [0, 0, 1, 1, 1]
