"""How much each visual token matters to the answer, by one backward pass: the only gradients taken of the MLLM."""

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

_TAKES_MASKS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # decoder -> whether it does; costs three passes


def gate_gradient(mllm: FrozenMLLM, features: Features, gate: Tensor) -> Tensor:
    """Gradient of the answer loss by a soft gate on each visual token [N], negative where the token helps.

    A gate multiplies the token's weight in every attention before it is normalised: 1 keeps the token as it is, 0
    removes it. One forward and one backward over all tokens, in the model's own number format.

    Args:
        gate: [N], above 0: where the gradient is taken.

    Raises:
        UserError: this decoder's attention cannot be given weights of single tokens.
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
        # a token that looks at itself is kept, whatever its gate
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
    """Raise UserError unless the decoder computes what explicit attention masks say."""
    attention.check_masks(mllm.decoder.config)
    if mllm.decoder not in _TAKES_MASKS:
        _TAKES_MASKS[mllm.decoder] = TransformersBody(mllm.decoder, mllm.vocabulary.dtype).takes_masks
    if not _TAKES_MASKS[mllm.decoder]:
        raise UserError(
            f"{mllm.decoder.config.model_type}: this decoder does not follow an explicit attention mask; choose "
            "another search.strategy than gradient_seeded"
        )
