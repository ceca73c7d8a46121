"""`Body` for any decoder of transformers, so that every family can be scored."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from evocomp.log import UserError
from evocomp.mllm import attention
from evocomp.mllm.cache_argument import CACHE
from evocomp.scoring import mask_probe
from evocomp.scoring.sequences import Packing, Past, Table, weighed


class TransformersBody:
    """Runs the decoder's own forward pass.

    It always passes an all-ones mask. Without one, transformers takes gaps in the positions for boundaries of packed
    sequences.

    Args:
        decoder: `get_decoder()` of the MLLM.
        dtype: of its weights.
        beyond_window: whether bidirectional blocks reach beyond a sliding window; see `attention.block_masks`.

    Attributes:
        takes_masks: whether the decoder follows explicit attention masks.
    """

    def __init__(self, decoder: nn.Module, dtype: torch.dtype, beyond_window: bool = False):
        self.decoder = decoder
        self.beyond_window = beyond_window
        self.dtype = dtype
        self.takes_masks = self._takes_masks()

    def __call__(
        self, table: Table, index: Tensor, read: Tensor, packing: Packing | None = None, past: Past | None = None
    ) -> Tensor:
        """See `Body`."""
        before = past[0][0].shape[2] if past else 0
        hidden = self._run(table, index, before, packing, self._cache(past, len(index)) if past else None)
        if read.ndim == 1:
            return hidden[:, read]
        return hidden.gather(1, read[..., None].expand(-1, -1, hidden.shape[2]))

    def prefix(self, table: Table, rows: Tensor) -> Past | None:
        """See `Body`. None unless every layer uses full causal attention: other caches drop or mix tokens."""
        if not attention.attends_fully(self.decoder.config):
            return None
        cache = DynamicCache(config=self.decoder.config)
        self._run(table, rows[None], 0, None, cache)
        return tuple((layer.keys, layer.values) for layer in cache.layers)

    @property
    def packs(self) -> bool:
        """See `Body`."""
        # Llama 4 scales queries by their index in the forward pass, which differs in a packed sequence
        return self.takes_masks and not getattr(self.decoder.config, "attn_temperature_tuning", False)

    def _takes_masks(self) -> bool:
        config = self.decoder.config
        try:
            attention.check_masks(config)
        except UserError:
            return False
        return mask_probe.packs_as_apart(self, config, next(self.decoder.parameters()).device)

    def _run(
        self, table: Table, index: Tensor, before: int, packing: Packing | None, cache: DynamicCache | None
    ) -> Tensor:
        length = index.shape[1]
        positions = table.positions[..., index]
        if positions.ndim == 3:  # M-RoPE: transformers' mask infers packed sequences from gaps in the text row
            positions[0] = torch.arange(before, before + length, device=index.device)
        more = {}
        if table.deepstack is not None:
            # zeros at text: to add them to all rows is the same as to pick the visual ones
            more["visual_pos_masks"] = torch.ones_like(index, dtype=torch.bool)
            more["deepstack_visual_embeds"] = [layer[index].flatten(0, 1) for layer in table.deepstack.to(self.dtype)]
        return self.decoder(
            **more,
            inputs_embeds=table.embeds.to(self.dtype)[index],
            attention_mask=self._mask(table, index, before, packing),
            position_ids=positions,
            use_cache=cache is not None,
            **{CACHE: cache},
        ).last_hidden_state

    def _mask(self, table: Table, index: Tensor, before: int, packing: Packing | None) -> Tensor | dict[str, Tensor]:
        """The decoder's `attention_mask`: all ones [Q, P + L], or 4-D masks for packed sequences or context tokens."""
        count, length = index.shape
        if table.log_size is not None:  # only without windows, see `FrozenMLLM.check_weighable`
            return weighed(None, pad(table.log_size[index], (before, 0)), length, self.dtype)
        if table.blocks is not None:  # never packed nor after a prefix, see `AnswerLosses`
            seen = attention.block_masks(self.decoder.config, table.blocks[index], self.beyond_window)
            return attention.as_decoder_masks(self.decoder.config, seen, self.dtype)
        if packing is None:
            return torch.ones(count, before + length, dtype=torch.long, device=index.device)
        config = self.decoder.config
        masks = {
            kind: packing.mask(plain, before).expand(count, 1, -1, -1)
            for kind, plain in attention.plain_masks(config, packing.longest, index.device).items()
        }
        return attention.as_decoder_masks(config, masks, self.dtype)

    def _cache(self, past: Past, count: int) -> DynamicCache:
        cache = DynamicCache(config=self.decoder.config)
        for number, (keys, values) in enumerate(past):
            cache.update(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), number)
        return cache
