"""Number of sequences per forward pass."""

import numpy as np
import pytest
import torch

from evocomp.config.schema import ScorerConfig
from evocomp.log import UserError
from evocomp.scoring import memory
from evocomp.scoring.memory import Room
from evocomp.scoring.scorer import CandidateScorer


def masks(count: int) -> np.ndarray:
    order = np.argsort(np.random.default_rng(0).random((count, 144)), axis=1)
    return np.sort(order[:, :16], axis=1)


def test_batch_size_decreases_with_length_and_is_at_least_one(nano):
    room = Room(nano, itemsize=4)
    sizes = [room.sequences(tokens, 1) for tokens in (10, 100, 1000, 10**9)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[1] > sizes[2] and sizes[-1] == 1
    assert Room(nano, itemsize=2).sequences(100, 1) > sizes[1]


def test_a_small_memory_budget_gives_the_same_losses_in_more_forward_passes(nano, encoded, monkeypatch):
    kept, expected = masks(10), CandidateScorer(nano)(encoded[0], masks(10))
    each = np.stack([kept[:4], kept[4:8]])
    expected_each = CandidateScorer(nano).each(encoded[:2], each)
    one = Room(nano, 4)
    monkeypatch.setattr(memory, "CPU_BYTES", 3 * (24 * one.token + one.logits))
    scorer, batches = CandidateScorer(nano), []
    with scorer.after_each_batch(lambda: batches.append(1)):
        np.testing.assert_allclose(scorer(encoded[0], kept), expected, atol=1e-5)
    assert len(batches) >= 3
    np.testing.assert_allclose(scorer.each(encoded[:2], each), expected_each, atol=1e-5)
    free = CandidateScorer(nano, settings=ScorerConfig(fit_memory=False))
    batches.clear()
    with free.after_each_batch(lambda: batches.append(1)):
        free(encoded[0], kept)
    assert len(batches) == 1


def test_one_at_a_time_when_batching_is_off(nano, encoded):
    scorer, batches = CandidateScorer(nano, settings=ScorerConfig(batched=False)), []
    with scorer.after_each_batch(lambda: batches.append(1)):
        np.testing.assert_allclose(scorer(encoded[0], masks(5)), CandidateScorer(nano)(encoded[0], masks(5)), atol=1e-5)
    assert len(batches) == 5
    # several samples with several masks each are also scored one by one
    each = np.stack([masks(2), masks(2)])
    np.testing.assert_allclose(scorer.each(encoded[:2], each), CandidateScorer(nano).each(encoded[:2], each), atol=1e-5)


def test_out_of_memory_halves_the_batch_size_for_good(nano, encoded, monkeypatch):
    expected = CandidateScorer(nano)(encoded[0], masks(16))
    scorer = CandidateScorer(nano)
    right, tried = scorer.losses.candidates, []

    def small_gpu(features, kept, flips, context):
        tried.append(len(kept))
        if len(kept) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return right(features, kept, flips, context)

    monkeypatch.setattr(scorer.losses, "candidates", small_gpu)
    np.testing.assert_allclose(scorer(encoded[0], masks(16)), expected, atol=1e-5)
    assert tried == [16, 8, 4, 4, 4, 4] and scorer.forwards == 16
    tried.clear()
    scorer(encoded[0], masks(16))
    assert max(tried) <= 5, "found once, kept"


def test_a_gpu_too_small_for_one_sequence_is_an_error(nano, encoded, monkeypatch):
    scorer = CandidateScorer(nano)

    def no_room(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(scorer.losses, "candidates", no_room)
    with pytest.raises(UserError, match="do not fit in the GPU's memory"):
        scorer(encoded[0], masks(3))
