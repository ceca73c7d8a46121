"""Splits or merges groups to reach a given number. Not in the paper, which does not control the number of groups.

Groups of similar size are not better in general: in our small benchmark the best masks of split groups had a lower
loss, but hard labels made from them gave a worse compressor. A large background group, which keeps one token of half
the image, tells the compressor which tokens do not matter.
"""

import numpy as np
import torch

from evocomp.grouping.groups import Groups
from evocomp.log import UserError

# iterations of 2-means per split; more hardly change the groups
ROUNDS = 3


def fit_groups(tokens: torch.Tensor, groups: Groups, count: int) -> Groups:
    """Split or merge the groups of the visual tokens [N, D] until there are `count` groups (at most N).

    If there are too few, the group with the largest sum of squared deviations is split in two, repeatedly. If there are
    too many, the smallest group is merged with the group of nearest mean, repeatedly. Tokens are normalised to length
    1.
    """
    if count < 1:
        raise UserError(f"grouping needs at least 1 group, got {count}")
    points = tokens.double().cpu().numpy()
    length = np.linalg.norm(points, axis=1, keepdims=True)
    points = points / np.where(length > 0, length, 1)
    assert len(points) == groups.num_tokens
    of = groups.of.copy()
    if groups.count < count:
        _split(points, of, groups.count, min(count, len(points)))
    else:
        _merge(points, of, groups.count, count)
    return Groups.from_ids(of)


def _split(points: np.ndarray, of: np.ndarray, present: int, count: int) -> None:
    deviations = [_deviation(points[of == g]) for g in range(present)]
    for new in range(present, count):
        widest = int(np.argmax(deviations))
        members = np.flatnonzero(of == widest)
        of[members[_halves(points[members])]] = new
        deviations[widest] = _deviation(points[of == widest])
        deviations.append(_deviation(points[of == new]))


def _deviation(points: np.ndarray) -> float:
    # -1 because a single token cannot be split; a group of equal tokens (0) can
    return float(np.square(points - points.mean(0)).sum()) if len(points) > 1 else -1.0


def _halves(points: np.ndarray) -> np.ndarray:
    """Mask of the points [M, D], M > 1, in the second cluster of 2-means, initialised with two distant points."""
    first = points[np.square(points - points.mean(0)).sum(1).argmax()]
    second = points[np.square(points - first).sum(1).argmax()]
    for _ in range(ROUNDS):
        right = np.square(points - second).sum(1) < np.square(points - first).sum(1)
        if right.all() or not right.any():
            # all points are equal: split by index
            return np.arange(len(points)) >= len(points) // 2
        first, second = points[~right].mean(0), points[right].mean(0)
    return right


def _merge(points: np.ndarray, of: np.ndarray, present: int, count: int) -> None:
    sizes = np.bincount(of).astype(np.float64)
    sums = np.zeros((present, points.shape[1]))
    np.add.at(sums, of, points)
    for _ in range(present - count):
        smallest = int(np.argmin(sizes))
        means = sums / np.where(np.isfinite(sizes), sizes, 1)[:, None]
        distance = np.square(means - means[smallest]).sum(1)
        distance[smallest] = np.inf
        distance[~np.isfinite(sizes)] = np.inf
        target = int(distance.argmin())
        of[of == smallest] = target
        sums[target] += sums[smallest]
        sizes[target] += sizes[smallest]
        sizes[smallest] = np.inf  # merged: never the smallest again
