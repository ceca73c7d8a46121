"""Attention types and attention masks of decoder layers, as transformers defines them.

All code that builds an attention mask for a decoder, or depends on its attention type, uses this module.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

from evocomp.log import UserError
from evocomp.mllm.cache_argument import CACHE

FULL = "full_attention"

MASKED_TYPES = (FULL, "sliding_attention", "chunked_attention")
"""Attention types that a mask over pairs of tokens describes completely."""

RECURRENT_TYPES = ("linear_attention", "conv")
"""Types of layers that carry a state along the sequence and take a mask of its padding [B, L]."""

LONG_ROPE = ("dynamic", "longrope")
"""RoPE types whose frequencies change when the longest sequence of a forward pass exceeds a limit."""


def layer_types(config: PreTrainedConfig) -> tuple[str, ...]:
    """Attention type of each decoder layer, a key of transformers' `LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING`.

    Without `config.layer_types` all layers have one type, which follows from `sliding_window` and
    `attention_chunk_size` as in `transformers.masking_utils.create_masks_for_generate`.

    Args:
        config: configuration of the decoder, not of the whole MLLM.

    >>> from transformers import LlamaConfig, MistralConfig
    >>> layer_types(LlamaConfig(num_hidden_layers=2)), layer_types(MistralConfig(num_hidden_layers=1))
    (('full_attention', 'full_attention'), ('sliding_attention',))
    """
    types = getattr(config, "layer_types", None)
    if types:
        return tuple(types[: config.num_hidden_layers])
    if getattr(config, "sliding_window", None) is not None:
        return ("sliding_attention",) * config.num_hidden_layers
    if getattr(config, "attention_chunk_size", None) is not None:
        return ("chunked_attention",) * config.num_hidden_layers
    return (FULL,) * config.num_hidden_layers


def first_attention(config: PreTrainedConfig) -> int:
    """The first layer with attention, whose keys a cache counts when asked for its length; 0 if there is none.

    >>> from types import SimpleNamespace
    >>> first_attention(SimpleNamespace(layer_types=["conv", "conv", "full_attention"], num_hidden_layers=3))
    2
    """
    types = layer_types(config)
    return next((number for number, kind in enumerate(types) if kind not in RECURRENT_TYPES), 0)


def attends_fully(config: PreTrainedConfig) -> bool:
    """Whether every layer uses plain causal attention: each token attends to itself and to all tokens before it."""
    return set(layer_types(config)) == {FULL} and getattr(config, "is_causal", True)


def check_masks(config: PreTrainedConfig) -> None:
    """Raise UserError unless every layer of this decoder follows an explicit attention mask."""
    others = sorted(set(layer_types(config)) - set(MASKED_TYPES))
    name = config.model_type
    if others:
        raise UserError(
            f"{name}: layers of type {', '.join(others)} do not accept an attention mask over token pairs; "
            "use a model with full or sliding-window attention"
        )
    if not getattr(config, "is_causal", True):
        raise UserError(f"{name}: its attention is bidirectional; use a model with a causal decoder")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise UserError(
            f"{name}: attention {config._attn_implementation} does not accept an explicit attention mask; load the "
            "model with model.attention=sdpa"
        )


def plain_masks(config: PreTrainedConfig, length: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Attention masks of one unpadded sequence, one per attention type, created by transformers.

    Args:
        config: configuration of the decoder; its layers must be of `MASKED_TYPES`, see `check_masks`.
        length: number of tokens L.

    Returns:
        bool [L, L] for each attention type: True where the query (row) attends to the key (column).
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"  # its masks are bool
    like = torch.empty(1, length, 1, device=device)
    masks = {}
    for kind in dict.fromkeys(layer_types(config)):
        # with an explicit 2-D mask, transformers does not infer packed sequences from the positions
        mask = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind](
            config=config,
            inputs_embeds=like,
            attention_mask=torch.ones(1, length, dtype=torch.bool, device=device),
            position_ids=None,
            **{CACHE: None},
        )
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        masks[kind] = causal if mask is None else mask[0, 0]
    return masks


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask to an additive one: 0 where it is True, the lowest finite number where it is False."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def decoder_masks(config: PreTrainedConfig, masks: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """Masks [B, 1, L, keys] by attention type, in the form that the decoder's `attention_mask` argument takes."""
    return dict(masks) if getattr(config, "layer_types", None) else next(iter(masks.values()))


