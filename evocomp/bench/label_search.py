"""Label search against what one would write first: one forward of transformers' model for each mask, all logits.

Both ways search with the same strategy and random numbers and must find the same best mask. Times are CPU time on
CPUs, where other jobs on the machine would otherwise be counted.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evocomp.bench.timing import compare, environment, measure
from evocomp.config.schema import ScorerConfig
from evocomp.data.scenes import scene_examples
from evocomp.grouping.groups import Groups
from evocomp.grouping.vocabulary import vocabulary_groups
from evocomp.labels.scorer import CandidateScorer
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.nano import build_nano, nano_config
from evocomp.mllm.sequences import continued
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
    prefix_reuse=False,
    fit_memory=False,
)
"""Every saving off."""

LADDER: list[tuple[str, dict[str, Any]]] = [
    ("no saving", {}),
    ("+ head at the answer only", {"answers_only": True}),
    ("+ candidates in one forward", {"batched": True}),
    ("+ batch sized to memory", {"fit_memory": True}),
    ("+ text before the picture once", {"shared_prefix": "auto"}),
    ("+ own pass over the layers", {"own_pass": True}),
    ("+ last layer at the answer only", {"last_layer_at_answers": True}),
    ("+ first layer once a token", {"first_layer_once": True}),
    ("+ oneDNN", {"onednn": True}),
]
"""The ablation: each row has the savings of the rows above it too. Memo and prefix reuse have rows of their own."""


@dataclass
class Sample:
    """A question about a picture, as the scorer gets it and as a user of transformers would hold it."""

    mllm: FrozenMLLM
    features: Features
    pixels: Tensor | None
    groups: Groups

    def removed(self, kept: np.ndarray) -> np.ndarray:
        """The straightforward way with care: features encoded once, dropped tokens cut out, one forward a mask."""
        f, model, embeds = self.features, self.mllm.model, self._embeds()
        losses = []
        for row in torch.from_numpy(kept).long().to(f.visual.device):
            places = torch.cat([f.text_at, f.visual_at[row]]).sort().values
            places = torch.cat([places, len(f.prompt_ids) + self._answer_places()])
            positions = continued(f.positions, len(f.prompt_ids) + len(f.answer_ids))[..., None, places]
            losses.append(self._loss(model, inputs_embeds=embeds[places][None], position_ids=positions))
        return np.array(losses, dtype=np.float32)

    def masked(self, kept: np.ndarray) -> np.ndarray:
        """The straightforward way without: picture and prompt into the model, dropped tokens masked away."""
        f = self.features
        ids = torch.cat([f.prompt_ids, f.answer_ids])[None]
        losses = []
        for row in torch.from_numpy(kept).long().to(ids.device):
            seen = torch.ones_like(ids)
            seen[0, f.visual_at] = 0
            seen[0, f.visual_at[row]] = 1
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            losses.append(
                self._loss(
                    self.mllm.model,
                    input_ids=ids,
                    pixel_values=self.pixels,
                    attention_mask=seen,
                    position_ids=positions,
                )
            )
        return np.array(losses, dtype=np.float32)

    @torch.no_grad()
    def _loss(self, model: nn.Module, **inputs: Tensor) -> float:
        if "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["inputs_embeds"][..., 0], dtype=torch.long)
        logits = model(**inputs, use_cache=False).logits[0].float()
        answer = self.features.answer_ids
        return float(F.cross_entropy(logits[-len(answer) - 1 : -1], answer))

    def _answer_places(self) -> Tensor:
        return torch.arange(len(self.features.answer_ids), device=self.features.visual.device)

    def _embeds(self) -> Tensor:
        f = self.features
        embeds = self.mllm.embed(torch.cat([f.prompt_ids.index_fill(0, f.visual_at, 0), f.answer_ids])).detach()
        embeds[f.visual_at] = f.visual.to(embeds.dtype)
        return embeds


def middle_sample(device: str = "cpu", groups: int = 120, answer: int = 5) -> Sample:
    """LLaVA with random weights: LLaMA of 4 layers x 256, 32,000 words, 576 visual tokens, 35 + 60 of text."""
    config = nano_config(image_size=336, patch=14, width=256, layers=4, heads=4)
    config.text_config.vocab_size = 32_000
    generator = torch.Generator().manual_seed(0)
    model = build_nano(config, generator).eval().to(device)
    mllm = FrozenMLLM(model, processor=None, name="random LLaMA")
    words = torch.randint(10, 32_000, (95,), generator=generator)
    picture = torch.full((576,), config.image_token_index)
    ids = torch.cat([words[:35], picture, words[35 : 95 - answer]])
    pixels = torch.randn(1, 3, 336, 336, generator=generator).to(device)
    with torch.no_grad():
        visual = model.base_model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
    features = Features(
        id=0,
        image_id="random",
        visual=visual,
        prompt_ids=ids.to(device),
        visual_at=torch.arange(35, 35 + 576, device=device),
        positions=torch.arange(len(ids), device=device),
        answer_ids=words[95 - answer :].to(device),
        image_numbers=torch.zeros(576, dtype=torch.long, device=device),
    )
    owners = np.random.default_rng(0).integers(0, groups, 576)
    return Sample(mllm, features, pixels, Groups.from_ids(owners))


def nano_samples(count: int, device: str = "cpu") -> list[Sample]:
    """Questions for the shipped MLLM, with the groups that labelling would make."""
    mllm = FrozenMLLM.load("nano", device=device)
    examples = scene_examples(seed=515151, start=0, count=count)
    examples = list({example.image_id: example for example in examples}.values())[:count]
    return [
        Sample(mllm, features, None, vocabulary_groups(features.visual, mllm.vocabulary))
        for features in mllm.features(examples)
    ]


# ---------------------------------------------------------------- measurements


def run(device: str = "cpu", repeats: int = 3, quick: bool = False) -> list[Row]:
    """All rows; `quick` searches as little as still makes sense, for tests.

    Raises:
        AssertionError: two ways found different best masks, or other losses.
    """
    # on one thread: times of several are those of the machine's other jobs
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return list(_rows(device, repeats, quick))
    finally:
        torch.set_num_threads(threads)


def _rows(device: str, repeats: int, quick: bool) -> Iterator[Row]:
    middle, nano = middle_sample(device, *((24, 2) if quick else ())), nano_samples(2, device)
    effort = {"q": 5, "p": 2, "generations": 1} if quick else {"q": 8, "p": 3, "generations": 2}
    yield search_row(middle, "removed", device, repeats, **effort)
    yield search_row(middle, "masked", device, min(2, repeats), **(effort | {"generations": 1}))
    full = effort if quick else {"q": 48, "p": 12, "generations": 10}
    for sample in nano[:1] if quick else nano:
        yield search_row(sample, "removed", device, repeats, **full)
    yield from ablation(middle, device, repeats, candidates=2 if quick else 8)
    yield memo_row(nano[0], device, repeats, **full)
    yield flips_row(middle, device, repeats, q=6 if quick else 16)
    yield from slopes(nano[0], device, quick)


def search_row(sample: Sample, counterpart: str, device: str, repeats: int, q: int, p: int, generations: int) -> Row:
    """A whole search both ways."""
    straight: Score = getattr(sample, counterpart)
    scorer = CandidateScorer(sample.mllm)
    names = {
        "removed": "one HF forward a mask, all logits, dropped tokens removed",
        "masked": "one HF forward a mask from pixels on, all logits, dropped tokens masked",
    }
    strategy = Published(q=q, p=p)
    return _timed(
        "label search",
        f"{_sizes(sample)} q={q} L={generations}",
        (names[counterpart], lambda: _search(sample, strategy, straight, generations, remember=False)),
        ("scorer", lambda: _search(sample, strategy, _scored(scorer, sample), generations)),
        lambda a, b: same_best(sample, a, b),
        device,
        repeats,
    )


def ablation(sample: Sample, device: str, repeats: int, candidates: int) -> Iterator[Row]:
    """Losses of one population, saving by saving, each against the straightforward way."""
    rng = stream(0, 1, 0)
    kept = sample.groups.kept(random_genomes(sample.groups.sizes, rng, candidates))
    settings = NONE
    for name, saving in LADDER:
        settings = replace(settings, **saving)
        scorer = CandidateScorer(sample.mllm, settings=settings)
        yield _timed(
            "ablation",
            f"{_sizes(sample)} q={candidates}",
            ("one HF forward a mask, all logits, dropped tokens removed", lambda: sample.removed(kept)),
            (name, lambda scorer=scorer: scorer(sample.features, kept)),
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            device,
            repeats,
        )


def memo_row(sample: Sample, device: str, repeats: int, q: int, p: int, generations: int) -> Row:
    """A search that remembers scored masks against one that does not."""
    scorer = CandidateScorer(sample.mllm)
    score, strategy = _scored(scorer, sample), Published(q=q, p=p)
    return _timed(
        "memo",
        f"{_sizes(sample)} q={q} L={generations}",
        ("every candidate scored", lambda: _search(sample, strategy, score, generations, remember=False)),
        ("no mask scored twice", lambda: _search(sample, strategy, score, generations)),
        lambda a, b: same_best(sample, a, b),
        device,
        repeats,
    )


def flips_row(sample: Sample, device: str, repeats: int, q: int) -> Row:
    """Local search with and without the keys and values of what its candidates have in common."""
    scorer = CandidateScorer(sample.mllm)
    strategy = HillClimb(q=q)
    plain, reused = _scored(scorer, sample), _scored(scorer, sample, flips=True)
    return _timed(
        "hill_climb",
        f"{_sizes(sample)} q={q} L=2",
        ("whole candidates", lambda: _search(sample, strategy, plain, 2)),
        ("kept tokens before the flip once", lambda: _search(sample, strategy, reused, 2)),
        lambda a, b: same_best(sample, a, b),
        device,
        repeats,
    )


def slopes(sample: Sample, device: str, quick: bool) -> Iterator[Row]:
    """How CPU time grows with candidates, generations and samples: slopes of its logarithm, 1 is linear."""
    scorer = CandidateScorer(sample.mllm)
    values = (4, 8) if quick else (12, 24, 48)

    def once(q: int = 12, generations: int = 2, samples: int = 1) -> Callable[[], Any]:
        strategy = Published(q=q, p=4 if q > 4 else 2)
        return lambda: [
            _search(sample, strategy, _scored(scorer, sample), generations, remember=False) for _ in range(samples)
        ]

    for name, sizes, work in (
        ("q", values, lambda v: once(q=v)),
        ("L + 1", (2, 4, 8), lambda v: once(generations=v - 1)),
        ("samples", (1, 2, 4), lambda v: once(samples=v)),
    ):
        seconds = [measure(work(v), device, "process" if device == "cpu" else "wall") for v in sizes]
        slope = float(np.polyfit([math.log(v) for v in sizes], [math.log(s) for s in seconds], 1)[0])
        yield {
            "bench": f"growth with {name}",
            "shape": f"{_sizes(sample)} {name}={','.join(map(str, sizes))}",
            "baseline": "linear",
            "ours": "fitted slope of log time",
            "ratio": slope,
            **environment(device),
        }


def same_best(sample: Sample, one: SearchResult, other: SearchResult) -> None:
    """The same best mask, or another one that the straightforward way gives the same loss: a tie in rounding."""
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5, atol=1e-5)
    if not np.array_equal(one.kept, other.kept):
        losses = sample.removed(np.stack([one.kept, other.kept]))
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def _search(
    sample: Sample, strategy: Strategy, score: Score, generations: int, remember: bool = True
) -> SearchResult:
    return search(strategy, sample.groups, score, stream(0, 7, 0), generations, remember=remember)


def _scored(scorer: CandidateScorer, sample: Sample, flips: bool = False) -> Score:
    return lambda kept: scorer(sample.features, kept, flips)


def _sizes(sample: Sample) -> str:
    f = sample.features
    before = int(f.visual_at[0])
    after = len(f.prompt_ids) - len(f.visual) - before + len(f.answer_ids)
    return f"{sample.mllm.name} N={len(f.visual)} R={sample.groups.count} text={before}+{after}"


def _timed(
    bench: str,
    shape: str,
    baseline: tuple[str, Callable[[], Any]],
    ours: tuple[str, Callable[[], Any]],
    agree: Callable[[Any, Any], None],
    device: str,
    repeats: int,
) -> Row:
    same: list[bool] = []

    def checked(a: Any, b: Any) -> None:
        agree(a, b)
        if isinstance(a, SearchResult):
            same.append(bool(np.array_equal(a.kept, b.kept)))

    clock = "process" if torch.device(device).type == "cpu" else "wall"
    row = compare(bench, shape, baseline, ours, checked, device, repeats, clock)
    return row | ({"same_best_mask": same[0]} if same else {})
