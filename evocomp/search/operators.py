"""Selection, crossover and mutation. All functions are pure and operate on populations [Q, G]."""

import numpy as np


def truncation(population: np.ndarray, losses: np.ndarray, count: int) -> np.ndarray:
    """Truncation selection: the `count` members of lowest loss, best first; ties keep their order."""
    return population[np.argsort(losses, kind="stable")[:count]]


def pairs(num_parents: int, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices [count], [count] of two different parents for each child (equal if there is only one parent)."""
    draws = rng.random((2, count))
    first = (draws[0] * num_parents).astype(np.int32)
    other = (first + 1 + (draws[1] * (num_parents - 1)).astype(np.int32)) % num_parents
    return first, other


def half_split_crossover(
    first: np.ndarray, other: np.ndarray, rng: np.random.Generator, probability: float
) -> np.ndarray:
    """Children of two parents [Q, G] each: the first half of the groups from one, the rest from the other.

        first   a a a a a          other   b b b b b        child   a a b b b

    With probability 1 - `probability` there is no crossover and the child equals the first parent. Groups are ordered
    by their first token in the image.
    """
    from_other = np.arange(first.shape[1]) >= first.shape[1] // 2
    crossed = rng.random((len(first), 1)) < probability
    return np.where(crossed & from_other, other, first)


def uniform_crossover(first: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Children of two parents [Q, G] each: every group comes from either parent with equal probability."""
    return np.where(rng.random(first.shape) < 0.5, first, other)


def shift_mutation(genomes: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, probability: float) -> np.ndarray:
    """With this probability, move the kept token of a group to the previous or next token of the group, if any."""
    draws = rng.random(genomes.shape)
    # one random number decides: below p/2 previous token, below p next token
    step = (draws < probability).astype(np.int32) - 2 * (draws < probability / 2)
    return np.clip(genomes + step, 0, sizes - 1, dtype=np.int32, casting="unsafe")


def resample_mutation(genomes: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, expected: float) -> np.ndarray:
    """Replace the kept token by a random other token of its group, in `expected` groups of a genome on average."""
    movable = sizes > 1
    probability = expected / max(1, int(movable.sum()))
    draws = rng.random((2, *genomes.shape))
    elsewhere = (genomes + 1 + (draws[1] * (sizes - 1)).astype(np.int32)) % sizes
    return np.where((draws[0] < probability) & movable, elsewhere, genomes).astype(np.int32)
