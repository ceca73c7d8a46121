"""Label search against a straightforward implementation: one forward pass of transformers per mask, with all logits.

Both search with the same strategy and random numbers. On CPUs, CPU time is measured, because wall time would include
other jobs on the machine.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from evocomp.bench.samples import Sample, middle_sample, nano_samples
from evocomp.bench.timing import Clock, compare, compare_all, environment, measure
from evocomp.config.schema import ScorerConfig
from evocomp.scoring.scorer import CandidateScorer
from evocomp.search import HillClimb, Published, SearchResult, Strategy
from evocomp.search import run as search
from evocomp.search.genome import random_genomes, stream

Row = dict[str, Any]
Score = Callable[[np.ndarray], np.ndarray]

NONE = ScorerConfig(
    batched=False,
    answers_only=False,
    shared_prefix="never",
    own_pass=False,
    last_layer_at_answers=False,
    first_layer_once=False,
    onednn=False,
    memo=False,
    prefix_reuse="never",
    fit_memory=False,
)
"""All optimizations off."""

LADDER: list[tuple[str, dict[str, Any]]] = [
    ("no saving", {}),
    ("+ head at the answer only", {"answers_only": True}),
    ("+ candidates in one forward", {"batched": True}),
    ("+ batch sized to memory", {"fit_memory": True}),
    ("+ text before the image once", {"shared_prefix": "auto"}),
    ("+ own forward pass of the layers", {"own_pass": True}),
    ("+ last layer at the answer only", {"last_layer_at_answers": True}),
    ("+ first layer once per token", {"first_layer_once": True}),
    ("+ oneDNN", {"onednn": True}),
]
"""The ablation: each row adds an optimization to those of the rows above. Memo and prefix reuse have separate rows."""


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Maximum difference of two losses, relative and in nats. The row has the measured difference."""

ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""The same for all masks of a search, also those with a high loss; the largest observed bfloat16 error is 0.054."""

GAP = {dtype: 2 * error for dtype, error in ERROR.items()}
"""Maximum difference in loss, in nats and relative, of two masks that the implementations may rank differently, because
each loss may have an error of `ERROR`."""

SEARCHES = 20
"""Number of questions whose best masks are compared."""


def run(device: str = "cpu", repeats: int = 3, quick: bool = False) -> list[Row]:
    """Measure all rows; `quick` runs minimal searches, for tests.

    Raises:
        AssertionError: the implementations gave different losses for the same mask.
    """
    # one thread, because times with several threads depend on other jobs of the machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return list(_rows(device, repeats, quick))
    finally:
        torch.set_num_threads(threads)


def _rows(device: str, repeats: int, quick: bool) -> Iterator[Row]:
    middle, nano = middle_sample(device, *((24, 2) if quick else ())), nano_samples(2 if quick else SEARCHES, device)
    effort = {"q": 5, "p": 2, "generations": 1} if quick else {"q": 8, "p": 3, "generations": 2}
    yield search_row(middle, "removed", device, repeats, **effort)
    yield search_row(middle, "removed", device, repeats, dtype="bfloat16", **effort)
    yield search_row(middle, "masked", device, min(2, repeats), **(effort | {"generations": 1}))
    full = effort if quick else {"q": 48, "p": 12, "generations": 10}
    for sample in nano[:1] if quick else nano[:2]:
        yield search_row(sample, "removed", device, repeats, **full)
    yield from ablation(middle, device, repeats, candidates=2 if quick else 8)
    yield memo_row(nano[0], device, repeats, **full)
    yield flips_row(middle, device, repeats, q=6 if quick else 16)
    for dtype in (None, "bfloat16"):
        yield best_masks(nano[: 1 if quick else SEARCHES], device, dtype=dtype, **full)
    for sample, q in ((nano[0], (4, 8) if quick else (12, 24, 48)), (middle, (2, 4) if quick else (8, 16, 32))):
        yield from slopes(sample, device, q)


def search_row(
    sample: Sample,
    counterpart: str,
    device: str,
    repeats: int,
    q: int,
    p: int,
    generations: int,
    dtype: str | None = None,
) -> Row:
    """A full search with both implementations; the scorer in `dtype`, by default that of the model."""
    straight: Score = getattr(sample, counterpart)
    scorer = CandidateScorer(sample.mllm, dtype=dtype)
    names = {
        "removed": "one HF forward per mask, all logits, dropped tokens removed",
        "masked": "one HF forward per mask from pixels, all logits, dropped tokens masked",
    }
    strategy = Published(q=q, p=p)
    return compare(
        "label search",
        f"{_sizes(sample)} q={q} L={generations}",
        (names[counterpart], lambda: _search(sample, strategy, straight, generations, remember=False)),
        (
            f"scorer, {dtype}" if dtype else "scorer",
            lambda: _search(sample, strategy, _scored(scorer, sample), generations),
        ),
        lambda a, b: same_best(sample, a, b, TOLERANCE[scorer.losses.dtype]),
        device,
        repeats,
        _clock(device),
    )


def ablation(sample: Sample, device: str, repeats: int, candidates: int) -> Iterator[Row]:
    """Losses of one population, adding one optimization at a time, each against the straightforward implementation."""
    rng = stream(0, 1, 0)
    kept = sample.groups.kept(random_genomes(sample.groups.sizes, rng, candidates))
    settings, ways = NONE, []
    for name, saving in LADDER:
        settings = replace(settings, **saving)
        scorer = CandidateScorer(sample.mllm, settings=settings)
        ways.append((name, lambda scorer=scorer: scorer(sample.features, kept)))
    yield from compare_all(
        "ablation",
        f"{_sizes(sample)} q={candidates}",
        ("one HF forward per mask, all logits, dropped tokens removed", lambda: sample.removed(kept)),
        ways,
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        device,
        repeats,
        _clock(device),
    )


def memo_row(sample: Sample, device: str, repeats: int, q: int, p: int, generations: int) -> Row:
    """A search that remembers scored masks against one that does not."""
    scorer = CandidateScorer(sample.mllm)
    score, strategy = _scored(scorer, sample), Published(q=q, p=p)
    return compare(
        "memo",
        f"{_sizes(sample)} q={q} L={generations}",
        ("every candidate scored", lambda: _search(sample, strategy, score, generations, remember=False)),
        ("no mask scored twice", lambda: _search(sample, strategy, score, generations)),
        lambda a, b: same_best(sample, a, b),
        device,
        repeats,
        _clock(device),
    )


def flips_row(sample: Sample, device: str, repeats: int, q: int) -> Row:
    """Local search with and without reuse of the keys and values that its candidates share."""
    scorer = CandidateScorer(sample.mllm, settings=ScorerConfig(prefix_reuse="always"))
    strategy = HillClimb(q=q)
    plain, reused = _scored(scorer, sample), _scored(scorer, sample, flips=True)
    return compare(
        "hill_climb",
        f"{_sizes(sample)} q={q} L=2",
        ("full candidates", lambda: _search(sample, strategy, plain, 2)),
        ("kept tokens before the flip once", lambda: _search(sample, strategy, reused, 2)),
        lambda a, b: same_best(sample, a, b),
        device,
        repeats,
        _clock(device),
    )


def slopes(sample: Sample, device: str, candidates: tuple[int, ...]) -> Iterator[Row]:
    """Growth of time with candidates, generations and samples: slopes in log-log scale, 1 is linear.

    A forward pass over few short sequences does not fill the device, so that its time grows less than linearly.
    """
    scorer, least = CandidateScorer(sample.mllm), candidates[0]

    def once(q: int = least, generations: int = 2, samples: int = 1) -> Callable[[], Any]:
        strategy = Published(q=q, p=max(1, least // 3))
        return lambda: [
            _search(sample, strategy, _scored(scorer, sample), generations, remember=False) for _ in range(samples)
        ]

    for name, sizes, work in (
        ("q", candidates, lambda v: once(q=v)),
        ("L + 1", (2, 4, 8), lambda v: once(generations=v - 1)),
        ("samples", (1, 2, 4), lambda v: once(samples=v)),
    ):
        seconds = [measure(work(v), device, _clock(device)) for v in sizes]
        slope = float(np.polyfit([math.log(v) for v in sizes], [math.log(s) for s in seconds], 1)[0])
        yield {
            "bench": f"growth with {name}",
            "shape": f"{_sizes(sample)} {name}={','.join(map(str, sizes))}",
            "baseline": "linear",
            "ours": "fitted slope of log time",
            "ratio": slope,
            **environment(device),
        }


def same_best(sample: Sample, one: SearchResult, other: SearchResult, tolerance: float = 1e-5) -> Row:
    """Whether both found the same mask, and the difference of the losses by the straightforward implementation.

    Many masks tie within rounding, and the last bits decide which of them a search follows: it may end in another local
    optimum. `ranked_alike` distinguishes this from an error.

    Raises:
        AssertionError: the loss of a search differs from that of the straightforward implementation.
    """
    losses = sample.removed(np.stack([one.kept, other.kept]))
    np.testing.assert_allclose([one.loss, other.loss], losses, rtol=tolerance, atol=tolerance)
    same = bool(np.array_equal(one.kept, other.kept))
    return {"same_best_mask": same, "largest_difference": 0.0 if same else abs(float(losses[0] - losses[1]))}


def ranked_alike(straight: SearchResult, other: SearchResult, dtype: torch.dtype) -> float:
    """Check that two searches with the same random numbers diverge at a tie only. Returns the largest difference in
    loss [nats] of two masks that they ranked differently before they diverged, 0 if there are none.

    Until they diverge, both have scored the same masks, and a search depends on ranks only.

    Args:
        straight: reference, whose losses are taken as exact.
        dtype: number format of the losses of `other`, for `ERROR` and `GAP`.

    Raises:
        AssertionError: before they diverge, a mask has two different losses; or two masks are ranked differently that
            differ by more than `GAP`; or no masks are, so that something other than the losses decided.
    """
    shared = min(len(straight.scored_kept), len(other.scored_kept))
    differ = (straight.scored_kept[:shared] != other.scored_kept[:shared]).any(axis=1)
    until = int(differ.argmax()) if differ.any() else shared
    one, two = straight.scored_losses[:until].astype(np.float64), other.scored_losses[:until].astype(np.float64)
    np.testing.assert_allclose(two, one, rtol=ERROR[dtype], atol=ERROR[dtype])
    difference = one[:, None] - one
    swapped = np.sign(difference) != np.sign(two[:, None] - two)
    diverged = until < max(len(straight.scored_kept), len(other.scored_kept))
    assert swapped.any() or not diverged, "two searches diverge although they rank all masks equally"
    allowed = GAP[dtype] * (1 + np.maximum(one[:, None], one))
    difference = np.abs(difference)
    assert (difference[swapped] <= allowed[swapped]).all(), "two implementations rank masks differently that do not tie"
    return float(difference[swapped].max(initial=0.0))


def best_masks(samples: list[Sample], device: str, q: int, p: int, generations: int, dtype: str | None = None) -> Row:
    """How often both implementations lead a search to the same mask, and to masks of equal loss (1e-5).

    Different results are allowed only after ties, otherwise the benchmark fails: every mask of the straightforward
    search is scored by both, and the searches may diverge only at masks whose losses differ by at most `GAP`.

    Raises:
        AssertionError: see `ranked_alike` and `same_best`; or a mask has two different losses.
    """
    rows, ties, errors = [], [], []
    for sample in samples:
        scorer = CandidateScorer(sample.mllm, dtype=dtype)
        straight, ours = (
            _search(sample, Published(q=q, p=p), score, generations)
            for score in (sample.removed, _scored(scorer, sample))
        )
        again = scorer(sample.features, straight.scored_kept)
        error = ERROR[scorer.losses.dtype]
        np.testing.assert_allclose(again, straight.scored_losses, rtol=error, atol=error)
        errors.append(float(np.abs(again - straight.scored_losses).max()))
        ties.append(ranked_alike(straight, ours, scorer.losses.dtype))
        rows.append(same_best(sample, straight, ours, TOLERANCE[scorer.losses.dtype]))
    return {
        "bench": "best masks",
        "shape": f"{_sizes(samples[0])} q={q} L={generations} searches={len(samples)}",
        "baseline": "one HF forward per mask, all logits, dropped tokens removed",
        "ours": "fraction of searches that end in the same mask" + (f", {dtype}" if dtype else ""),
        "ratio": float(np.mean([row["same_best_mask"] for row in rows])),
        "equal_loss": float(np.mean([row["largest_difference"] <= 1e-5 for row in rows])),
        "largest_difference": max(row["largest_difference"] for row in rows),
        "largest_tie": max(ties),
        "largest_error": max(errors),
        **environment(device),
    }


def _search(sample: Sample, strategy: Strategy, score: Score, generations: int, remember: bool = True) -> SearchResult:
    return search(strategy, sample.groups, score, stream(0, 7, 0), generations, remember=remember)


def _scored(scorer: CandidateScorer, sample: Sample, flips: bool = False) -> Score:
    return lambda kept: scorer(sample.features, kept, flips)


def _sizes(sample: Sample) -> str:
    f = sample.features
    before = int(f.visual_at[0])
    after = len(f.prompt_ids) - len(f.visual) - before + len(f.answer_ids)
    return f"{sample.mllm.name} N={len(f.visual)} R={sample.groups.count} text={before}+{after}"


def _clock(device: str) -> Clock:
    return "process" if torch.device(device).type == "cpu" else "wall"
