import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evocomp.grouping import Groups
from evocomp.search import random_genomes, seed_genomes, stream
from evocomp.search.genome import sample_genomes


def test_golden_numbers_of_the_stream():
    # made with numpy 2.4; a change here means that stored labels cannot be continued with the same numbers
    assert stream(0, 1, 2).random(4).tolist() == [
        0.049180535487069243,
        0.0359979233362423,
        0.8178077791884294,
        0.13768857463324724,
    ]
    words = stream(7, 123456, 3).integers(0, 2**64, size=2, dtype=np.uint64)
    assert words.tolist() == [506253685230441376, 8960992193728473773]


def test_streams_differ_by_seed_sample_and_round():
    firsts = {stream(s, i, r).random() for s in range(3) for i in range(3) for r in range(3)}
    assert len(firsts) == 27


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**32))
def test_random_genomes_stay_inside_the_groups(sizes, seed):
    genomes = random_genomes(np.array(sizes), stream(seed, 0, 0), 20)
    assert genomes.shape == (20, len(sizes)) and genomes.dtype == np.int32
    assert (genomes >= 0).all() and (genomes < np.array(sizes)).all()


def test_random_genomes_are_uniform():
    genomes = random_genomes(np.array([4, 3]), stream(0, 0, 0), 12_000)
    # expected counts are 3000 and 4000 per token; 5 standard deviations are 237 and 258
    assert np.abs(np.bincount(genomes[:, 0], minlength=4) - 3000).max() < 237
    assert np.abs(np.bincount(genomes[:, 1], minlength=3) - 4000).max() < 258


def test_seed_genomes_follow_the_softmax_inside_each_group():
    groups = Groups(np.array([0, 1, 0, 1, 1, 2, 0]))
    scores = np.array([0.0, 2.0, 1.0, -1.0, 0.5, 9.0, -np.inf])
    temperature = 0.7
    count = 20_000
    kept = groups.kept(seed_genomes(groups, scores, stream(1, 0, 0), count, temperature))
    frequency = np.bincount(kept.ravel(), minlength=7) / count
    for members in ([0, 2, 6], [1, 3, 4], [5]):
        weight = np.exp(scores[members] / temperature)
        expected = weight / weight.sum()
        sigma = np.sqrt(expected * (1 - expected) / count)
        assert (np.abs(frequency[members] - expected) <= 5 * sigma + 1e-12).all()


def test_seed_genomes_at_low_temperature_take_the_best_token_of_each_group():
    groups = Groups(np.array([0, 0, 1, 1, 1]))
    scores = np.array([1000.0, 1001, -5, -1, -3])
    genomes = seed_genomes(groups, scores, stream(0, 0, 0), 50, temperature=1e-3)
    assert (genomes == [1, 1]).all()


def test_seed_genomes_work_for_many_groups():
    # the group's index is added to the probabilities: rounding must not move a draw into the next group
    groups = Groups(np.repeat(np.arange(2000), 3))
    genomes = seed_genomes(groups, np.zeros(6000), stream(0, 0, 0), 30)
    assert genomes.min() == 0 and genomes.max() == 2
    assert abs(genomes.mean() - 1) < 0.02


def test_temperature_must_be_positive():
    with pytest.raises(AssertionError):
        seed_genomes(Groups(np.array([0])), np.zeros(1), stream(0, 0, 0), 1, temperature=0)


def test_a_token_of_weight_zero_is_never_drawn():
    class Zeros:
        def random(self, shape):
            return np.zeros(shape)

    groups = Groups(np.array([0, 0, 1, 1, 1]))
    odds = np.array([0.0, 1.0, 0.0, 0.0, 2.0])
    assert sample_genomes(odds, groups, Zeros(), 1).tolist() == [[1, 2]]
    assert (sample_genomes(odds, groups, stream(0, 0, 0), 200) == [1, 2]).all()
