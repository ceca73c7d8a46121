"""A training step of the compressor with the ops of this project, against the same step with straightforward losses."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evocomp.bench.ops import eager_ghm, pairwise_separation
from evocomp.bench.timing import compare, environment, measure, peak_memory
from evocomp.compressor.model import EvoCompCompressor
from evocomp.mllm.nano import build_nano, nano_config
from evocomp.mllm.sizes import random_model, shape_named
from evocomp.ops import cosine_separation, ghm_bce

Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

SIZES: dict[str, list[dict[str, int] | str]] = {
    "cpu": [{"image_size": 96, "patch": 8, "width": 96}, {"image_size": 336, "patch": 14, "width": 256}],
    "cuda": ["llava15_7b", "llava_next_7b"],
}
"""Image sizes and widths of the nano model and of 576 tokens with a narrow LLM; on GPUs, sizes of real models."""

TEXT = 32
"""Prompt tokens (T)."""
ALPHA = 0.1
"""Weight of the separation."""


def as_written(logits: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """GHM-C by a loop over its bins, separation over all pairs."""
    return eager_ghm(logits, targets) + ALPHA * pairwise_separation(hidden, targets.bool()).mean()


def by_ops(logits: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """The same by `evocomp.ops`."""
    return ghm_bce(logits, targets) + ALPHA * cosine_separation(hidden, targets.bool()).mean()


def run(device: str = "cpu", repeats: int = 3, batch: int = 8, sizes: list | None = None) -> list[Row]:
    """Measure all rows: time and peak memory of a step with both, and the growth of time with the batch size.

    Raises:
        AssertionError: losses or gradients differ.
    """
    rows: list[Row] = []
    for size in sizes or SIZES[torch.device(device).type]:
        rows += _rows(size, device, repeats, batch)
    return rows


def _rows(size: dict[str, int] | str, device: str, repeats: int, batch: int) -> Iterator[Row]:
    if isinstance(size, str):
        model, count = random_model(shape_named(size), device, layers=1), shape_named(size).tokens
    else:
        config = nano_config(**size, layers=1, heads=size["width"] // 32)
        model, count = build_nano(config, torch.Generator().manual_seed(0)), config.image_seq_length
    width = model.config.text_config.hidden_size
    with torch.device(device):
        compressor = EvoCompCompressor.from_mllm(model, keep=16).float().train()
    step = _step(compressor, count, width, device)
    shape = f"B={batch} N={count} T={TEXT} D={width}"
    names = "losses as written", "losses by evocomp.ops"
    clock = "process" if torch.device(device).type == "cpu" else "wall"
    works = [lambda loss=loss: step(loss, batch) for loss in (as_written, by_ops)]
    yield compare("training step", shape, (names[0], works[0]), (names[1], works[1]), _agree, device, repeats, clock)
    memory = [peak_memory(work, device) / 2**20 for work in works]
    yield {
        "bench": "training step, peak memory",
        "shape": shape,
        "baseline": names[0],
        "ours": names[1],
        "baseline_mib": memory[0],
        "ours_mib": memory[1],
        "ratio": memory[0] / memory[1],
        **environment(device),
    }
    batches = (batch // 2, batch, 2 * batch)
    seconds = [measure(lambda b=b: step(by_ops, b), device, clock) for b in batches]
    yield {
        "bench": "growth with B",
        "shape": f"N={count} D={width} B={','.join(map(str, batches))}",
        "baseline": "linear",
        "ours": "fitted slope of log time",
        "ratio": float(np.polyfit([math.log(b) for b in batches], [math.log(s) for s in seconds], 1)[0]),
        **environment(device),
    }


def _step(compressor: EvoCompCompressor, count: int, width: int, device: str) -> Callable[[Loss, int], Any]:
    """Forward, loss and backward on random tokens; returns the loss and the gradient of the head."""

    mixed = torch.autocast(device, dtype=torch.bfloat16, enabled=torch.device(device).type == "cuda")

    def step(loss: Loss, batch: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        visual = torch.randn(batch, count, width, generator=generator, device=device)
        prompt = torch.randn(batch, TEXT, width, generator=generator, device=device)
        targets = (torch.rand(batch, count, generator=generator, device=device) < 0.15).float()
        compressor.zero_grad()
        with mixed:
            output = compressor(visual, prompt)
            value = loss(output.logits, output.hidden, targets)
        value.backward()
        return value.detach(), compressor.score.weight.grad.clone()

    return step


def _agree(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    rtol = 1e-3 if one[0].device.type == "cpu" else 2e-2  # autocast rounds to bfloat16
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=1e-5)
