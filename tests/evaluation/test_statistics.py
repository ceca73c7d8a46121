import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evocomp.evaluation.statistics import (
    EXACT_UP_TO,
    ImageBootstrap,
    compression_hard,
    loyalty,
    mcnemar,
    retention_above_chance,
    sign_flip,
    spread,
)


def test_interval_of_independent_questions_has_the_binomial_standard_error():
    rng = np.random.default_rng(0)
    right = rng.random(900) < 0.7
    drawn = ImageBootstrap(range(900), resamples=20000, seed=1).means(right)
    expected = math.sqrt(right.mean() * (1 - right.mean()) / 900)
    # the standard error of a standard deviation from 20,000 draws is 0.5 %
    assert drawn.std() == pytest.approx(expected, rel=0.02)
    result = ImageBootstrap(range(900), resamples=20000, seed=1).interval(right)
    assert result.mean == right.mean()
    assert result.low == pytest.approx(right.mean() - 1.96 * expected, abs=0.002)
    assert result.high == pytest.approx(right.mean() + 1.96 * expected, abs=0.002)


def test_agreeing_questions_of_a_picture_widen_the_interval_by_the_design_effect():
    rng = np.random.default_rng(0)
    per_picture, pictures = 9, 200
    right = np.repeat(rng.random(pictures) < 0.6, per_picture)
    images = np.repeat(np.arange(pictures), per_picture)
    clustered = ImageBootstrap(images, resamples=8000).means(right).std()
    independent = ImageBootstrap(range(len(right)), resamples=8000).means(right).std()
    # all nine answers are equal, so an image counts as one question: the error is sqrt(9) times as large
    assert clustered / independent == pytest.approx(3.0, rel=0.05)


def test_every_resample_of_two_pictures_is_one_of_the_three_possible():
    # images with 1 and 3 questions: a resample has one of them twice, or both
    values = np.array([1.0, 0.0, 0.5, 1.0])
    drawn = ImageBootstrap(["a", "b", "b", "b"], resamples=4000, seed=3).means(values)
    outcomes, counts = np.unique(drawn.round(12), return_counts=True)
    np.testing.assert_allclose(outcomes, [0.5, 0.625, 1.0])
    np.testing.assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)


def test_columns_share_resamples_and_chunks_do_not_change_them(monkeypatch):
    rng = np.random.default_rng(0)
    scores, images = rng.random((60, 3)), rng.integers(0, 20, 60)
    bootstrap = ImageBootstrap(images, resamples=50, seed=5)
    together = bootstrap.means(scores)
    assert together.shape == (50, 3)
    for column in range(3):
        np.testing.assert_allclose(together[:, column], bootstrap.means(scores[:, column]), rtol=1e-12)
    monkeypatch.setattr("evocomp.evaluation.statistics._CHUNK", 7 * len(set(images.tolist())))
    np.testing.assert_allclose(bootstrap.means(scores), together, rtol=1e-12)


def test_seed_decides_and_image_names_do_not():
    right = np.random.default_rng(0).random(40) < 0.5
    images = [f"picture-{i // 4}" for i in range(40)]
    first = ImageBootstrap(images, 100, seed=1).means(right)
    np.testing.assert_array_equal(first, ImageBootstrap([i // 4 for i in range(40)], 100, seed=1).means(right))
    assert not np.array_equal(first, ImageBootstrap(images, 100, seed=2).means(right))


def test_paired_difference_against_the_interval_of_the_two_columns():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 50, 400)
    second = (rng.random(400) < 0.55).astype(float)
    first = np.where(rng.random(400) < 0.1, 1 - second, second)
    bootstrap = ImageBootstrap(images, 2000, seed=2)
    result = bootstrap.difference(first, second)
    drawn = bootstrap.means(first) - bootstrap.means(second)
    assert result.mean == pytest.approx(first.mean() - second.mean())
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))))
    against = min((drawn < 1e-12).sum(), (drawn > -1e-12).sum())
    assert 5 < against < 1000  # the p value is neither 0 nor 1
    assert result.p == pytest.approx(2 * (against + 1) / 2001)
    assert bootstrap.difference(np.ones(400), np.zeros(400)).p == pytest.approx(2 / 2001)


def test_p_of_no_difference_is_uniform_enough_and_of_identical_answers_is_one():
    rng = np.random.default_rng(0)
    same = rng.random(30) < 0.5
    assert ImageBootstrap(range(30), 500).difference(same, same).p == 1.0
    small = 0
    for trial in range(200):
        gap = rng.normal(size=60)
        small += ImageBootstrap(range(60), 200, seed=trial).difference(gap, np.zeros(60)).p <= 0.1
    # 200 trials with probability 0.1 (slightly more for a bootstrap of 60): five standard errors are 0.11
    assert 0.03 <= small / 200 <= 0.21


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0, 0.1, -0.3]), min_size=1, max_size=11))
def test_sign_flip_by_enumerating_every_way_to_set_the_signs(sums):
    found = abs(sum(sums)) - 1e-9
    ways = [abs(np.dot(signs, sums)) >= found for signs in itertools.product((1, -1), repeat=len(sums))]
    assert sign_flip(np.array(sums)) == pytest.approx(sum(ways) / len(ways))