def block_masks(
    config: PreTrainedConfig, blocks: Tensor, beyond_window: bool, real: Tensor | None = None
) -> dict[str, Tensor]:
    """Which keys each token attends to where tokens of one block attend to each other, by attention type.

    Args:
        config: of the decoder.
        blocks: block of each token [Q, L], -1 for none.
        beyond_window: whether blocks reach beyond a sliding window (PaliGemma) or end at it (Gemma 3).
        real: tokens that are no padding, bool [Q, L]; None: all.

    Returns:
        bool [Q, 1, L, L]
    """
    length, masks = blocks.shape[1], {}
    together = (blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, :, None]
    place = torch.arange(length, device=blocks.device)
    for kind, plain in plain_masks(config, length, blocks.device).items():
        block = together
        if kind == "sliding_attention" and not beyond_window:
            block = together & (place[:, None] - place[None, :] < config.sliding_window)
        seen = plain | block
        if real is not None:
            # padding sees itself: a row without any key would be NaN
            seen = (seen & real[:, None, :]) | torch.eye(length, dtype=torch.bool, device=blocks.device)
        masks[kind] = seen[:, None]
    return masks


def as_decoder_masks(config: PreTrainedConfig, seen: Mapping[str, Tensor], dtype: torch.dtype):
    """Masks of bool by attention type as `attention_mask` of the decoder's forward; see `decoder_masks`."""
    if config._attn_implementation != "sdpa":  # eager attention adds its mask to the logits
        seen = {kind: additive(mask, dtype) for kind, mask in seen.items()}
    return decoder_masks(config, seen)


def check_rope(config: PreTrainedConfig, positions: Tensor) -> None:
    """Raise UserError for positions at which RoPE depends on the other sequences of the forward pass.

    Beyond a limit, the frequencies of dynamic RoPE and LongRoPE depend on the longest sequence of the batch. With
    cached keys, or with sequences of several lengths in a batch, losses would then silently differ from those of each
    sequence alone.

    Args:
        config: configuration of the decoder.
        positions: position ids of any shape; not empty.
    """
    for rope in _rope_settings(config):
        kind = rope.get("rope_type", "default")
        if not any(name in kind for name in LONG_ROPE):
            continue
        limit = rope.get("original_max_position_embeddings") if kind == "longrope" else None
        limit = limit or config.max_position_embeddings
        if int(positions.max()) >= limit:
            raise UserError(
                f"{config.model_type}: beyond {limit} tokens {kind} RoPE depends on the longest sequence of the batch, "
                f"and this prompt with its answer has positions up to {int(positions.max())}; use shorter prompts or "
                "smaller images"
            )


def rope_by_type(config: PreTrainedConfig) -> bool:
    """Whether each attention type has separate RoPE settings."""
    return any(isinstance(value, dict) for value in (getattr(config, "rope_parameters", None) or {}).values())


def _rope_settings(config: PreTrainedConfig) -> list[dict]:
    """RoPE settings: one for all layers, or one for each attention type."""
    settings = getattr(config, "rope_parameters", None) or {}
    return [one for one in settings.values() if isinstance(one, dict)] if rope_by_type(config) else [settings]


SHORT_WINDOW = 3
"""Attention window [tokens] while a decoder is checked on a short sequence."""


@contextmanager
def short_windows(config: PreTrainedConfig) -> Iterator[None]:
    """Within the block, set the decoder's attention windows, if it has any, to `SHORT_WINDOW` tokens."""
    names = [name for name in ("sliding_window", "attention_chunk_size") if getattr(config, name, None) is not None]
    before = {name: getattr(config, name) for name in names}
    try:
        for name in names:
            setattr(config, name, SHORT_WINDOW)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
