"""A compressor for another hidden size, against pooling in a loop."""

import pytest
import torch
from torch.testing import assert_close

from evocomp.compressor.model import EvoCompCompressor
from evocomp.compressor.transfer import PooledCompressor
from tests.inference.tiny_models import HIDDEN, build


def pooled(x, size):
    """Entry i is the mean of features floor(i n / size) .. ceil((i + 1) n / size)."""
    n = x.shape[-1]
    spans = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    return torch.stack([x[..., low:high].mean(-1) for low, high in spans], dim=-1)


@pytest.mark.parametrize("size", [HIDDEN, 48, 20, 3 * HIDDEN])
def test_scores_are_those_of_pooled_features(size):
    compressor = EvoCompCompressor.from_mllm(build("llava"), layer=0, budget_input=True).eval()
    visual, prompt = torch.randn(2, 6, size), torch.randn(2, 3, size)
    mask = torch.tensor([[True, True, True], [False, True, True]])
    with torch.no_grad():
        ours = PooledCompressor(compressor, size)(visual, prompt, mask, budget=8.0)
        wanted = compressor(pooled(visual, HIDDEN), pooled(prompt, HIDDEN), mask, budget=8.0)
    assert_close(ours.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    assert ours.hidden.shape == (2, 6, HIDDEN)


def test_no_prompt_and_same_configuration():
    compressor = EvoCompCompressor.from_mllm(build("llava"), layer=0, use_text=False, keep=7).eval()
    wide = PooledCompressor(compressor, 48)
    with torch.no_grad():
        assert wide(torch.randn(1, 5, 48)).logits.shape == (1, 5)
    assert wide.hidden_size == 48 and wide.config.keep == 7
