"""Uncertainty of accuracies: intervals over images, paired tests, retention above chance.

Questions about the same image are not independent, so images are resampled instead of questions: the cluster
bootstrap (Davison & Hinkley 1997, section 3.8). With few images the p values of a bootstrap are too small (seven images
can give p < 0.001), so the p value of a difference then comes from the exact sign-flip test over images. Each question
has one score from 0 to 1. n questions, M columns of scores, K images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

EXACT_UP_TO = 25
"""Largest number of images for the exact test; with more images the bootstrap is precise enough."""

TOO_FEW = 10
"""Below this number of images percentile intervals are far too narrow for their nominal coverage."""

_CHUNK = 2**22  # counts drawn at a time; limits memory to 32 MiB


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A mean paired difference with its interval, and the two-sided p value of the hypothesis of no difference."""

    p: float


@dataclass(frozen=True)
class Spread:
    """Summary of several seeds: `std` is the sample standard deviation, 0 for a single seed."""

    mean: float
    std: float
    low: float
    high: float
    seeds: int


class ImageBootstrap:
    """Resamples images with replacement; all scores passed to one instance use the same resamples."""

    def __init__(self, images: Sequence, resamples: int = 2000, seed: int = 0, level: float = 0.95):
        """`images`: image of each question [n], as hashable ids. `level`: coverage of the intervals."""
        if len(images) == 0 or resamples < 1:
            raise ValueError("a bootstrap needs at least one question and one resample")
        first = {}
        self._cluster = np.array([first.setdefault(image, len(first)) for image in images])
        self._size = np.bincount(self._cluster).astype(np.float64)
        self.resamples, self.seed, self.level = resamples, seed, level

    @property
    def clusters(self) -> int:
        """Number of images."""
        return len(self._size)

    def means(self, scores: np.ndarray) -> np.ndarray:
        """Mean score of each resample: [n] -> [resamples], [n, M] -> [resamples, M]."""
        scores = np.asarray(scores, dtype=np.float64)
        columns = scores.reshape(len(scores), -1)
        assert len(columns) == len(self._cluster), "expected one score per question"
        clusters = len(self._size)
        sums = np.stack([np.bincount(self._cluster, column, clusters) for column in columns.T], axis=1)
        rng = np.random.Generator(np.random.Philox(self.seed))
        drawn, step = [], max(1, _CHUNK // clusters)
        for start in range(0, self.resamples, step):
            rows = min(step, self.resamples - start)
            picks = rng.integers(0, clusters, (rows, clusters)) + clusters * np.arange(rows)[:, None]
            times = np.bincount(picks.ravel(), minlength=rows * clusters).reshape(rows, clusters)
            drawn.append((times @ sums) / (times @ self._size)[:, None])
        return np.concatenate(drawn).reshape(self.resamples, *scores.shape[1:])

    def interval(self, scores: np.ndarray) -> Interval:
        """Mean of the scores [n] with its percentile interval."""
        return self.interval_of(np.mean(scores), self.means(scores))

    def difference(self, first: np.ndarray, second: np.ndarray) -> Difference:
        """Mean of `first - second` over the same questions [n], with interval and p value; see `difference_of`."""
        gap = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
        return self.difference_of(gap, self.means(gap))

    def interval_of(self, mean: float, drawn: np.ndarray) -> Interval:
        """The interval for given resampled means [resamples]."""
        tail = (1 - self.level) / 2
        low, high = np.quantile(drawn, (tail, 1 - tail))
        return Interval(float(mean), float(low), float(high))

    def difference_of(self, gap: np.ndarray, drawn: np.ndarray) -> Difference:
        """The mean of paired differences [n] with interval and p value, for given resampled means [resamples].

        Up to `EXACT_UP_TO` images the p value comes from `sign_flip` on the sums of the images. For more images it is
        twice the share of resamples on the other side of zero, with one added to numerator and denominator (Davison &
        Hinkley 1997, section 4.4), so that it is never below 2 / (resamples + 1).
        """
        gap = np.asarray(gap, dtype=np.float64)
        interval = self.interval_of(gap.mean(), drawn)
        if self.clusters <= EXACT_UP_TO:
            p = sign_flip(np.bincount(self._cluster, gap, self.clusters))
        else:
            rounding = 1e-12  # equal means of fractional scores may differ in the last bit
            far = min(np.count_nonzero(drawn <= rounding), np.count_nonzero(drawn >= -rounding))
            p = min(1.0, 2 * (far + 1) / (self.resamples + 1))
        return Difference(interval.mean, interval.low, interval.high, p)


def sign_flip(sums: np.ndarray) -> float:
    """Exact two-sided p value of a symmetric distribution of differences around 0, from their sums per image [K].

    Under this hypothesis the sum of each image has either sign with the same probability. p is the share of the 2^K
    sign assignments whose total is at least as far from zero as the observed one (Fisher 1935, section 21), so at least
    2 / 2^K. To count them, the images are split into halves with 2^(K/2) totals each.

    >>> sign_flip(np.ones(7))  # seven images, all positive
    0.015625
    """
    sums = np.asarray(sums, dtype=np.float64)
    sums = sums[sums != 0]  # zeros do not change any total
    if len(sums) > 2 * EXACT_UP_TO:
        raise ValueError(f"{len(sums)} images are too many for the exact test")
    half = len(sums) // 2
    left, right = np.sort(_totals(sums[:half])), _totals(sums[half:])
    found = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()  # equal totals may differ by rounding
    if found <= 0:
        return 1.0
    high = len(left) - np.searchsorted(left, found - right, side="left")
    low = np.searchsorted(left, -found - right, side="right")
    return float((high.sum() + low.sum()) / (len(left) * len(right)))


def _totals(sums: np.ndarray) -> np.ndarray:
    """The totals of all sign assignments [2^K]."""
    totals = np.zeros(1)
    for one in sums:
        totals = np.concatenate([totals + one, totals - one])
    return totals


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact two-sided p value of McNemar's test on correct/wrong answers [n] to the same questions.

    If both methods are equally good, a question that only one of them answers correctly is won by either with
    probability 1/2, so their number is binomial (McNemar 1947). The test assumes independent questions; if several
    share an image, `ImageBootstrap.difference` is safer.

    >>> mcnemar(np.array([1, 1, 1, 1, 1, 0]), np.array([0, 0, 0, 0, 0, 0]))  # five questions against none
    0.0625
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = np.count_nonzero(first & ~second), np.count_nonzero(second & ~first)
    return _binomial_two_sided(min(only_first, only_second), only_first + only_second)


@lru_cache(maxsize=4096)
def _binomial_two_sided(fewer: int, trials: int) -> float:
    """Probability that `trials` fair coin tosses split at least as unevenly as `fewer` to `trials - fewer`."""
    if 2 * fewer >= trials:
        return 1.0
    log_chances = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) - trials * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in log_chances))


