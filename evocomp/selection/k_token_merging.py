"""K-Token Merging: a light learned encoder turns each K consecutive tokens into one (arXiv 2604.15153).

Written from the paper's abstract (no code is public): there it shortens text prompts by up to 75 % for an
LLM adapted with LoRA; here it merges visual tokens. Unlike the rest of this room it must be trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlockMerger(nn.Module):
    """Each contiguous block of `block` tokens of width `hidden_size` -> one token.

    merged = mean of the block + MLP(concatenated block). The MLP's last layer starts at zero, so training
    starts from block means. A short last block is padded with zeros and averaged over its own tokens.
    """

    def __init__(self, hidden_size: int, block: int):
        super().__init__()
        if block < 1:
            raise ValueError(f"block must be at least 1 token, not {block}")
        self.block = block
        width = max(1, hidden_size // 4)
        self.residual = nn.Sequential(
            nn.Linear(block * hidden_size, width), nn.GELU(), nn.Linear(width, hidden_size)
        )
        nn.init.zeros_(self.residual[-1].weight)
        nn.init.zeros_(self.residual[-1].bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., N, D] -> [..., ceil(N / block), D]."""
        n = tokens.shape[-2]
        blocks = F.pad(tokens, (0, 0, 0, -n % self.block)).unflatten(-2, (-1, self.block))
        sizes = torch.full((blocks.shape[-3], 1), self.block, dtype=tokens.dtype, device=tokens.device)
        sizes[-1:] -= -n % self.block
        return blocks.sum(-2) / sizes + self.residual(blocks.flatten(-2))

    def positions(self, n: int) -> Tensor:
        """Original place [ceil(n / block)] of each merged token: the (lower) middle of its block."""
        start = torch.arange(0, n, self.block)
        return (start + (start + self.block).clamp(max=n) - 1) // 2
