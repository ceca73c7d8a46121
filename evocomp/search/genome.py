"""Genomes: int32 [Q, G], the index inside each group of the token that a candidate keeps.

A genome therefore always keeps exactly one token per group. All functions draw only from `Generator.random` (53 bits
scaled to [0, 1)), the part of numpy's generators least likely to change between versions.
"""

from typing import Any

import numpy as np

from evocomp.grouping.groups import Groups


def stream(seed: int, sample_id: int, round: int) -> np.random.Generator:
    """Random number generator of one sample in one round: independent of ranks, order and other samples.

    It is Philox with the key (seed; sample_id, round). numpy does not guarantee the stream of a `Generator` across
    versions, so a test compares it with stored numbers, and the label store records numpy's version.

    >>> stream(seed=0, sample_id=5, round=1).random() == stream(seed=0, sample_id=5, round=1).random()
    True
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(sample_id, round))))


def random_genomes(sizes: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` genomes [count, G]; every token of a group (sizes [G]) is equally likely."""
    # u < 1 - 2^-54, so u * size rounds to less than size, and its floor is a valid index in the group
    return (rng.random((count, len(sizes))) * sizes).astype(np.int32)


def sample_genomes(odds: np.ndarray, groups: Groups, rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` genomes [count, G]; in each group the kept token is drawn with probability proportional to its weight.

    odds [N]: non-negative weights in the order of `groups.order`, with a positive sum in every group.
    """
    total = np.add.reduceat(odds, groups.offsets)
    ids = groups.of[groups.order]
    before = np.cumsum(odds) - odds
    within = (before - before[groups.offsets][ids] + odds) / total[ids]
    # group g's cumulative probabilities lie in (g, g + 1], so that one sorted search covers all groups
    edges = np.maximum.accumulate(ids + np.minimum(within, 1.0))
    draws = rng.random((count, groups.count)) + np.arange(groups.count)
    place = np.searchsorted(edges, draws, side="right") - groups.offsets
    return np.clip(place, 0, groups.sizes - 1).astype(np.int32)


def seed_genomes(
    groups: Groups, scores: np.ndarray, rng: np.random.Generator, count: int, temperature: float = 1.0
) -> np.ndarray:
    """Genomes [count, G] drawn from given token scores [N] (for instance a compressor's logits).

    In each group the kept token is drawn from softmax(scores / temperature) over the group.
    """
    assert temperature > 0, f"temperature must be positive, got {temperature}"
    logits = np.asarray(scores, dtype=np.float64)[groups.order] / temperature
    highest = np.maximum.reduceat(logits, groups.offsets)
    return sample_genomes(np.exp(logits - highest[groups.of[groups.order]]), groups, rng, count)


def keys(genomes: np.ndarray) -> list[bytes]:
    """One hashable key per genome [Q, G]."""
    genomes = np.ascontiguousarray(genomes, dtype=np.int32)
    rows: Any = genomes.view(np.dtype((np.void, genomes.itemsize * genomes.shape[1]))).ravel().tolist()
    return list(rows)
