"""How many sequences go into one forward: found once, from the model's sizes and the device's memory, and kept."""

import torch

from evocomp.log import UserError, warn_once
from evocomp.mllm.hf import FrozenMLLM

CPU_BYTES = 64 * 2**20
"""Activations of one forward on a CPU: more of them only miss its caches."""

CUDA_SHARE = 0.6
"""Share of a GPU's memory beside the weights that activations may take; the rest is the allocator's slack."""


class Room:
    """Room for the activations of one forward.

    The size of a batch moves losses in their last bits, so it must not depend on the moment: neither on what else
    is on the machine nor on how far a run is. Only a GPU that proves too small lowers it.

    Args:
        mllm: the frozen model.
        itemsize: bytes of a number while scoring.
    """

    def __init__(self, mllm: FrozenMLLM, itemsize: int):
        config = mllm.decoder.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        # residual, normed, mixed and their temporaries; queries, keys, values before and after rotation; the MLP
        self.token = itemsize * (6 * config.hidden_size + 2 * heads * head_dim + 3 * config.intermediate_size)
        self.logits = len(mllm.vocabulary) * (itemsize + 8)  # and in float32, with their softmax
        self.budget = CPU_BYTES
        if mllm.device.type == "cuda":
            # of a sharded model, the part that lies here
            held = (p.to_local() if hasattr(p, "to_local") else p for p in mllm.model.parameters())
            weights = sum(part.numel() * part.element_size() for part in held)
            total = torch.cuda.get_device_properties(mllm.device).total_memory
            self.budget = int(CUDA_SHARE * (total - weights))

    def sequences(self, tokens: int, heads: int) -> int:
        """Sequences of so many tokens, `heads` of them under the head, that fit; at least one."""
        return max(1, self.budget // (tokens * self.token + heads * self.logits))

    def lower(self, failed: int, tokens: int, heads: int) -> None:
        """A forward of `failed` sequences ran out of memory: half as many from now on.

        Raises:
            UserError: it was a single one.
        """
        if failed <= 1:
            raise UserError(
                f"the GPU's memory does not hold one sequence of {tokens} tokens beside the model; "
                "give model.dtype=bfloat16, a smaller model, or a larger GPU"
            )
        torch.cuda.empty_cache()
        self.budget = failed // 2 * (tokens * self.token + heads * self.logits)
        warn_once(f"scoring {failed} masks at once ran out of memory; going on with {failed // 2}")
