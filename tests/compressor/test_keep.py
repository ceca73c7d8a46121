"""What is kept. Dither: the Gumbel distribution without chance, and spread over the picture."""

import numpy as np
import pytest
import torch
from scipy.stats import gumbel_r, kstest

from evocomp.compressor.config import EvoCompConfig
from evocomp.compressor.keep import dither, selected_count, selected_tokens, shown_tokens
from evocomp.mllm.context import shown


@pytest.mark.parametrize("count", [144, 576, 2880])
def test_noise_is_gumbel_and_evenly_so(count):
    noise = dither(count).double().numpy()
    # the distance of the two distributions falls with 1/n; of a random sample it falls with 1/sqrt(n)
    assert kstest(noise, gumbel_r.cdf).statistic < 4 / count


@pytest.mark.parametrize("kept", [32, 64])
def test_equal_scores_keep_tokens_from_everywhere(kept):
    """Any nine rows of a picture hold three eighths of what is kept, give or take two; by chance three to five."""
    own, _ = selected_tokens(torch.zeros(576), kept, EvoCompConfig(dither=1.0))
    rows = torch.bincount(own // 24, minlength=24).numpy()
    parts = [rows[start : start + 9].sum() for start in range(16)]
    assert np.abs(np.array(parts) - kept * 9 / 24).max() <= 2


def test_kept_as_often_as_the_policy_draws_them():
    """Two kinds of token: as many of each as Gumbel top-r keeps on the average of many draws."""
    logits = torch.zeros(576)
    logits[100:125] = 2.0
    own, _ = selected_tokens(logits, 64, EvoCompConfig(dither=1.0))
    noise = torch.empty(400, 576).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = (logits - noise.log()).topk(64, dim=-1).indices  # Gumbel top-r
    share = ((drawn >= 100) & (drawn < 125)).sum(1).float().mean()
    assert abs(((own >= 100) & (own < 125)).sum() - share) <= 2
    assert 5 < share < 25


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_as_much_of_it_as_asked(scale):
    logits = torch.randn(10, generator=torch.Generator().manual_seed(0))
    expected = (logits + scale * dither(10)).topk(4).indices.sort().values
    assert torch.equal(selected_tokens(logits, 4, EvoCompConfig(dither=scale))[0], expected)
    assert torch.equal(selected_tokens(logits, 99, EvoCompConfig(dither=scale))[0], torch.arange(10))


@pytest.mark.parametrize(
    ("keep", "sharp", "selected"), [(16, 16, 8), (16, 0, 16), (6, 0.1, 2), (1, 2, 1), (99, 30.0, 15), (0, 5, 0)]
)
def test_context_takes_what_is_not_selected(keep, sharp, selected):
    generator = torch.Generator().manual_seed(0)
    visual, logits = torch.randn(30, 4, generator=generator), torch.randn(30, generator=generator)
    config = EvoCompConfig(sharp=sharp)
    given = shown_tokens(logits, visual, keep, config)
    assert selected_count(keep, 30, config) == selected
    expected = shown(visual, logits.topk(selected).indices, min(keep, 30) - selected)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True) if a is not None)
    assert len(given.places) == min(keep, 30) and (given.log_size is None) == (sharp == 0 or keep < 2)
