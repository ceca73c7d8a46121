"""Estimates the cost of a round of labels: forward passes, FLOPs, hours, price, memory and disk space.

An estimate uses the model's architecture and the settings only, or also the time of a few samples on this device.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from evocomp.config.schema import RunConfig
from evocomp.data.example import Example
from evocomp.files import readable
from evocomp.labels.labeller import Labeller
from evocomp.labels.random_credit import mask_sizes
from evocomp.log import UserError, in_words, logger
from evocomp.mllm.context import split
from evocomp.mllm.features import Features

EFFICIENCY = 0.5
"""Assumed fraction of a GPU's peak FLOP/s that scoring reaches, if no samples are timed. Measured: 0.69 on an H100 with
LLaVA-1.5-7B and short questions, by the FLOP counted here, some of which the scorer skips."""


@dataclass(frozen=True)
class GPU:
    """peak: dense bf16 peak of the vendor's data sheet [FLOP/s]; memory [GB]; price: approximate rent [USD/hour]."""

    name: str
    peak: float
    memory: float
    price: float


GPUS = {
    "h200": GPU("H200", 989e12, 141, 3.5),
    "h100": GPU("H100", 989e12, 80, 2.5),
    "a100": GPU("A100", 312e12, 80, 1.5),
    "l40s": GPU("L40S", 362e12, 48, 1.0),
    "4090": GPU("RTX 4090", 165e12, 24, 0.5),
    "l4": GPU("L4", 121e12, 24, 0.5),
}
CPU = GPU("this CPU", 0, 0, 0)

_TEXT_DEFAULTS = {  # values missing from these families' configurations: defaults of transformers
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
_CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}
_LLAVA = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}, "vision_config": _CLIP}
KNOWN: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": _LLAVA,
    "llava-hf/llava-v1.6-vicuna-7b-hf": {**_LLAVA, "model_type": "llava_next"},
    "llava-hf/llava-v1.6-mistral-7b-hf": {
        **_LLAVA,
        "model_type": "llava_next",
        "text_config": {"model_type": "mistral", "vocab_size": 32064},
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "patch_size": 14},
    },
}
"""The parts of published configurations that costs depend on, for estimates without a download."""


@dataclass(frozen=True)
class Target:
    """Sizes of a multimodal LLM; tokens: visual tokens per image (N); tower: FLOP to encode an image."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tokens: int
    tower: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Target":
        """Sizes from the content of a config.json."""
        text = dict(config.get("text_config") or config)
        text = {**_TEXT_DEFAULTS.get(text.get("model_type", ""), {}), **text}
        try:
            heads = text["num_attention_heads"]
            tokens, tower = _vision(config)
            return cls(
                layers=text["num_hidden_layers"],
                hidden=text["hidden_size"],
                intermediate=text["intermediate_size"],
                heads=heads,
                kv_heads=text.get("num_key_value_heads") or heads,
                head_dim=text.get("head_dim") or text["hidden_size"] // heads,
                vocabulary=text.get("vocab_size", 32000),
                tokens=tokens,
                tower=tower,
            )
        except KeyError as error:
            raise UserError(f"cannot estimate costs: the model's config.json has no {error}; add it") from None

    @classmethod
    def named(cls, name: str, assets: Path) -> "Target":
        """Sizes of a known Hugging Face id, of `nano`, or of a folder with config.json."""
        if name in KNOWN:
            return cls.from_config(KNOWN[name])
        for folder in (assets / name, Path(name)):
            if (folder / "config.json").is_file():
                return cls.from_config(json.loads((folder / "config.json").read_text()))
        raise UserError(f"model.name={name}: give a folder with config.json, or one of {', '.join(KNOWN)}")

    @property
    def body(self) -> int:
        """Number of weights in the decoder layers' matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def forward(self, length: int, answer: int) -> float:
        """FLOP of a forward pass over `length` tokens with `answer` logit positions; causal attention counts half."""
        attention = 2 * length**2 * self.heads * self.head_dim * self.layers
        return 2.0 * self.body * length + attention + 2.0 * self.vocabulary * self.hidden * answer

    def weight_bytes(self) -> float:
        """Bytes of the bf16 weights with both embedding tables; the tower is assumed to add 2 %."""
        return 2.0 * (self.body + 2 * self.vocabulary * self.hidden) * 1.02