def retention_above_chance(accuracy: float, floor: float, full: float) -> float | None:
    """Share of the accuracy gained by the image that remains: (accuracy - floor) / (full - floor).

    `floor` is the accuracy without the image. None if the image brings no gain (full <= floor).
    """
    return (accuracy - floor) / (full - floor) if full > floor else None


def loyalty(answers: Sequence[str], reference: Sequence[str]) -> float:
    """Share of questions [n] with the same answer as in `reference`, correct or not (EffiVLM-Bench)."""
    assert len(answers) == len(reference) > 0
    same = [a.strip().casefold() == b.strip().casefold() for a, b in zip(answers, reference, strict=True)]
    return sum(same) / len(same)


def compression_hard(full: np.ndarray, downsampled: np.ndarray) -> np.ndarray:
    """Mask [n] of the questions that need detail: correct with all tokens, wrong with an image downsampled to R tokens.

    Group A of VTC-Bench (arXiv 2510.07143). A score of at least 0.5 counts as correct.
    """
    return (np.asarray(full) >= 0.5) & (np.asarray(downsampled) < 0.5)


def spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation and range of one number per seed."""
    array = np.asarray(values, dtype=np.float64)
    deviation = float(array.std(ddof=1)) if len(array) > 1 else 0.0
    return Spread(float(array.mean()), deviation, float(array.min()), float(array.max()), len(array))
