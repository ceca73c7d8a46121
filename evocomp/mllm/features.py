"""Encoded examples: the visual tokens, token ids and position ids that the LLM input is built from."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """One example, encoded.

    Attributes:
        id: the example's id.
        image_id: examples with the same value share `visual`.
        visual: projected visual tokens [N, D], without separators.
        prompt_ids: token ids of the prompt with its placeholders [S].
        visual_at: where the visual tokens stand in the prompt [N], ascending.
        positions: position ids of the whole prompt, [S], or [4, S] with M-RoPE.
        answer_ids: token ids of the gold answer [A], without an end mark.
        separators: rows [M, D] between the visual tokens that are no picture content (LLaVA-NeXT's and OneVision's
            `image_newline`): the LLM reads them whatever is chosen, as behind `evocomp.compress`. None: no such row.
        separators_at: where they stand in the prompt [M], ascending.
        priority: the visual tokens in the order of a training-free score, best first [N], where one was asked for.
        deepstack: what the first decoder layers add to the visual tokens (Qwen3-VL) [layers, N, D]; None: nothing.
        blocks: the bidirectional block of each prompt token [S], -1 for none: tokens of one block attend to each other
            (Gemma 3: an image; PaliGemma: the prompt). None: attention is causal.
        counts: of several images the visual tokens of each, in their order, with sum N; empty for one image.
    """

    id: int
    image_id: str
    visual: Tensor
    prompt_ids: Tensor
    visual_at: Tensor
    positions: Tensor
    answer_ids: Tensor
    separators: Tensor | None = None
    separators_at: Tensor | None = None
    priority: Tensor | None = None
    deepstack: Tensor | None = None
    blocks: Tensor | None = None
    counts: tuple[int, ...] = ()

    @property
    def text_at(self) -> Tensor:
        """Indices of the text tokens in the prompt [T]."""
        return self._without(self.visual_at, self.separators_at)

    @property
    def fixed_at(self) -> Tensor:
        """Indices of text tokens and separators in the prompt [T + M]: the rows that are always kept."""
        return self._without(self.visual_at, None)

    @property
    def picture_end(self) -> int:
        """Index in the prompt after the last row of the image, be it a visual token or a separator."""
        last = int(self.visual_at[-1])
        return 1 + (last if self.separators_at is None else max(last, int(self.separators_at[-1])))

    def fixed_rows(self, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Input embeddings at `fixed_at` [T + M, D]; embed: token ids [...] -> embeddings [..., D]."""
        at = self.fixed_at
        rows = embed(self.prompt_ids[at])
        if self.separators is None:
            return rows
        return rows.index_put((torch.isin(at, self.separators_at),), self.separators.to(rows.dtype))

    def deepstack_rows(self) -> Tensor | None:
        """What the first decoder layers add to each prompt token [layers, S, D], zero at text; None: nothing."""
        if self.deepstack is None:
            return None
        layers, _, size = self.deepstack.shape
        rows = self.deepstack.new_zeros(layers, len(self.prompt_ids), size)
        rows[:, self.visual_at] = self.deepstack
        return rows

    def _without(self, *places: Tensor | None) -> Tensor:
        rest = torch.ones(len(self.prompt_ids), dtype=torch.bool, device=self.prompt_ids.device)
        for some in places:
            if some is not None:
                rest[some] = False
        return rest.nonzero()[:, 0]


def pad_right(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack rows [n_i, ...] of unequal length: zero-padded rows [B, n, ...], and the mask of real entries [B, n].

    >>> padded, real = pad_right([torch.ones(2, 4), torch.ones(3, 4)])
    >>> padded.shape, real.tolist()
    (torch.Size([2, 3, 4]), [[True, True, False], [True, True, True]])
    """
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device)[None] < lengths[:, None]


def grid_of(features: Features) -> tuple[int, int]:
    """(rows, columns) of the visual tokens: a square grid if their number is a square and there is one image, else one
    row."""
    count = len(features.visual)
    return (1, count) if features.counts else square_grid(count)


def first_image(features: Features, kept: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Kept tokens of the first image, for drawing it: those of `kept` [R] that lie in it, and its (rows, columns)."""
    count = features.counts[0] if features.counts else len(features.visual)
    return kept[kept < count], square_grid(count)


def square_grid(count: int) -> tuple[int, int]:
    """(rows, columns) of `count` tokens: a square grid if `count` is a square, else one row."""
    side = round(count**0.5)
    return (side, side) if side * side == count else (1, count)