def _vision(config: Mapping[str, Any]) -> tuple[int, float]:
    """Visual tokens of an image and FLOP to encode it, at the usual resolution of the family."""
    vision, family = config.get("vision_config") or {}, config.get("model_type", "")
    width = vision.get("hidden_size", 1024)
    layers = vision.get("num_hidden_layers") or vision.get("depth", 24)
    weights = layers * (4 * width**2 + 2 * width * vision.get("intermediate_size", 4 * width))
    if family.startswith("qwen"):  # 896 x 896 pixels: 4096 patches, merged by four
        return 1024, 2.0 * 1.25 * weights * 4096
    per_tile = (vision.get("image_size", 336) // vision.get("patch_size", 14)) ** 2
    tiles = 5 if family in ("llava_next", "llava_onevision") else 1
    return per_tile * tiles, 2.0 * weights * per_tile * tiles


@dataclass(frozen=True)
class Workload:
    """Amount of scoring: samples, forward passes per sample (candidate masks), and sequence lengths [tokens].

    pool: number of questions that refreshes draw from; 0: the samples.
    """

    samples: int
    forwards: int
    text: int
    kept: int
    answer: int
    pool: int = 0


def at_random(config: RunConfig) -> bool:
    """Whether labels are credits from random masks."""
    return config.labels.target == "credit" and config.labels.credit_masks_from == "random"


def candidate_forwards(config: RunConfig, round: int = 0) -> int:
    """Maximum number of masks scored per sample in a round; repeated masks and `labels.probes` reduce it."""
    labels, search = config.labels, config.search
    if labels.target == "random":
        return 1 if round == 0 else 0
    if round:
        return labels.proposals if labels.target == "credit" else labels.generations_per_refresh * search.population
    if at_random(config):
        return len(labels.credit_sizes) * labels.credit_masks
    return 1 + search.population * (1 + search.generations)  # 1 for all tokens kept


# (upper limit of N, assumed number of groups / N for untuned vocabularies)
_GROUP_SHARE = ((600, 0.26), (1500, 0.20), (10**9, 0.18))


def assumed_workload(config: RunConfig, target: Target, samples: int, text: int, answer: int) -> Workload:
    """Workload without timed samples, with assumed numbers of groups. samples: number of training questions."""
    if at_random(config):
        kept = round(float(np.mean(mask_sizes(config.labels.credit_sizes, target.tokens))))
    else:
        share = next(share for limit, share in _GROUP_SHARE if target.tokens <= limit)
        kept = config.grouping.count or round(share * target.tokens)
    first = config.labels.labelled_at_first(samples)
    return Workload(first, candidate_forwards(config), text, kept, answer, samples)


@dataclass(frozen=True)
class Estimate:
    """Estimated cost: totals over all samples and all GPUs; memory and disk in bytes."""

    work: Workload
    gpu: GPU
    tokens: int  # visual tokens of an image
    flops: float
    seconds: float
    memory: float
    disk: float
    refresh: float = 0.0  # GPU-seconds per refresh
    timed: int = 0

    def report(self, gpus: int = 1) -> str:
        """The estimate as text."""
        work = self.work
        basis = f"{self.timed} samples timed here" if self.timed else f"calculated, assuming {EFFICIENCY:.0%} of peak"
        forwards = work.samples * work.forwards
        sequence = f"{work.text} text + {work.kept} of {self.tokens} visual + {work.answer} answer tokens"
        return "\n".join(
            [
                f"round 0 of {work.samples:,} samples on {self.gpu.name} ({basis})",
                f"  sequence    {sequence}",
                f"  forwards    {forwards:,} ({work.forwards} per sample)",
                f"  FLOPs       {self.flops:.3g} ({self.flops / max(1, work.samples):.3g} per sample)",
                *(self._on_cpu() if self.gpu is CPU else self._on_gpus(gpus)),
                f"  disk        at most {readable(self.disk)}",
            ]
        )

    def _on_cpu(self) -> list[str]:
        return [
            f"  time        {in_words(self.seconds)} ({self.work.samples / max(1e-9, self.seconds):.3g} labels/s)",
            f"  per refresh at most {in_words(self.refresh)} more",
            f"  memory      {readable(self.memory)}",
        ]

    def _on_gpus(self, gpus: int) -> list[str]:
        hours, speed = self.seconds / 3600, self.work.samples / max(1e-9, self.seconds)
        return [
            f"  GPU-hours   {hours:.3g} ({speed:.3g} labels/s per GPU)",
            f"  per refresh {self.refresh / 3600:.3g} GPU-hours more",
            f"  wall hours  {hours / gpus:.3g} on {gpus} GPU{'s' * (gpus > 1)}",
            f"  price       {hours * self.gpu.price:,.2f} USD at {self.gpu.price:g} USD/hour",
            f"  GPU memory  {readable(self.memory)}" + (f" of {self.gpu.memory:g} GB" if self.gpu.memory else ""),
        ]


def by_arithmetic(config: RunConfig, target: Target, work: Workload, gpu: GPU) -> Estimate:
    """Estimate from the model's sizes only."""
    length = work.text + work.kept + work.answer
    per_sample = work.forwards * target.forward(length, work.answer) + target.tower
    flops = work.samples * per_sample
    seconds = flops / (gpu.peak * EFFICIENCY) if gpu.peak else 0.0
    return Estimate(
        work,
        gpu,
        target.tokens,
        flops,
        seconds,
        _memory(config, target, length, work.answer),
        round_bytes(config, work.pool or work.samples, target.tokens),
        seconds * _refresh_share(config, work),
    )


def _refresh_share(config: RunConfig, work: Workload) -> float:
    """Forward passes of a refresh divided by those of round 0."""
    if config.labels.refresh == "none":
        return 0.0
    drawn = work.pool or work.samples
    if config.labels.refresh == "on_policy":
        drawn = min(drawn, config.labels.samples_per_refresh)
    return drawn * candidate_forwards(config, 1) / max(1, work.samples * work.forwards)


def by_timing(config: RunConfig, target: Target, labeller: Labeller, total: int, gpu: GPU, count: int = 3) -> Estimate:
    """Estimate for `total` training questions from timing.

    `count` samples (after one for warm-up) are labelled now; their labels are not stored. For credits from random masks
    a sample is an image with all its questions, because they are scored together.
    """
    by_image = at_random(config)
    pieces = [
        [example.id for example in group]
        for _, group in groupby(labeller.examples.values(), key=lambda one: one.image_id if by_image else one.id)
    ][: count + 1]
    seconds, made = [], []
    for ids in pieces:
        started = time.perf_counter()
        made += list(labeller.rounds.make(0, ids, labeller.encode, {}, None))
        seconds.append((time.perf_counter() - started) / len(ids))
    ids = [id for piece in pieces for id in piece]
    features = labeller.encode(ids)
    kept = [len(record["kept"]) if "kept" in record else _mean_size(config, target.tokens) for record in made]
    first = config.labels.labelled_at_first(total)
    work = Workload(
        first,
        candidate_forwards(config),
        text=round(float(np.mean([len(one.fixed_at) for one in features]))),
        kept=round(float(np.mean(kept))),
        answer=round(float(np.mean([len(one.answer_ids) for one in features]))),
        pool=total,
    )
    rough = by_arithmetic(config, replace(target, tokens=len(features[0].visual)), work, gpu)
    spent = first * float(np.mean(seconds[1:] or seconds))
    refresh = spent * _refresh_share(config, work)
    if config.labels.refresh == "on_policy":  # the questions about an image do not share its masks
        refresh = min(total, config.labels.samples_per_refresh) * _time_of_proposals(config, labeller, features)
    return replace(rough, seconds=spent, refresh=refresh, timed=max(1, len(ids) - len(pieces[0])))


def _time_of_proposals(config: RunConfig, labeller: Labeller, features: Sequence[Features]) -> float:
    """Seconds per question of an on-policy refresh in which all proposed masks are scored."""
    tokens, rng = len(features[0].visual), np.random.default_rng(0)
    same_size = [one for one in features if len(one.visual) == tokens]
    sizes = mask_sizes(config.labels.proposal_sizes, tokens)
    started = time.perf_counter()
    for size in sizes:
        drawn, context = split(size, tokens, config.compressor.sharp)
        order = rng.random((len(same_size), config.labels.proposals, tokens)).argsort(axis=-1)
        labeller.scorer.each(same_size, np.sort(order[..., :drawn]), context)
    return (time.perf_counter() - started) / len(sizes) / len(same_size)


def _mean_size(config: RunConfig, tokens: int) -> int:
    return round(float(np.mean(mask_sizes(config.labels.credit_sizes, tokens))))


def _memory(config: RunConfig, target: Target, length: int, answer: int) -> float:
    """Memory [bytes]: weights, one layer's activations for a batch of candidates, and the answers' float32 logits."""
    tokens = min(config.labels.batch, candidate_forwards(config)) * length
    activations = 2.0 * tokens * (6 * target.hidden + 3 * target.intermediate)
    logits = 2 * 4.0 * min(config.labels.batch, candidate_forwards(config)) * answer * target.vocabulary
    return target.weight_bytes() / max(1, config.model.shard) + activations + logits


def record_bytes(config: RunConfig, tokens: int, round: int = 0) -> float:
    """Maximum size of a sample's record [bytes]; the number of groups is unknown, so N is used instead."""
    labels = config.labels
    if labels.target == "credit" and round == 0:
        return 2.0 * tokens + 64
    if labels.target == "credit":  # proposed masks, each with advantage and log-probability
        sizes = mask_sizes(labels.proposal_sizes, tokens)
        drawn = max(split(size, tokens, config.compressor.sharp)[0] for size in sizes)
        return labels.proposals * (2.0 * drawn + 8.0) + 64
    masks = 1 if labels.target == "random" else config.search.population
    return 2.0 * tokens * (2 + masks) + 4.0 * masks + 64


def round_bytes(config: RunConfig, questions: int, tokens: int) -> float:
    """Maximum size of a round of the store [bytes] for that many training questions."""
    labels = config.labels
    first = labels.labelled_at_first(questions) * record_bytes(config, tokens)
    if labels.refresh != "on_policy":
        return first
    drawn = min(questions, labels.samples_per_refresh)
    return max(first, drawn * record_bytes(config, tokens, 1) + (questions - drawn) * 64.0)  # the others stay empty


def say_disk_use(config: RunConfig, questions: int, tokens: int, folder: Path) -> None:
    """Log the disk space that the labels need, and warn if there may not be enough."""
    per_round, free = round_bytes(config, questions, tokens), shutil.disk_usage(folder).free
    rounds = 1 if config.labels.refresh == "none" else 2  # a refresh reads the previous round
    logger.info("labels: at most %s per round in %s, %s free", readable(per_round), folder, readable(free))
    if rounds * per_round > free:
        logger.warning(
            "%d rounds may need %s, more than is free: set --labels.dir to a folder on a larger disk; a full disk "
            "stops the run without damaging the store",
            rounds,
            readable(rounds * per_round),
        )


def text_lengths(examples: Sequence[Example]) -> tuple[int, int]:
    """Mean number of text and answer tokens, assuming four characters per token and a template of 35 tokens."""
    if not examples:
        return 85, 5
    prompts = [len(e.prompt) + sum(len(q) + len(a) for q, a in e.history) for e in examples]
    return 35 + round(np.mean(prompts) / 4), max(1, round(np.mean([len(e.answer) for e in examples]) / 4))
