"""How sure an accuracy is: intervals over images, paired tests, and what is left above chance.

Several questions share an image and stand or fall together, so images are resampled, not questions: the cluster
bootstrap (Davison & Hinkley 1997, section 3.8). With few images a bootstrap claims more than they can tell (seven of
them give p < 0.001), so the p of a difference is then that of the exact sign-flip test over images. Scores are 0/1 or
anything between, one a question. n questions, M columns of scores, K images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

EXACT_UP_TO = 25
"""Images up to which the p of a difference is exact; beyond, its smallest value is below that of the bootstrap."""

TOO_FEW = 10
"""Images below which a percentile interval means nothing: it is far too narrow to cover what it claims."""

_CHUNK = 2**22  # counts drawn at a time: bounds the memory at 32 MiB


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A mean paired difference with its interval, and the two-sided p of "there is no difference"."""

    p: float


@dataclass(frozen=True)
class Spread:
    """What several seeds gave: `std` is the sample standard deviation, 0 for a single seed."""

    mean: float
    std: float
    low: float
    high: float
    seeds: int


class ImageBootstrap:
    """Resamples pictures with replacement; every score handed to one instance sees the same resamples."""

    def __init__(self, images: Sequence, resamples: int = 2000, seed: int = 0, level: float = 0.95):
        """`images`: the picture of each question [n], hashable ids. `level`: coverage of the intervals."""
        if len(images) == 0 or resamples < 1:
            raise ValueError("a bootstrap needs at least one question and one resample")
        first = {}
        self._cluster = np.array([first.setdefault(image, len(first)) for image in images])
        self._size = np.bincount(self._cluster).astype(np.float64)
        self.resamples, self.seed, self.level = resamples, seed, level

    @property
    def clusters(self) -> int:
        """Images."""
        return len(self._size)

    def means(self, scores: np.ndarray) -> np.ndarray:
        """Mean score of each resample: [n] -> [resamples], [n, M] -> [resamples, M]."""
        scores = np.asarray(scores, dtype=np.float64)
        columns = scores.reshape(len(scores), -1)
        assert len(columns) == len(self._cluster), "one score a question"
        pictures = len(self._size)
        sums = np.stack([np.bincount(self._cluster, column, pictures) for column in columns.T], axis=1)
        rng = np.random.Generator(np.random.Philox(self.seed))
        drawn, step = [], max(1, _CHUNK // pictures)
        for start in range(0, self.resamples, step):
            rows = min(step, self.resamples - start)
            picks = rng.integers(0, pictures, (rows, pictures)) + pictures * np.arange(rows)[:, None]
            times = np.bincount(picks.ravel(), minlength=rows * pictures).reshape(rows, pictures)
            drawn.append((times @ sums) / (times @ self._size)[:, None])
        return np.concatenate(drawn).reshape(self.resamples, *scores.shape[1:])

    def interval(self, scores: np.ndarray) -> Interval:
        """Mean of the scores [n] with its percentile interval."""
        return self.interval_of(np.mean(scores), self.means(scores))

    def difference(self, first: np.ndarray, second: np.ndarray) -> Difference:
        """Mean of `first - second` over the same questions [n], its interval and its p; see `difference_of`."""
        gap = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
        return self.difference_of(gap, self.means(gap))

    def interval_of(self, mean: float, drawn: np.ndarray) -> Interval:
        """The interval when the resampled means [resamples] are known already."""
        tail = (1 - self.level) / 2
        low, high = np.quantile(drawn, (tail, 1 - tail))
        return Interval(float(mean), float(low), float(high))

    def difference_of(self, gap: np.ndarray, drawn: np.ndarray) -> Difference:
        """The mean of paired differences [n] when its resamples [resamples] are known already.

        Up to `EXACT_UP_TO` images p is that of `sign_flip` over their sums. Beyond, it is twice the share of resamples
        on the far side of zero, one resample added to either count (Davison & Hinkley 1997, section 4.4), so that it
        is never below 2 / (resamples + 1).
        """
        gap = np.asarray(gap, dtype=np.float64)
        interval = self.interval_of(gap.mean(), drawn)
        if self.clusters <= EXACT_UP_TO:
            p = sign_flip(np.bincount(self._cluster, gap, self.clusters))
        else:
            rounding = 1e-12  # means of fractional scores that are equal may differ in the last bit
            far = min(np.count_nonzero(drawn <= rounding), np.count_nonzero(drawn >= -rounding))
            p = min(1.0, 2 * (far + 1) / (self.resamples + 1))
        return Difference(interval.mean, interval.low, interval.high, p)


def sign_flip(sums: np.ndarray) -> float:
    """Two-sided exact p of "the differences are as likely positive as negative", from their sum for each image [K].

    Under that hypothesis every image's sum could as well have had the other sign. p is the share of the 2^K ways to set
    the signs whose total is at least as far from zero as the one found (Fisher 1935, section 21), so at least 2 / 2^K.
    The ways are counted by halves, 2^(K/2) totals each.

    >>> sign_flip(np.ones(7))  # seven images, all in favour
    0.015625
    """
    sums = np.asarray(sums, dtype=np.float64)
    sums = sums[sums != 0]  # without influence on either side
    if len(sums) > 2 * EXACT_UP_TO:
        raise ValueError(f"{len(sums)} images are too many to count all signs")
    half = len(sums) // 2
    left, right = np.sort(_totals(sums[:half])), _totals(sums[half:])
    found = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()  # totals that are equal may differ by rounding
    if found <= 0:
        return 1.0
    high = len(left) - np.searchsorted(left, found - right, side="left")
    low = np.searchsorted(left, -found - right, side="right")
    return float((high.sum() + low.sum()) / (len(left) * len(right)))


def _totals(sums: np.ndarray) -> np.ndarray:
    """The total for each way to set the signs [2^K]."""
    totals = np.zeros(1)
    for one in sums:
        totals = np.concatenate([totals + one, totals - one])
    return totals


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact p of McNemar's test on right/wrong answers [n] to the same questions.

    A question that only one of the two gets right falls to either with p = 1/2 if they are equally good, so
    these questions are binomial (McNemar 1947). This takes questions for independent; where several share an
    image, `ImageBootstrap.difference` is the safer test.

    >>> mcnemar(np.array([1, 1, 1, 1, 1, 0]), np.array([0, 0, 0, 0, 0, 0]))  # five questions to none
    0.0625
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = np.count_nonzero(first & ~second), np.count_nonzero(second & ~first)
    return _binomial_two_sided(min(only_first, only_second), only_first + only_second)


@lru_cache(maxsize=4096)
def _binomial_two_sided(fewer: int, trials: int) -> float:
    """Chance that `trials` fair coins split at least as unevenly as `fewer` to the rest."""
    if 2 * fewer >= trials:
        return 1.0
    log_chances = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) - trials * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in log_chances))


