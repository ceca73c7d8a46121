import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.losses import group_relative_advantages, plackett_luce_log_prob, policy_loss


def random_draws(batch: int, n: int, r: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """K ordered draws of r of n tokens [B, K, R]."""
    return torch.rand(batch, k, n, generator=generator).topk(r, dim=-1).indices


def brute_force(logits, order):
    """The product of successive softmax probabilities over the remaining tokens, in Python."""
    weight = {i: math.exp(x) for i, x in enumerate(logits)}
    probability = 1.0
    for i in order:
        probability *= weight[i] / sum(weight.values())
        del weight[i]
    return probability


@pytest.mark.parametrize("r", [1, 2, 3, 4, 5])
def test_all_orders_of_five_tokens(r, generator):
    logits = torch.randn(2, 5, generator=generator, dtype=torch.float64) * 2
    orders = list(itertools.permutations(range(5), r))
    probability = plackett_luce_log_prob(logits, torch.tensor(orders).expand(2, -1, -1)).exp()
    expected = [[brute_force(row, order) for order in orders] for row in logits.tolist()]
    torch.testing.assert_close(probability, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(probability.sum(1), torch.ones(2, dtype=torch.float64))


def test_padding_cannot_be_drawn_and_may_hold_nan():
    logits = torch.tensor([[0.3, torch.nan, -1.0, torch.inf, 2.0]], dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[True, False, True, False, True]])
    orders = list(itertools.permutations([0, 2, 4], 3))
    log_prob = plackett_luce_log_prob(logits, torch.tensor([orders]), valid)
    short = plackett_luce_log_prob(
        torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64),
        torch.tensor([list(itertools.permutations(range(3), 3))]),
    )
    torch.testing.assert_close(log_prob, short)
    log_prob[0, 0].backward()
    assert logits.grad.isfinite().all() and (logits.grad[~valid] == 0).all()


@pytest.mark.parametrize("r", [1, 3, 6])
def test_log_prob_gradcheck(r, generator):
    logits = torch.randn(2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    draws = random_draws(2, 6, r, 4, generator)
    assert torch.autograd.gradcheck(lambda x: plackett_luce_log_prob(x, draws), logits)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 5), st.data())
def test_a_constant_added_to_all_logits_changes_nothing(seed, n, k, data):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, n, generator=generator, dtype=torch.float64) * 10
    draws = random_draws(2, n, data.draw(st.integers(1, n)), k, generator)
    log_prob = plackett_luce_log_prob(logits, draws)
    torch.testing.assert_close(plackett_luce_log_prob(logits + 3, draws), log_prob)
    assert (log_prob <= 1e-9).all()


def test_advantages_are_the_formula_with_clipped_losses():
    losses = torch.tensor([[1.0, 2.0, 3.0], [0.0, 6.0, 99.0]])
    expected = [[(2 - x) / 1.1 for x in (1, 2, 3)], [(4 - x) / (math.sqrt(12) + 0.1) for x in (0, 6, 6)]]
    torch.testing.assert_close(group_relative_advantages(losses), torch.tensor(expected))


def example(generator):
    logits = torch.randn(3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    draws = random_draws(3, 8, 3, 5, generator)
    advantages = group_relative_advantages(torch.rand(3, 5, generator=generator, dtype=torch.float64) * 4)
    return logits, draws, advantages, plackett_luce_log_prob(logits, draws).detach()


def test_unchanged_policy_gives_the_reinforce_gradient(generator):
    logits, draws, advantages, old = example(generator)
    ours = policy_loss(logits, draws, advantages, old, variance_weight=0)
    reinforce = -(advantages * plackett_luce_log_prob(logits, draws) / 3).mean()
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (ours["loss"], reinforce)))
    assert ours["clipped"] == 0


def test_the_ratio_is_clipped(generator):
    logits, draws, advantages, old = example(generator)
    factor = torch.tensor([[0.5, 0.9, 1.0, 1.1, 2.0]], dtype=torch.float64)  # pi / pi_old, r-th root
    parts = policy_loss(logits, draws, advantages, old - 3 * factor.log(), variance_weight=0)
    ppo = [
        min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        for row in advantages.tolist()
        for ratio, a in zip(factor[0].tolist(), row, strict=True)
    ]
    torch.testing.assert_close(parts["policy"], torch.tensor(-sum(ppo) / len(ppo), dtype=torch.float64))
    torch.testing.assert_close(parts["clipped"].item(), 2 / 5)


def test_variance_is_over_valid_logits(generator):
    logits, draws, advantages, old = example(generator)
    parts = policy_loss(logits, draws, advantages, old)
    torch.testing.assert_close(parts["logit_variance"], logits.var(1, correction=0).mean())
    torch.testing.assert_close(parts["loss"], parts["policy"] + 1e-4 * parts["logit_variance"])
    padded = torch.cat([logits, torch.full((3, 2), torch.nan, dtype=torch.float64)], dim=1)
    valid = torch.arange(10).expand(3, -1) < 8
    for name, value in policy_loss(padded, draws, advantages, old, valid).items():
        torch.testing.assert_close(value, parts[name])


def test_a_step_makes_good_masks_likelier(generator):
    logits, draws, advantages, old = example(generator)
    policy_loss(logits, draws, advantages, old)["loss"].backward()
    moved = plackett_luce_log_prob(logits.detach() - 0.01 * logits.grad, draws)
    assert ((moved - old) * advantages).sum() > 0
