"""Attention masks of the layers that run on the shortened sequence."""

import inspect
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

from evocomp.inference.compiled import without_compile
from evocomp.log import UserError
from evocomp.mllm import attention
from evocomp.mllm.cache_argument import CACHE

LAYER_INPUTS = {
    "self",
    "hidden_states",
    "position_embeddings",
    "attention_mask",
    "position_ids",
    "past_key_value",
    "past_key_values",
    "cache",
    "use_cache",
    "output_attentions",
    "cache_position",
    "per_layer_input",
    "shared_kv_states",
    "kwargs",
}


def check_layers(decoder: nn.Module) -> None:
    """Raise UserError if a decoder's layers take sequence inputs that `compress` cannot shorten.

    Such are queries that are scaled by a further input, and layers that read two masks or a mask of their own kind.
    """
    types = set(attention.layer_types(decoder.config)) - {*attention.MASKED_TYPES, *attention.RECURRENT_TYPES}
    names = set(inspect.signature(type(without_compile(decoder.layers[0])).forward).parameters) - LAYER_INPUTS
    if types or names:
        name = type(without_compile(decoder)).__name__
        raise UserError(
            "compress() supports layers of attention (full, sliding or chunked), linear attention or convolution; "
            f"those of {name} have {', '.join(sorted(types | names))}: use another model"
        )


def check_shared_keys(config: PreTrainedConfig, layer: int) -> None:
    """Raise UserError if layers from `layer` on read keys of a layer before it, where no token has dropped out yet.

    In Gemma 3n and Gemma 4 the last layers use the keys of the last layer of their type that has its own.
    """
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    types = attention.layer_types(config)
    own, later = types[: len(types) - shared], types[len(types) - shared :]
    first = min((len(own) - 1 - own[::-1].index(kind) for kind in set(later) if kind in own), default=layer)
    if layer > first:
        raise UserError(f"layer={layer}: later layers use the keys of layer {first}; use a layer from 0 to {first}")


def always_masks(decoder: nn.Module) -> bool:
    """Whether a decoder's attention always needs a mask tensor because it computes with it (Doge).

    The only sign of this is a call in the decoder's source code that requests a mask in all cases.
    """
    try:
        source = inspect.getsource(sys.modules[type(without_compile(decoder)).__module__])
    except (OSError, TypeError, KeyError):
        return False
    return "allow_is_causal_skip=False" in source


def padding_mask(attention_mask, length: int) -> Tensor | None:
    """Which tokens of the prompt are real, bool [B,length]; None if all are.

    attention_mask: argument of the model: None, [B,S], a prepared [B,1 or heads,S,columns], or a dict of these
    by layer type (with a static cache, masks are prepared before the model is called).
    """
    if isinstance(attention_mask, dict):
        given = [attention_mask.get("full_attention"), *attention_mask.values()]
        attention_mask = next((mask for mask in given if mask is not None), None)
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.ndim == 2:
        return attention_mask[:, -length:].bool()
    # a token that no other token attends to is padding; the last one has no later token, so it counts as real
    seen = _is_open(attention_mask[..., :length, :length]).any(1)
    alone = torch.eye(length, dtype=torch.bool, device=seen.device)
    alone[-1, -1] = False
    return (seen & ~alone).any(1)


def is_plain(mask: Tensor, real: Tensor, config: PreTrainedConfig) -> bool:
    """Whether a prepared mask equals that of `causal_mask` in every layer: it hides exactly later tokens, tokens beyond
    the sliding window, and padding.

    mask [B or 1,1 or heads,S,columns] (bool, or 0 and a large negative number); real bool [B or 1,S]
    """
    length = real.shape[1]
    place = torch.arange(length, device=mask.device)
    back, visible = place[:, None] - place[None, :], _is_open(mask[..., :length, :length])
    of_padding = ~real[:, None, :, None]  # what padding sees changes nothing
    for kind in set(attention.layer_types(config)) - {*attention.RECURRENT_TYPES}:
        near = back >= 0
        if kind == "sliding_attention":
            near = near & (back < config.sliding_window)
        elif kind == "chunked_attention":
            chunk = place // config.attention_chunk_size
            near = near & (chunk[:, None] == chunk[None, :])
        if not bool(((visible == near & real[:, None, None, :]) | of_padding).all()):
            return False
    return True


def causal_mask(
    config: PreTrainedConfig,
    layer: int,
    hidden: Tensor,
    real: Tensor | None,
    cache: Cache | None,
    always: bool = False,
):
    """The mask that transformers itself makes for this layer's own number of keys; for recurrent layers it is 2-D.

    hidden [...,B,q,D] gives sizes only; real bool [B,keys]: keys that are not padding, None if all are. Position
    ids are left out: their gaps would be taken for the borders of packed sequences. always: a mask even where the
    attention could do without.
    """
    kind = attention.layer_types(config)[layer]
    if kind in attention.RECURRENT_TYPES and real is not None:
        real = real.long()  # multiplied with hidden states
    return LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind](
        config=config,
        inputs_embeds=hidden if hidden.ndim == 3 else hidden[0],  # Gemma 3n has several streams
        attention_mask=real,
        position_ids=None,
        layer_idx=layer,
        allow_is_causal_skip=not always,
        **{CACHE: cache},
    )


def _is_open(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def block_mask(config: PreTrainedConfig, blocks: Tensor, valid: Tensor, columns: int, hidden: Tensor) -> Tensor:
    """The mask of layers with a sliding window in which tokens of one block within the window see each other.

    blocks [B,L]: of each kept token, -1 for none; valid [B,L]; columns: keys of the cache, at least L; hidden gives the
    number format. -> [B,1,L,columns]
    """
    seen = attention.block_masks(config, blocks, False, valid)["sliding_attention"].to(hidden.device)
    seen = pad(seen, (0, columns - seen.shape[-1]), value=False)
    return seen if config._attn_implementation == "sdpa" else attention.additive(seen, hidden.dtype)


def gathered_mask(
    full: Tensor, index: Tensor, valid: Tensor, window: int | None, window_spares_blocks: bool, columns: int
) -> Tensor:
    """Rows and columns of a prepared mask for the kept tokens, with its bidirectional blocks of images and prefixes.

    full [B or 1,H,S,columns'], H 1 or heads (bool, or 0 and a large negative number); index, valid [B,L]; window:
    sliding window counted over the shortened sequence, or None; window_spares_blocks: whether blocks reach beyond it;
    columns: keys of the cache, at least L. -> [B,H,L,columns]
    """
    batch, length = index.shape
    heads, keys = full.shape[1], full.shape[-1]
    rows = full.expand(batch, -1, -1, -1).gather(2, index[:, None, :, None].expand(-1, heads, -1, keys))
    short = rows.gather(3, index[:, None, None, :].expand(-1, heads, length, -1))
    column = torch.arange(length, device=full.device)
    allowed = valid[:, None, None, :].expand(-1, 1, length, -1)
    if window is not None:
        near = column[:, None] - column[None, :] < window
        # two tokens that attend to each other are in one block
        allowed = allowed & (near | _is_open(short).transpose(2, 3) if window_spares_blocks else near)
    # padding must attend to something: a row without keys would be NaN, and NaN spreads even with weight zero
    lonely = (~valid)[:, None, :, None] & (column[:, None] == column[None, :])
    if short.dtype == torch.bool:
        return pad((short & allowed) | lonely, (0, columns - length), value=False)
    lowest = torch.finfo(short.dtype).min
    return pad(short.masked_fill(~allowed, lowest).masked_fill(lonely, 0.0), (0, columns - length), value=lowest)
