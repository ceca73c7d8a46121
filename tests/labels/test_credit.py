import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.grouping import Groups
from evocomp.labels.credit import credits, group_means, marginal_credits, marginal_targets, random_masks
from evocomp.log import UserError
from evocomp.search import Published, run, stream


def brute_force(masks, losses, n, scale):
    """Credits by plain loops over questions and tokens; the sum is divided by `scale(c)`."""
    out = np.zeros((len(losses[0]), n))
    for j in range(len(out)):
        for i in range(n):
            total = 0.0
            for kept, size_losses in zip(masks, losses, strict=True):
                values = [min(float(loss), 6.0) for loss in size_losses[j]]
                mean = sum(values) / len(values)
                spread = 0.0
                if len(values) > 1:
                    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
                keeping = [k for k in range(len(kept)) if i in kept[k].tolist()]
                if keeping:
                    gain = -sum(values[k] - mean for k in keeping)
                    total += gain / (scale(len(keeping)) * (spread + 0.1))
            out[j, i] = total
    return out


@pytest.mark.parametrize("counts", [(20, 13), (1, 2), (40,)])
def test_credits_equal_plain_loops(counts):
    rng = np.random.default_rng(len(counts))
    n, sizes = 23, (3, 7)[: len(counts)]
    masks = [random_masks(n, r, k, rng) for r, k in zip(sizes, counts, strict=True)]
    losses = [10 * rng.random((4, k)).astype(np.float32) ** 3 for k in counts]  # some above the clip
    expected = brute_force(masks, losses, n, lambda c: c) / len(sizes)
    assert np.allclose(credits(masks, losses, n), expected, rtol=1e-6, atol=1e-7)
    expected = brute_force(masks, losses, n, np.sqrt) / np.sqrt(len(sizes))
    marginal = marginal_credits(masks, losses, n)
    assert np.allclose(marginal, expected, rtol=1e-6, atol=1e-7)
    assert np.allclose(marginal_targets(marginal), 1 / (1 + np.exp(-(expected - 2))), rtol=1e-6)


def test_unsampled_tokens_and_indifferent_questions_get_zero():
    masks = [np.array([[0, 1], [1, 2], [0, 2]])]
    values = credits(masks, [np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [7.0, 9.0, 6.0]])], 5)
    assert (values[:, 3:] == 0).all() and (values[1:] == 0).all()
    # by hand: mean 2, std 1; token 0 is kept at losses 1 and 3, token 1 at 1 and 2, token 2 at 2 and 3
    assert np.allclose(values[0, :3], [0, 0.5 / 1.1, -0.5 / 1.1])


def test_credits_rank_tokens_by_their_effect():
    rng = np.random.default_rng(0)
    effect = np.linspace(-1, 1, 12)
    masks = [random_masks(12, r, 2000, rng) for r in (3, 6)]
    losses = [(3 + effect[m].sum(1) / 6)[None] for m in masks]
    for form in (credits, marginal_credits):
        assert np.argsort(-form(masks, losses, 12)[0]).tolist() == list(range(12))


def test_group_means_find_what_single_tokens_hide():
    """With few masks of many tokens, credits of an important group stand out, those of its single tokens do not."""
    rng = np.random.default_rng(0)
    groups = Groups(np.arange(192) // 16)
    masks = [random_masks(192, 16, 24, rng)]
    losses = [(2.0 - (groups.of[masks[0]] == 5).any(1) + 0.2 * rng.standard_normal(24))[None]]
    single = credits(masks, losses, 192)
    pooled = group_means(single, groups)
    for group in range(groups.count):  # by definition
        own = groups.of == group
        assert np.allclose(pooled[0, own], single[0, own].mean())
    best = groups.of[np.argsort(-single[0])[:16]]
    assert (best != 5).mean() > 0.25
    assert (groups.of[np.argsort(-pooled[0])[:16]] == 5).all()


def test_credits_of_a_searchs_masks():
    groups = Groups(np.array([0, 0, 1, 1, 1, 2]))
    effect = np.array([1.0, 2.0, 1.5, 0.0, 0.5, 1.0])
    result = run(Published(), groups, lambda kept: effect[kept].sum(1), stream(0, 0, 0), 10)
    assert result.evaluations == 6  # all possible masks
    losses = [result.scored_losses[None]]
    values = marginal_credits([result.scored_kept], losses, 6)
    expected = brute_force([result.scored_kept], losses, 6, np.sqrt)
    assert np.allclose(values, expected, rtol=1e-6, atol=1e-6)
    assert values[0, 5] == pytest.approx(0, abs=1e-6)  # in every mask: nothing is known
    # gain over the mean times the root of the count: .667 sqrt(2), .5 sqrt(3), .167 sqrt(2), 0 and below
    assert np.argsort(-values[0]).tolist() == [3, 0, 4, 5, 1, 2]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.data(), st.integers(0, 2**32))
def test_random_masks_are_subsets_of_the_wanted_size(n, data, seed):
    size = data.draw(st.integers(1, n))
    masks = random_masks(n, size, 9, np.random.default_rng(seed))
    assert masks.shape == (9, size) and masks.dtype == np.int32
    assert (np.diff(masks, axis=1) > 0).all() and masks.min() >= 0 and masks.max() < n


def test_random_masks_are_uniform_over_subsets():
    masks = random_masks(5, 2, 10_000, stream(0, 0, 0))
    counts = [int((masks == pair).all(1).sum()) for pair in itertools.combinations(range(5), 2)]
    assert sum(counts) == 10_000 and max(abs(c - 1000) for c in counts) < 5 * 30


def test_random_masks_come_from_the_given_stream():
    first, again, other = (random_masks(50, 8, 4, stream(0, id, 0)) for id in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_too_large_masks_are_refused():
    with pytest.raises(UserError):
        random_masks(4, 5, 1, np.random.default_rng(0))
