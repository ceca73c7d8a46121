"""How much each visual token matters to the answer, by one backward pass: the only gradients taken of the MLLM."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.sequences import prompt_table
from evocomp.ops.precision import compute_dtype


def gate_gradient(mllm: FrozenMLLM, features: Features, gate: Tensor) -> Tensor:
    """Gradient of the answer loss by a soft gate on each visual token [N], negative where the token helps.

    A gate multiplies the token's weight in every attention before it is normalised: 1 keeps the token as it is, 0
    removes it. One forward and one backward over all tokens, in the model's own number format.

    Args:
        gate: [N], above 0: where the gradient is taken.
    """
    mllm.check_scorable()
    table = prompt_table(features, mllm.embed)
    length, answer = table.embeds.shape[0], features.answer_ids
    positions = table.positions
    with torch.enable_grad():
        gate = gate.to(table.embeds.device, compute_dtype(table.embeds)).requires_grad_()
        keys = gate.new_zeros(length).index_put((features.visual_at,), gate.log())
        unseen = torch.full_like(keys, torch.finfo(table.embeds.dtype).min).expand(length, -1).triu(1)
        # a token that looks at itself is kept, whatever its gate
        bias = (unseen + keys.expand(length, -1).tril(-1)).to(table.embeds.dtype)
        states = mllm.decoder(
            inputs_embeds=table.embeds[None].detach(),
            attention_mask=bias[None, None],
            position_ids=positions[None] if positions.ndim == 1 else positions[:, None],
            use_cache=False,
        ).last_hidden_state[0, -len(answer) :]
        loss = F.cross_entropy(mllm.head(states).to(gate.dtype), answer)
        (gradient,) = torch.autograd.grad(loss, gate)
    return gradient
