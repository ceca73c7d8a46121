"""Attention masks of the layers that run on the shortened sequence."""

import inspect
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from evocomp.inference.compiled import without_compile
from evocomp.log import UserError

ATTENTION = {"full_attention", "sliding_attention"}
LAYER_INPUTS = {
    "self",
    "hidden_states",
    "position_embeddings",
    "attention_mask",
    "position_ids",
    "past_key_value",
    "past_key_values",
    "use_cache",
    "output_attentions",
    "cache_position",
    "kwargs",
}


def check_layers(decoder: nn.Module) -> None:
    """Raise UserError if a decoder's layers take sequence inputs that `compress` cannot shorten.

    Unsupported are convolutions and recurrent layers (their states would read padding), chunked attention (its chunks
    are counted over the sequence) and queries that are scaled by an additional input.
    """
    types = set(getattr(decoder.config, "layer_types", None) or ()) - ATTENTION
    names = set(inspect.signature(type(without_compile(decoder.layers[0])).forward).parameters) - LAYER_INPUTS
    if types or names:
        raise UserError(
            f"compress() supports full and sliding-window attention layers only; the layers of "
            f"{type(without_compile(decoder)).__name__} have {', '.join(sorted(types | names))}: use another model"
        )


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
    column = torch.arange(length, device=mask.device)
    back, visible = column[:, None] - column[None, :], _is_open(mask[..., :length, :length])
    of_padding = ~real[:, None, :, None]  # rows of padding do not matter
    for sliding in {is_sliding(config, layer) for layer in range(config.num_hidden_layers)}:
        near = (back >= 0) & (back < config.sliding_window) if sliding else back >= 0
        if not bool(((visible == near & real[:, None, None, :]) | of_padding).all()):
            return False
    return True


def is_sliding(config: PreTrainedConfig, layer: int) -> bool:
    """Whether a decoder layer attends within a sliding window only."""
    types = getattr(config, "layer_types", None)
    if types:
        return types[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) is not None


def causal_mask(
    config: PreTrainedConfig,
    layer: int,
    hidden: Tensor,
    real: Tensor | None,
    cache: Cache | None,
    always: bool = False,
):
    """The mask that transformers makes for this layer's number of keys.

    hidden [B,q,D]: only its sizes are used; real bool [B,keys]: keys that are not padding, None if all are. Position
    ids are not passed: transformers would read gaps in them as borders of packed sequences. always: return a mask
    even if the attention does not need one.
    """
    make = create_sliding_window_causal_mask if is_sliding(config, layer) else create_causal_mask
    return make(
        config=config,
        inputs_embeds=hidden,
        attention_mask=real,
        past_key_values=cache,
        position_ids=None,
        layer_idx=layer,
        allow_is_causal_skip=not always,
    )


def _is_open(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


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
    return pad(
        short.masked_fill(~allowed, lowest).masked_fill(lonely, 0.0), (0, columns - length), value=lowest
    )
