"""Reuse across models: a compressor at another hidden size, and the picks of a small model in a big one.

Source: EvoComp, arXiv 2604.17087, transfer experiments: indices chosen on LLaVA-1.5-7B serve the 13B model,
and a compressor serves Qwen2.5-VL by adaptive pooling over the hidden size.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d

from evocomp.compressor.model import CompressorOutput, EvoCompCompressor
from evocomp.log import UserError


class PooledCompressor(nn.Module):
    """A compressor behind adaptive average pooling of the features, for a model of hidden size `hidden_size`.

    Works in both directions: larger sizes are averaged down, smaller ones repeat entries. It adds no weights.
    """

    def __init__(self, compressor: EvoCompCompressor, hidden_size: int):
        super().__init__()
        self.compressor = compressor
        self.hidden_size = hidden_size

    @property
    def config(self):
        return self.compressor.config

    def forward(self, visual: Tensor, prompt: Tensor | None = None, *args, **kwargs) -> CompressorOutput:
        """As `EvoCompCompressor.forward`, with visual and prompt of `hidden_size` features.

        `hidden` of the result has the compressor's own size.
        """
        size = self.compressor.config.hidden_size
        prompt = None if prompt is None else adaptive_avg_pool1d(prompt, size)
        return self.compressor(adaptive_avg_pool1d(visual, size), prompt, *args, **kwargs)


class Picked(Protocol):
    """What a handle's record (`last`) says of the picks: [row][image] -> [r] ascending, counted without separators."""

    picked: list[list[Tensor]]


class ReusedPicks:
    """A selector that keeps what was kept elsewhere: a small model's choice in a big one with the same vision
    grid.

        with compress(small, compressor, keep=64) as chosen:
            small.generate(**inputs, max_new_tokens=1)
        with compress(big, ReusedPicks(lambda: chosen.last), keep=64):
            big.generate(**inputs)

    `source()` returns the record of the same rows and images in the same order as the prompt of the
    big model. It is no list of indices: those of `last.indices` count newline separators, which no selector sees.
    """

    def __init__(self, source: Callable[[], Picked]):
        self.source = source

    def pick(self, visual: list[Tensor], text: list[Tensor], keep: list[int]) -> list[tuple[Tensor, None]]:
        """See `evocomp.inference.selectors`. Raises UserError if the images or their grids differ."""
        record = self.source()
        if not hasattr(record, "picked"):
            raise UserError(
                f"picks come as a record, not as {type(record).__name__}; give `lambda: handle.last` of a handle whose "
                "last prompt had images"
            )
        indices = [image for row in record.picked for image in row]
        if len(indices) != len(visual):
            raise UserError(
                f"{len(indices)} images were picked from, this prompt has {len(visual)}; use the same prompt"
            )
        for chosen, rows in zip(indices, visual, strict=True):
            if len(chosen) and int(chosen.max()) >= len(rows):
                raise UserError(
                    f"token {int(chosen.max())} was picked but the image has {len(rows)} here; "
                    "picks can be reused between models with the same vision grid only"
                )
        return [(chosen.to(rows.device), None) for chosen, rows in zip(indices, visual, strict=True)]
