"""A partition of the visual tokens into groups, and the masks that keep one token of each group."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Groups:
    """Disjoint groups that cover the N visual tokens of one image (EvoComp, arXiv 2604.17087, section 3).

    A genome is an int array [G]: for each group, the index of the kept token among the group's tokens, which are in the
    order of the image.

    Args:
        of: [N] group id of each visual token. Ids are 0..G-1, numbered by first appearance; use `Groups.from_ids` for
            other ids.

    >>> groups = Groups.from_ids([7, 3, 7, 7, 3])
    >>> groups.of.tolist(), groups.count, groups.sizes.tolist()
    ([0, 1, 0, 0, 1], 2, [3, 2])
    >>> groups.kept(np.array([2, 0])).tolist()  # the third token of group 0, the first of group 1
    [1, 3]
    """

    of: np.ndarray

    def __post_init__(self) -> None:
        of = np.array(self.of, dtype=np.int32)
        assert of.ndim == 1 and of.size > 0, f"group ids must be [N] with N > 0, got shape {of.shape}"
        # a new id must be one more than the largest id so far
        highest = np.maximum.accumulate(of)
        assert of.min() >= 0 and of[0] == 0 and (np.diff(highest) <= 1).all(), "group ids are not compact"
        of.flags.writeable = False
        object.__setattr__(self, "of", of)

    @classmethod
    def from_ids(cls, ids: np.ndarray) -> "Groups":
        """Groups of tokens with equal ids; `ids` [N] may be any integers (for instance ids of nearest words)."""
        _, first, inverse = np.unique(np.asarray(ids), return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int32)
        rank[np.argsort(first)] = np.arange(len(first))
        return cls(rank[inverse.reshape(-1)])

    @property
    def num_tokens(self) -> int:
        """Number of tokens N."""
        return len(self.of)

    @cached_property
    def count(self) -> int:
        """Number of groups G."""
        return int(self.of.max()) + 1

    @cached_property
    def sizes(self) -> np.ndarray:
        """[G] number of tokens in each group."""
        return np.bincount(self.of).astype(np.int32)

    @cached_property
    def order(self) -> np.ndarray:
        """[N] token indices sorted by group, ascending within a group."""
        return np.argsort(self.of, kind="stable").astype(np.int32)

    @cached_property
    def offsets(self) -> np.ndarray:
        """[G] index in `order` at which each group starts."""
        return (np.cumsum(self.sizes) - self.sizes).astype(np.int32)

    @cached_property
    def places(self) -> np.ndarray:
        """[N] index of each token within its group."""
        places = np.empty(self.num_tokens, dtype=np.int32)
        places[self.order] = np.arange(self.num_tokens, dtype=np.int32) - self.offsets[self.of[self.order]]
        return places

    @cached_property
    def members(self) -> np.ndarray:
        """[G, M] token indices of each group, ascending, padded with -1; M is the size of the largest group."""
        members = np.full((self.count, int(self.sizes.max())), -1, dtype=np.int32)
        members[self.of, self.places] = np.arange(self.num_tokens, dtype=np.int32)
        return members

    def kept(self, genomes: np.ndarray) -> np.ndarray:
        """Indices of the kept tokens: genomes [Q, G] (or [G]) -> int32 of the same shape, ascending."""
        return np.sort(self.order[self.offsets + genomes], axis=-1)

    def genomes(self, kept: np.ndarray) -> np.ndarray:
        """Inverse of `kept`: one token of every group, in any order, [Q, G] (or [G]) -> genomes."""
        kept = np.asarray(kept)
        ids = self.of[kept]
        assert (np.sort(ids, axis=-1) == np.arange(self.count)).all(), "not one token of every group"
        genomes = np.empty(kept.shape, dtype=np.int32)
        np.put_along_axis(genomes, ids, self.places[kept], axis=-1)
        return genomes
