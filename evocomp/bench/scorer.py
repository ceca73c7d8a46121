"""The candidate scorer at the sizes of real models, against one HF forward pass per mask and the arithmetic bound.

Weights are random, so only losses are compared, not searches: in bfloat16, candidates differ by less than rounding.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from evocomp.bench import label_search
from evocomp.bench.label_search import LADDER, NONE, TOLERANCE, Row
from evocomp.bench.samples import Sample
from evocomp.bench.timing import ceilings, compare_all, each
from evocomp.config.schema import ScorerConfig
from evocomp.grouping.groups import Groups
from evocomp.labels.estimate import Target
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.sizes import ModelShape, random_features, random_model, shape_named
from evocomp.scoring.scorer import CandidateScorer
from evocomp.search.genome import random_genomes, stream

Timed = tuple[str, Callable[[], np.ndarray]]

QUESTIONS = 8
"""Number of questions about one image in the benchmark of shared scoring."""


def at_shape(name: str, device: str, repeats: int = 3, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of one model of `sizes.SHAPES` as they are measured.

    Raises:
        UserError: an unknown name.
        AssertionError: losses of two implementations differ by more than `TOLERANCE`.
    """
    shape = shape_named(name)
    mllm = FrozenMLLM(random_model(shape, device), processor=None, name=name)
    sample = Sample(mllm, random_features(mllm, shape), None, random_groups(shape))
    count = 6 if quick else 48
    yield from _rows(sample, shape, device, repeats, count)


def _rows(sample: Sample, shape: ModelShape, device: str, repeats: int, count: int) -> Iterator[Row]:
    features = sample.features
    masks = sample.groups.kept(random_genomes(sample.groups.sizes, stream(0, 1, 0), count))
    scorer = CandidateScorer(sample.mllm, settings=ScorerConfig(prefix_reuse="always"))
    straight = ("one HF forward per mask, all logits, dropped tokens removed", lambda: sample.removed(masks))
    sizes = label_search._sizes(sample)

    def rows(bench: str, baseline: Timed, *ways: Timed, count: int = count) -> list[Row]:
        agree = partial(_agree, TOLERANCE[sample.mllm.vocabulary.dtype])
        clock = "process" if torch.device(device).type == "cpu" else "wall"
        return compare_all(bench, f"{sizes} q={count}", baseline, ways, agree, device, repeats, clock)

    def main() -> Iterator[Row]:
        found = rows("scorer", straight, ("scorer", lambda: scorer(features, masks)))[0]
        flop, (rate, copied) = scoring_flop(target_of(sample.mllm), shape, masks.shape), ceilings(device)
        floor = 1e3 * flop / rate
        forwards = 11 * 48  # of the published search
        yield found | {
            "floor_ms": floor,
            "floor_share": floor / found["ours_ms"],
            "ceiling_tflops": rate / 1e12,
            "ceiling_copy_gbs": copied / 1e9,
            "labels_per_hour": 3600e3 / (forwards / count * found["ours_ms"]),
        }

    def flips() -> Iterator[Row]:
        near = one_flip(sample, count)
        plain = ("full candidates", lambda: scorer(features, near))
        reused = ("kept tokens before the flip once", lambda: scorer(features, near, True))
        yield from rows("one-flip candidates", plain, reused)

    def shared() -> Iterator[Row]:
        questions, some = asked_again(features), masks[: max(2, count // 4)]
        separate = ("questions separately", lambda: np.stack([scorer(one, some) for one in questions]))
        together = (f"{QUESTIONS} questions together", lambda: scorer.shared(questions, some))
        yield from rows("shared scoring", separate, together, count=len(some))

    def ablation() -> Iterator[Row]:
        few = masks[: max(2, count // 4)]
        ways = []
        for name, settings in ladder(sample):
            own = CandidateScorer(sample.mllm, settings=settings)
            ways.append((name, lambda own=own: own(features, few)))
        yield from rows("ablation", (straight[0], lambda: sample.removed(few)), *ways, count=len(few))

    return each([main, flips, shared, ablation])


def ladder(sample: Sample) -> Iterator[tuple[str, ScorerConfig]]:
    """Settings with one more optimization each, limited to those that affect this model on its device."""
    own_pass = type(CandidateScorer(sample.mllm).losses.body).__name__ == "LlamaBody"
    settings = NONE
    for name, saving in LADDER:
        settings = replace(settings, **saving)
        needs_own_pass = {"own_pass", "last_layer_at_answers", "first_layer_once", "onednn"} & set(saving)
        if not ("onednn" in saving and sample.mllm.device.type == "cuda") and (own_pass or not needs_own_pass):
            yield name, settings


def target_of(mllm: FrozenMLLM) -> Target:
    """The model's sizes, from which costs are estimated."""
    return Target.from_config(mllm.model.config.to_dict())


def scoring_flop(target: Target, shape: ModelShape, masks: tuple[int, int]) -> float:
    """Necessary arithmetic for Q masks of R kept tokens if the text before the image is computed once [FLOP].

    In the last layer, queries, output and MLP are needed at the answer's tokens only.
    """
    count, kept = masks
    length = shape.before + kept + shape.after - 1
    own, answer = length - shape.before, shape.answer
    keys = 2 * target.hidden * target.kv_heads * target.head_dim
    layer = target.body / target.layers
    linear = (target.layers - 1) * (layer * own) + keys * own + (layer - keys) * answer
    pairs = (length**2 - shape.before**2) / 2 * (target.layers - 1) + answer * length
    attention = 4 * pairs * target.heads * target.head_dim
    return count * (2 * linear + attention + 2 * target.vocabulary * target.hidden * answer)


def random_groups(shape: ModelShape) -> Groups:
    """Random groups, as many as the shape specifies."""
    groups = np.random.default_rng(0).integers(0, shape.groups, shape.tokens)
    groups[: shape.groups] = np.arange(shape.groups)  # no group is empty
    return Groups.from_ids(groups)


def one_flip(sample: Sample, count: int) -> np.ndarray:
    """Masks [count, R] that differ from one mask in one kept token each."""
    rng, groups = np.random.default_rng(0), sample.groups
    genomes = np.repeat(random_genomes(groups.sizes, stream(0, 2, 0), 1), count, axis=0)
    movable = np.flatnonzero(groups.sizes > 1)
    chosen = rng.choice(movable, count)
    genomes[np.arange(count), chosen] = (genomes[0, chosen] + 1) % groups.sizes[chosen]
    return groups.kept(genomes)


def asked_again(features: Features) -> list[Features]:
    """`QUESTIONS` questions about the same image, with different text after it."""
    end = int(features.visual_at[-1]) + 1
    rows = []
    for number in range(QUESTIONS):
        tail = features.prompt_ids[end:].roll(number)
        ids = torch.cat([features.prompt_ids[:end], tail])
        rows.append(replace(features, id=number, prompt_ids=ids, answer_ids=features.answer_ids.roll(number)))
    return rows


def _agree(tolerance: float, one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    np.testing.assert_allclose(other, one, rtol=tolerance, atol=tolerance)
    return {"largest_difference": float(np.abs(one - other).max()), "spread": float(one.std())}
