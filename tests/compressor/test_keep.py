"""Selection of kept tokens. Dither: deterministic Gumbel noise, spread evenly over the image."""

import numpy as np
import pytest
import torch
from scipy.stats import gumbel_r, kstest

from evocomp.compressor.config import EvoCompConfig
from evocomp.compressor.keep import dither, selected_count, selected_tokens, shown_tokens
from evocomp.mllm.context import shown


@pytest.mark.parametrize("count", [144, 576, 2880])
def test_noise_follows_the_gumbel_distribution_evenly(count):
    noise = dither(count).double().numpy()
    # the distance between the distributions falls as 1/n; for a random sample it falls as 1/sqrt(n)
    assert kstest(noise, gumbel_r.cdf).statistic < 4 / count


@pytest.mark.parametrize("kept", [32, 64])
def test_equal_scores_keep_tokens_from_all_parts_of_the_image(kept):
    """Any nine rows of an image contain three eighths of the kept tokens, +- 2; in a random sample +- 3 to 5."""
    own, _ = selected_tokens(torch.zeros(576), kept, EvoCompConfig(dither=1.0))
    rows = torch.bincount(own // 24, minlength=24).numpy()
    parts = [rows[start : start + 9].sum() for start in range(16)]
    assert np.abs(np.array(parts) - kept * 9 / 24).max() <= 2


def test_kept_counts_match_the_policys_mean():
    """With two kinds of tokens, as many of each are kept as by Gumbel top-r on average over many samples."""
    logits = torch.zeros(576)
    logits[100:125] = 2.0
    own, _ = selected_tokens(logits, 64, EvoCompConfig(dither=1.0))
    noise = torch.empty(400, 576).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = (logits - noise.log()).topk(64, dim=-1).indices  # Gumbel top-r
    share = ((drawn >= 100) & (drawn < 125)).sum(1).float().mean()
    assert abs(((own >= 100) & (own < 125)).sum() - share) <= 2
    assert 5 < share < 25


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_dither_is_scaled(scale):
    logits = torch.randn(10, generator=torch.Generator().manual_seed(0))
    expected = (logits + scale * dither(10)).topk(4).indices.sort().values
    assert torch.equal(selected_tokens(logits, 4, EvoCompConfig(dither=scale))[0], expected)
    assert torch.equal(selected_tokens(logits, 99, EvoCompConfig(dither=scale))[0], torch.arange(10))


@pytest.mark.parametrize(
    ("keep", "sharp", "selected"), [(16, 16, 8), (16, 0, 16), (6, 0.1, 2), (1, 2, 1), (99, 30.0, 15), (0, 5, 0)]
)
def test_context_tokens_are_the_rest_of_the_budget(keep, sharp, selected):
    generator = torch.Generator().manual_seed(0)
    visual, logits = torch.randn(30, 4, generator=generator), torch.randn(30, generator=generator)
    config = EvoCompConfig(sharp=sharp)
    given = shown_tokens(logits, visual, keep, config)
    assert selected_count(keep, 30, config) == selected
    expected = shown(visual, logits.topk(selected).indices, min(keep, 30) - selected)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True) if a is not None)
    assert len(given.places) == min(keep, 30) and (given.log_size is None) == (sharp == 0 or keep < 2)
