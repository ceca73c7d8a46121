import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evocomp.search import random_genomes, stream
from evocomp.search.operators import (
    half_split_crossover,
    pairs,
    resample_mutation,
    shift_mutation,
    truncation,
    uniform_crossover,
)

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=9).map(np.array)
SEEDS = st.integers(0, 2**32)


def test_truncation_takes_the_lowest_and_keeps_order_among_equals():
    population = np.arange(5)[:, None]
    assert truncation(population, np.array([3, 1, 2, 1, 9.0]), 3).ravel().tolist() == [1, 3, 2]


@given(st.integers(2, 12), SEEDS)
def test_pairs_are_two_different_parents(p, seed):
    first, other = pairs(p, stream(seed, 0, 0), 200)
    assert (first != other).all() and min(first.min(), other.min()) >= 0 and max(first.max(), other.max()) < p


def test_pairs_are_uniform_and_one_parent_pairs_with_itself():
    first, other = pairs(3, stream(0, 0, 0), 6000)
    # expected counts of the 6 ordered pairs are 1000; 5 standard deviations are 144
    counts = np.bincount(first * 3 + other, minlength=9)
    assert np.abs(counts[[1, 2, 3, 5, 6, 7]] - 1000).max() < 144
    assert np.array(pairs(1, stream(0, 0, 0), 4)).tolist() == [[0] * 4, [0] * 4]


def test_half_split_takes_first_half_from_one_and_the_rest_from_the_other():
    first, other = np.zeros((1, 5), dtype=int), np.ones((1, 5), dtype=int)
    assert half_split_crossover(first, other, stream(0, 0, 0), 1.0).tolist() == [[0, 0, 1, 1, 1]]
    assert half_split_crossover(first, other, stream(0, 0, 0), 0.0).tolist() == [[0, 0, 0, 0, 0]]
    many = half_split_crossover(first.repeat(10_000, 0), other.repeat(10_000, 0), stream(0, 0, 0), 0.9)
    assert abs(many[:, 4].mean() - 0.9) < 5 * np.sqrt(0.09 / 10_000)


@given(SIZES, SEEDS)
def test_children_hold_only_genes_of_their_parents(sizes, seed):
    rng = stream(seed, 0, 0)
    first, other = random_genomes(sizes, rng, 30), random_genomes(sizes, rng, 30)
    for child in (half_split_crossover(first, other, rng, 0.9), uniform_crossover(first, other, rng)):
        assert ((child == first) | (child == other)).all()


@given(SIZES, SEEDS, st.floats(0, 1))
def test_shift_moves_by_at_most_one_token_within_the_group(sizes, seed, probability):
    rng = stream(seed, 0, 0)
    genomes = random_genomes(sizes, rng, 30)
    shifted = shift_mutation(genomes, sizes, rng, probability)
    assert (np.abs(shifted - genomes) <= 1).all()
    assert (shifted >= 0).all() and (shifted < sizes).all() and shifted.dtype == np.int32


def test_shift_moves_to_previous_and_next_token_equally_often():
    sizes = np.array([3])
    moved = shift_mutation(np.ones((20_000, 1), dtype=np.int32), sizes, stream(0, 0, 0), 0.2)
    left, stay, right = np.bincount(moved.ravel(), minlength=3) / 20_000
    tolerance = 5 * np.sqrt(0.1 * 0.9 / 20_000)
    assert abs(left - 0.1) < tolerance and abs(right - 0.1) < tolerance
    # a move beyond the last token of the group is clipped
    ends = shift_mutation(np.full((20_000, 1), 2, dtype=np.int32), sizes, stream(1, 0, 0), 0.2)
    assert abs((ends == 2).mean() - 0.9) < tolerance


@given(SIZES, SEEDS)
def test_resample_stays_inside_and_leaves_singletons(sizes, seed):
    rng = stream(seed, 0, 0)
    genomes = random_genomes(sizes, rng, 30)
    moved = resample_mutation(genomes, sizes, rng, 1.5)
    assert (moved >= 0).all() and (moved < sizes).all() and moved.dtype == np.int32


def test_resample_changes_the_expected_number_of_groups_to_any_other_token():
    sizes = np.array([1, 4, 4, 4, 4, 4, 1])
    genomes = np.zeros((20_000, 7), dtype=np.int32)
    moved = resample_mutation(genomes, sizes, stream(0, 0, 0), 1.5)
    changed = (moved != 0).sum(1)
    assert abs(changed.mean() - 1.5) < 5 * np.sqrt(5 * 0.3 * 0.7 / 20_000)
    places = np.bincount(moved[:, 2], minlength=4)[1:] / 20_000
    assert np.abs(places - 0.1).max() < 5 * np.sqrt(0.1 * 0.9 / 20_000)
