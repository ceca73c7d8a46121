"""Which sample comes when: a pure function of seed, epoch and position, so that training resumes exactly."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset, Sampler


class Slots(Dataset):
    """Positions 0..count-1 of an epoch. Samples are put in their places on the main process: loader workers
    start before an epoch's labels are made, so they must not know of labels."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> int:
        return position


class ResumableSampler(Sampler[int]):
    """This rank's positions of an epoch, from `consumed` on: consumed + rank, + world, + 2 world, ...

    Args:
        count: positions of the epoch, over all ranks.
        rank, world: which share; every rank gets equally many, the last incomplete round is left out.
    """

    def __init__(self, count: int, rank: int = 0, world: int = 1):
        self.count = count
        self.rank = rank
        self.world = world
        self.consumed = 0

    def __len__(self) -> int:
        return self.count // self.world

    def __iter__(self) -> Iterator[int]:
        start, self.consumed = self.consumed, 0  # the next epoch begins at its beginning
        usable = self.count // self.world * self.world
        return iter(range(start + self.rank, usable, self.world))


def epoch_order(ids: Sequence[int], seed: int, epoch: int, count: int) -> np.ndarray:
    """`count` sample ids of an epoch [count]: one shuffle of all ids after another.

    >>> sorted(epoch_order([5, 6, 7], seed=0, epoch=1, count=6)[:3].tolist())
    [5, 6, 7]
    """
    ids = np.sort(np.asarray(ids, dtype=np.int64))
    passes = -(-count // len(ids))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))))
    return np.concatenate([rng.permutation(ids) for _ in range(passes)])[:count]
