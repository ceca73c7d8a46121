"""Queries and keys of a decoder layer as its attention sees them, from the outputs of its projections."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from evocomp.mllm import attention

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def has_projections(layer: nn.Module) -> bool:
    """Whether a decoder layer is attention behind a norm, with a projection each for queries, keys and values."""
    module = getattr(layer, "self_attn", None)
    return hasattr(layer, "input_layernorm") and all(hasattr(module, name) for name in PROJECTIONS)


def rotary(decoder: nn.Module, number: int, hidden: Tensor, positions: Tensor) -> Any:
    """Rotary embeddings for layer `number`: cosines and sines [1, L, d] in most families.

    Args:
        hidden: [1, L, D], for its format and device.
        positions: position ids [1, L].
    """
    if attention.rope_by_type(decoder.config):
        return decoder.rotary_emb(hidden, positions, attention.layer_types(decoder.config)[number])
    return decoder.rotary_emb(hidden, positions)


def queries_and_keys(
    module: nn.Module, query: Tensor, key: Tensor, embeddings: tuple[Tensor, Tensor], positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries [B, heads, L, d] and keys [B, kv heads, L, d], normed, rotated and scaled as in the model's own code.

    Args:
        module: the layer's `self_attn`.
        query, key: outputs of its projections [B, L, heads * d] and [B, L, kv heads * d].
        embeddings: of `rotary`.
        positions: position ids [B, L].
    """
    code = sys.modules[type(module).__module__]
    if clip := getattr(module.config, "clip_qkv", None):  # OLMo
        query, key = query.clamp(-clip, clip), key.clamp(-clip, clip)
    query, key = (rows.unflatten(-1, (-1, module.head_dim)) for rows in (query, key))
    query = module.q_norm(query) if hasattr(module, "q_norm") else query
    key = module.k_norm(key) if hasattr(module, "k_norm") else key
    # M-RoPE decoders hand their layers embeddings in which the rows of positions are merged already
    rotate = getattr(code, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), *embeddings)
    if hasattr(code, "get_llama_4_attn_scale"):  # Ministral 3
        rope = module.config.rope_parameters
        limit = rope.get("original_max_position_embeddings")
        query = query * code.get_llama_4_attn_scale(positions, rope.get("llama_4_scaling_beta"), limit).to(query.dtype)
    return query, key


def causal_rows(query: Tensor, key: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """Attention probabilities of the last queries [heads, rows, L], float32.

    Args:
        query: [heads, L, d].
        key: [kv heads, L, d].
        seen: which keys those queries attend to, bool [rows, L].
        scaling: factor of the logits.
    """
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    scores = query[:, -len(seen) :].float() @ key.float().transpose(1, 2) * scaling
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def seen_rows(config: PreTrainedConfig, number: int, rows: int, length: int, device: torch.device) -> Tensor:
    """Which of `length` keys the last `rows` queries of a sequence attend to in layer `number`: bool [rows, L]."""
    kind = attention.layer_types(config)[number]
    if kind == attention.FULL:
        return torch.ones(rows, length, dtype=torch.bool, device=device).tril(length - rows)
    return attention.plain_masks(config, length, device)[kind][-rows:]
