"""What the frozen MLLM makes of one example before its LLM runs."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """One example, encoded.

    Attributes:
        id: the example's id.
        image_id: examples with the same value share `visual`.
        visual: projected visual tokens [N, D].
        prompt_ids: token ids of the prompt with its placeholders [S].
        visual_at: where the visual tokens stand in the prompt [N], ascending.
        positions: position ids of the whole prompt, [S], or [4, S] with M-RoPE.
        answer_ids: token ids of the gold answer [A], without an end mark.
        image_numbers: which image of the prompt each visual token belongs to [N].
    """

    id: int
    image_id: str
    visual: Tensor
    prompt_ids: Tensor
    visual_at: Tensor
    positions: Tensor
    answer_ids: Tensor
    image_numbers: Tensor

    @property
    def text_at(self) -> Tensor:
        """Where the text stands in the prompt [T]."""
        is_text = torch.ones(len(self.prompt_ids), dtype=torch.bool, device=self.prompt_ids.device)
        is_text[self.visual_at] = False
        return is_text.nonzero()[:, 0]


def pad_right(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack rows [n_i, ...] of unequal length: padded with zeros [B, n, ...], and which entries are real [B, n].

    >>> padded, real = pad_right([torch.ones(2, 4), torch.ones(3, 4)])
    >>> padded.shape, real.tolist()
    (torch.Size([2, 3, 4]), [[True, True, False], [True, True, True]])
    """
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device)[None] < lengths[:, None]


def grid_of(features: Features) -> tuple[int, int]:
    """(rows, columns) of the visual tokens: square where their number is, else one row."""
    count = len(features.visual)
    side = round(count**0.5)
    return (side, side) if side * side == count else (1, count)
