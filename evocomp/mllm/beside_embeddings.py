"""What a decoder reads beside embeddings, of a prompt whose dropped visual tokens are left out.

Qwen3-VL adds features of earlier layers of its vision tower in the first decoder layers (DeepStack), Gemma 3 and
PaliGemma have attention that is bidirectional within blocks of the prompt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig

from evocomp.mllm import attention
from evocomp.mllm.features import Features


class BesideEmbeddings(NamedTuple):
    """Both for embeddings [Q, L, D], in their order.

    deepstack: what the first layers add [layers, Q, L, D], zero at text; None: nothing
    blocks: bidirectional block of each token [Q, L], -1 for none; None: attention is causal
    """

    deepstack: Tensor | None
    blocks: Tensor | None

    @classmethod
    def of(cls, features: Features, index: Tensor) -> "BesideEmbeddings":
        """Of a prompt with the visual tokens `index` [Q, R], ascending; see `FrozenMLLM.assemble`."""
        fixed_at = features.fixed_at.expand(len(index), -1)
        places = torch.cat([fixed_at, features.visual_at[index]], dim=1).sort(dim=1).values
        rows = features.deepstack_rows()
        return cls(
            None if rows is None else rows[:, places], None if features.blocks is None else features.blocks[places]
        )

    def padded(self, before: int, after: int) -> "BesideEmbeddings":
        """With so many tokens of text or padding before and after."""
        return BesideEmbeddings(
            None if self.deepstack is None else pad(self.deepstack, (0, 0, before, after)),
            None if self.blocks is None else pad(self.blocks, (before, after), value=-1),
        )

    @classmethod
    def joined(cls, rows: Sequence["BesideEmbeddings"]) -> "BesideEmbeddings":
        """Of one batch, rows of equal length one after another."""
        first = rows[0]
        return cls(
            None if first.deepstack is None else torch.cat([row.deepstack for row in rows], dim=1),
            None if first.blocks is None else torch.cat([row.blocks for row in rows]),
        )

    def keywords(self, config: PreTrainedConfig, beyond_window: bool, real: Tensor, dtype: torch.dtype) -> dict:
        """Keywords of the decoder's forward, `attention_mask` among them.

        Args:
            config: of the decoder.
            beyond_window: see `attention.block_masks`.
            real: tokens that are no padding [Q, L].
            dtype: of the embeddings.
        """
        found: dict[str, Any] = {"attention_mask": real.long()}
        if self.deepstack is not None:
            # zeros at text: to add them to all tokens is the same as to pick the visual ones
            found["visual_pos_masks"] = torch.ones_like(real, dtype=torch.bool)
            found["deepstack_visual_embeds"] = [layer.flatten(0, 1) for layer in self.deepstack.to(dtype)]
        if self.blocks is not None:
            masks = attention.block_masks(config, self.blocks, beyond_window, real.bool())
            found["attention_mask"] = attention.as_decoder_masks(config, masks, dtype)
        return found
