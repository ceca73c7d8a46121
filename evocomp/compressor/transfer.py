"""Transfer between models: a compressor at another hidden size, and the kept tokens of a small model in a large one.

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
    """A compressor with adaptive average pooling of its input features, for a model of hidden size `hidden_size`.

    Larger sizes are averaged, smaller ones repeat entries. It adds no weights.
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
    """Kept tokens in a handle's record (`last`): [row][image] -> [r] ascending, counted without separators."""

    picked: list[list[Tensor]]


class ReusedPicks:
    """A selector that reuses the tokens kept in another model, for example those of a small model in a large one
    with the same vision grid.

        with compress(small, compressor, keep=64) as chosen:
            small.generate(**inputs, max_new_tokens=1)
        with compress(big, ReusedPicks(lambda: chosen.last), keep=64):
            big.generate(**inputs)

    `source()` returns the record of the same rows and images, in the same order as in the prompt of the large model.
    Lists of indices are not accepted, because `last.indices` counts newline separators, which selectors do not see.
    """

    def __init__(self, source: Callable[[], Picked]):
        self.source = source

    def pick(self, visual: list[Tensor], text: list[Tensor], keep: list[int]) -> list[tuple[Tensor, None]]:
        """See `evocomp.inference.selectors`. Raises UserError if the images or their grids differ."""
        record = self.source()
        if not hasattr(record, "picked"):
            raise UserError(
                f"kept tokens must be a record, not {type(record).__name__}; give `lambda: handle.last`; the last "
                "prompt of the handle must have images"
            )
        indices = [image for row in record.picked for image in row]
        if len(indices) != len(visual):
            raise UserError(f"{len(indices)} images in the record, {len(visual)} in this prompt; use the same prompt")
        for chosen, rows in zip(indices, visual, strict=True):
            if len(chosen) and int(chosen.max()) >= len(rows):
                raise UserError(
                    f"token {int(chosen.max())} was kept, but the image has {len(rows)} tokens here; "
                    "use models with the same vision grid"
                )
        return [(chosen.to(rows.device), None) for chosen, rows in zip(indices, visual, strict=True)]
