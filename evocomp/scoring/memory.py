"""Number of sequences in one forward pass, computed once from the model's sizes and the device's memory."""

import torch

from evocomp.log import UserError, warn_once
from evocomp.mllm.hf import FrozenMLLM

CPU_BYTES = 64 * 2**20
"""Memory budget [bytes] for the activations of one forward pass on a CPU: larger ones only miss its caches."""

CUDA_SHARE = 0.6
"""Fraction of a GPU's memory, without the weights, for activations; the rest is for the allocator's fragmentation."""


class Room:
    """Memory budget for the activations of one forward pass.

    The batch size changes losses in their last bits. For reproducible losses the budget therefore depends neither on
    other processes on the machine nor on the progress of the run. It decreases only after an out-of-memory error.

    Args:
        mllm: the frozen model.
        itemsize: size of a number while scoring [bytes].
    """

    def __init__(self, mllm: FrozenMLLM, itemsize: int):
        config = mllm.decoder.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        # residual stream, norm and attention output with temporaries; queries, keys, values before and after RoPE; MLP
        self.token = itemsize * (6 * config.hidden_size + 2 * heads * head_dim + 3 * config.intermediate_size)
        self.logits = len(mllm.vocabulary) * (itemsize + 8)  # also in float32, with their softmax
        self.budget = CPU_BYTES
        if mllm.device.type == "cuda":
            # of a sharded model, the shard on this device
            held = (p.to_local() if hasattr(p, "to_local") else p for p in mllm.model.parameters())
            weights = sum(part.numel() * part.element_size() for part in held)
            total = torch.cuda.get_device_properties(mllm.device).total_memory
            self.budget = int(CUDA_SHARE * (total - weights))

    def sequences(self, tokens: int, heads: int) -> int:
        """Number of sequences that fit, at least one.

        Args:
            tokens: tokens of a sequence.
            heads: how many of them the output head computes logits for.
        """
        return max(1, self.budget // (tokens * self.token + heads * self.logits))

    def lower(self, failed: int, tokens: int, heads: int) -> None:
        """Halve the batch size after a forward pass of `failed` sequences ran out of memory.

        Raises:
            UserError: `failed` is 1, so that the batch size cannot be reduced.
        """
        if failed <= 1:
            raise UserError(
                f"the model and one sequence of {tokens} tokens do not fit in the GPU's memory; set "
                "model.dtype=bfloat16, or use a smaller model or a larger GPU"
            )
        torch.cuda.empty_cache()
        self.budget = failed // 2 * (tokens * self.token + heads * self.logits)
        warn_once(f"scoring {failed} masks at once ran out of memory; continuing with {failed // 2}")