@pytest.mark.parametrize("images", [3, 7, 12])
def test_sign_flip_is_the_permutation_test_of_scipy(images):
    sums = np.random.default_rng(images).normal(0.4, 1, images)
    theirs = stats.permutation_test(
        (sums,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert sign_flip(sums) == pytest.approx(theirs.pvalue)


def test_seven_questions_cannot_tell_more_than_seven_coins():
    """The bootstrap gives 2 / (resamples + 1) here, because no resample is on the other side of zero."""
    result = ImageBootstrap(range(7), 2000).difference(np.ones(7), np.zeros(7))
    assert result.p == 2 / 2**7 == pytest.approx(0.015625)
    assert ImageBootstrap(range(7)).difference(np.zeros(7), np.ones(7)).p == 2 / 2**7
    assert ImageBootstrap(range(7)).difference(np.ones(7), np.ones(7)).p == 1.0
    # seven questions about one image, then about two
    assert ImageBootstrap(["a"] * 7).difference(np.ones(7), np.zeros(7)).p == 1.0
    assert ImageBootstrap(["a", "b", "a", "b", "a", "b", "a"]).difference(np.ones(7), np.zeros(7)).p == 0.5


def test_few_images_are_exact_and_clustered():
    rng = np.random.default_rng(3)
    images = rng.integers(0, 9, 60)
    first, second = (rng.random(60) < 0.7).astype(float), (rng.random(60) < 0.5).astype(float)
    sums = [(first - second)[images == image].sum() for image in range(9)]
    ways = [abs(np.dot(signs, sums)) >= abs(sum(sums)) - 1e-9 for signs in itertools.product((1, -1), repeat=9)]
    assert ImageBootstrap(images).difference(first, second).p == pytest.approx(sum(ways) / 512)


def test_p_of_few_images_is_honest_where_there_is_no_difference():
    rng = np.random.default_rng(0)
    small = [ImageBootstrap(range(8), 50).difference(rng.normal(size=8), np.zeros(8)).p <= 0.05 for _ in range(600)]
    # an exact test rejects in at most 5 % of trials; with 600 trials the standard error is 0.9 %
    assert np.mean(small) <= 0.05 + 3 * 0.009


def test_exact_and_resampled_p_meet_where_one_takes_over():
    rng = np.random.default_rng(1)
    for _ in range(3):
        gap = rng.normal(0.25, 1, EXACT_UP_TO + 1)
        exact = sign_flip(gap)
        assert ImageBootstrap(range(len(gap)), 20000).difference(gap, 0 * gap).p == pytest.approx(exact, abs=0.05)
        assert ImageBootstrap(range(len(gap) - 1)).difference(gap[1:], 0 * gap[1:]).p == sign_flip(gap[1:])


@pytest.mark.parametrize("only_first, only_second", [(0, 0), (1, 0), (0, 4), (3, 3), (2, 9), (10, 1)])
def test_mcnemar_by_enumerating_every_way_the_coins_fall(only_first, only_second):
    trials = only_first + only_second
    first = np.array([True] * only_first + [False] * only_second + [True, False])
    second = np.array([False] * only_first + [True] * only_second + [True, False])
    uneven = abs(only_first - only_second)
    ways = [abs(trials - 2 * sum(coins)) >= uneven for coins in itertools.product((0, 1), repeat=trials)]
    assert mcnemar(first, second) == pytest.approx(sum(ways) / len(ways))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_by_whole_numbers(a, b):
    """The exact binomial sum; scipy's test underflows to 0 below 1e-299."""
    trials, ways, tail = a + b, 1, 0
    for k in range(min(a, b) + 1):
        tail += ways
        ways = ways * (trials - k) // (k + 1)
    expected = float(min(Fraction(1), Fraction(2 * tail, 2**trials)))
    first = np.array([True] * a + [False] * b, dtype=bool)
    assert mcnemar(first, ~first) == pytest.approx(expected, rel=1e-8, abs=1e-320)


def test_retention_above_chance_is_that_of_the_published_example():
    # SCOPE on MMStar at 10 % kept: relative accuracy 78.8 %, above the chance of four choices 64 %
    assert retention_above_chance(48.74, 25.0, 61.88) == pytest.approx(0.6437, abs=1e-4)
    assert retention_above_chance(0.5, 0.3, 0.3) is None
    assert retention_above_chance(0.3, 0.3, 0.9) == 0.0


def test_loyalty_ignores_case_and_blanks_only():
    assert loyalty(["Red", " 4", "no", "ring"], ["red", "4 ", "yes", "rings"]) == 0.5


def test_compression_hard_is_right_then_wrong():
    full, small = [1, 1, 0, 0, 0.6, 0.6], [1, 0, 1, 0, 0.4, 0.5]
    np.testing.assert_array_equal(compression_hard(full, small), [False, True, False, False, True, False])


def test_spread_over_seeds():
    result = spread([0.5, 0.7, 0.6])
    assert (result.mean, result.std) == pytest.approx((0.6, 0.1))
    assert (result.low, result.high, result.seeds) == (0.5, 0.7, 3)
    assert spread([0.4]).std == 0.0


def test_nothing_to_resample_is_refused():
    with pytest.raises(ValueError, match="at least one question"):
        ImageBootstrap([])
