"""Attention of text tokens to visual tokens in the LLM's layers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from evocomp.log import UserError
from evocomp.selection.base import PerLayer, SelectionInputs


def at_layer(values: PerLayer, layer: int) -> Tensor:
    """The tensor of one layer; a single tensor is returned unchanged."""
    if isinstance(values, Tensor):
        return values
    if not isinstance(values, Mapping):
        return values(layer)
    if layer not in values:
        raise UserError(f"LLM layer {layer} was not recorded, only layers {sorted(values)}; record it too.")
    return values[layer]


def visual_start(inputs: SelectionInputs, length: int) -> int:
    """Index of the first visual token in an LLM sequence of `length` = prefix + N + T tokens."""
    start = length - len(inputs) - len(inputs.text)
    if start < 0:
        raise UserError(
            f"An LLM sequence of {length} tokens cannot hold {len(inputs)} visual and {len(inputs.text)} text "
            f"tokens; `text` must be the tokens after the image in the same prompt."
        )
    return start


def visual_columns(inputs: SelectionInputs, layer: int, queries: int) -> Tensor:
    """Attention of the last `queries` queries to the visual tokens in one layer, [H, queries, N] in float32."""
    attention = at_layer(inputs.llm_attention, layer)
    if attention.ndim != 3 or attention.shape[1] < queries:
        raise UserError(
            f"llm_attention of layer {layer} must be [heads, at least the last {queries} queries, keys], "
            f"not {list(attention.shape)}."
        )
    start = visual_start(inputs, attention.shape[2])
    return attention[:, attention.shape[1] - queries :, start : start + len(inputs)].float()


def last_query_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of the last token: query [H, d], keys [K, L, d] (both after RoPE) -> probabilities [H, L].

    The last token attends to all keys, so no mask is needed. It costs O(L d) in addition to any attention kernel. With
    grouped-query attention (K < H) each key head belongs to H / K consecutive query heads.
    """
    keys = keys.float().repeat_interleave(query.shape[0] // keys.shape[0], dim=0)
    scores = torch.einsum("hd,hld->hl", query.float(), keys) / query.shape[-1] ** 0.5
    return scores.softmax(-1)
