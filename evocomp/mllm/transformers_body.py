"""Any decoder of transformers as a `Body`: what every family can be scored with."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from evocomp.mllm.sequences import Past, Table, weighed


class TransformersBody:
    """Runs the decoder as it is.

    An all-ones mask always goes with it: without one, gaps in the positions are taken for borders of packed sequences.

    Args:
        decoder: `get_decoder()` of the MLLM.
        dtype: of its weights.
    """

    def __init__(self, decoder: nn.Module, dtype: torch.dtype):
        self.decoder = decoder
        self.dtype = dtype

    def __call__(
        self, table: Table, index: Tensor, read: Tensor, mask: Tensor | None = None, past: Past | None = None
    ) -> Tensor:
        """See `Body`."""
        before = past[0][0].shape[2] if past else 0
        hidden = self._run(table, index, before, mask, self._cache(past, len(index)) if past else None)
        if read.ndim == 1:
            return hidden[:, read]
        return hidden.gather(1, read[..., None].expand(-1, -1, hidden.shape[2]))

    def prefix(self, table: Table, rows: Tensor) -> Past | None:
        """See `Body`. None with sliding windows, whose caches forget."""
        if "sliding_attention" in (getattr(self.decoder.config, "layer_types", None) or ()):
            return None
        cache = DynamicCache(config=self.decoder.config)
        self._run(table, rows[None], 0, None, cache)
        return tuple((layer.keys, layer.values) for layer in cache.layers)

    def _run(
        self, table: Table, index: Tensor, before: int, mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        count, length = index.shape
        positions = table.positions[..., index]
        if positions.ndim == 3:  # M-RoPE: the text row tells the mask where sequences start; keep it dense
            positions[0] = torch.arange(before, before + length, device=index.device)
        if table.log_size is not None:
            seen = weighed(mask, pad(table.log_size[index], (before, 0)), length, self.dtype)
        elif mask is None:
            seen = torch.ones(count, before + length, dtype=torch.long, device=index.device)
        else:
            seen = mask.expand(count, 1, -1, -1)
        return self.decoder(
            inputs_embeds=table.embeds.to(self.dtype)[index],
            attention_mask=seen,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _cache(self, past: Past, count: int) -> DynamicCache:
        cache = DynamicCache(config=self.decoder.config)
        for number, (keys, values) in enumerate(past):
            cache.update(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), number)
        return cache