def retention_above_chance(accuracy: float, floor: float, full: float) -> float | None:
    """Share of what the picture is worth that is kept: (accuracy - floor) / (full - floor).

    `floor` is the accuracy without the picture. None where the picture is worth nothing (full <= floor).
    """
    return (accuracy - floor) / (full - floor) if full > floor else None


def loyalty(answers: Sequence[str], reference: Sequence[str]) -> float:
    """Share of questions [n] that get the same answer as in `reference`, right or wrong (EffiVLM-Bench)."""
    assert len(answers) == len(reference) > 0
    same = [a.strip().casefold() == b.strip().casefold() for a, b in zip(answers, reference, strict=True)]
    return sum(same) / len(same)


def compression_hard(full: np.ndarray, downsampled: np.ndarray) -> np.ndarray:
    """Which questions [n] need detail: right with all tokens, wrong with a smaller picture of equal tokens.

    Group A of VTC-Bench (arXiv 2510.07143). Fractional scores count as right from 0.5 on.
    """
    return (np.asarray(full) >= 0.5) & (np.asarray(downsampled) < 0.5)


def spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation and range of one number a seed."""
    array = np.asarray(values, dtype=np.float64)
    deviation = float(array.std(ddof=1)) if len(array) > 1 else 0.0
    return Spread(float(array.mean()), deviation, float(array.min()), float(array.max()), len(array))
