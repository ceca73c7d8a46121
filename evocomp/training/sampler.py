"""Order of the training samples: a pure function of seed, epoch and index, so that training resumes exactly."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset, Sampler


class Slots(Dataset):
    """Indices 0..count-1 into the order of an epoch.

    The main process replaces them by samples: loader workers start before the labels of an epoch are made, so they must
    not depend on labels.
    """

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> int:
        return position


class ResumableSampler(Sampler[int]):
    """This rank's indices of an epoch: consumed + rank, consumed + rank + world, consumed + rank + 2 world, ...

    Args:
        count: number of indices of the epoch, over all ranks.
        rank, world: rank and number of ranks; all ranks get equally many indices, a remainder is dropped.
    """

    def __init__(self, count: int, rank: int = 0, world: int = 1):
        self.count = count
        self.rank = rank
        self.world = world
        self.consumed = 0

    def __len__(self) -> int:
        return self.count // self.world

    def __iter__(self) -> Iterator[int]:
        start, self.consumed = self.consumed, 0  # the next epoch starts from index 0
        usable = self.count // self.world * self.world
        return iter(range(start + self.rank, usable, self.world))


def epoch_order(ids: Sequence[int], seed: int, epoch: int, count: int) -> np.ndarray:
    """Sample ids of an epoch [count]: concatenated permutations of all ids, cut to `count`.

    >>> sorted(epoch_order([5, 6, 7], seed=0, epoch=1, count=6)[:3].tolist())
    [5, 6, 7]
    """
    ids = np.sort(np.asarray(ids, dtype=np.int64))
    passes = -(-count // len(ids))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))))
    return np.concatenate([rng.permutation(ids) for _ in range(passes)])[:count]
