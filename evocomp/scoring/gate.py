"""Importance of each visual token for the answer, from one backward pass: the only use of gradients of the MLLM."""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from evocomp.log import UserError
from evocomp.mllm import attention
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.ops.precision import compute_dtype
from evocomp.scoring.sequences import prompt_table
from evocomp.scoring.transformers_decoder import TransformersBody

_TAKES_MASKS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by decoder: costs 3 forward passes


def gate_gradient(mllm: FrozenMLLM, features: Features, gate: Tensor) -> Tensor:
    """Gradient [N] of the answer loss with respect to a soft gate on each visual token; negative if the token helps.

    A gate multiplies the token's attention weight in every layer before normalisation: 1 keeps the token unchanged, 0
    removes it. The gradient takes one forward and one backward pass over all tokens, in the model's dtype.

    Args:
        mllm: the frozen model.
        features: the sample.
        gate: [N], above 0: the point at which the gradient is taken.

    Raises:
        UserError: this decoder does not accept an additive attention mask.
    """
    mllm.check_plain()
    _check_takes_masks(mllm)
    config = mllm.decoder.config
    table = prompt_table(features, mllm.embed)
    length, answer = table.embeds.shape[0], features.answer_ids
    positions = table.positions
    attention.check_rope(config, positions)
    with torch.enable_grad():
        gate = gate.to(table.embeds.device, compute_dtype(table.embeds)).requires_grad_()
        keys = gate.new_zeros(length).index_put((features.visual_at,), gate.log())
        # gates do not affect the attention of a token to itself
        gates = keys.expand(length, -1).tril(-1)
        unseen = torch.finfo(table.embeds.dtype).min
        masks = {
            kind: torch.where(seen, gates, unseen).to(table.embeds.dtype)[None, None]
            for kind, seen in attention.plain_masks(config, length, gate.device).items()
        }
        states = mllm.decoder(
            inputs_embeds=table.embeds[None].detach(),
            attention_mask=attention.decoder_masks(config, masks),
            position_ids=positions[None] if positions.ndim == 1 else positions[:, None],
            use_cache=False,
        ).last_hidden_state[0, -len(answer) :]
        loss = F.cross_entropy(mllm.head(states).to(gate.dtype), answer)
        (gradient,) = torch.autograd.grad(loss, gate)
    return gradient


def _check_takes_masks(mllm: FrozenMLLM) -> None:
    """Raise UserError unless the decoder follows explicit attention masks."""
    attention.check_masks(mllm.decoder.config)
    if mllm.decoder not in _TAKES_MASKS:
        _TAKES_MASKS[mllm.decoder] = TransformersBody(mllm.decoder, mllm.vocabulary.dtype).takes_masks
    if not _TAKES_MASKS[mllm.decoder]:
        raise UserError(
            f"{mllm.decoder.config.model_type}: search.strategy=gradient_seeded needs a decoder that follows an "
            "explicit attention mask; choose another strategy"
        )
