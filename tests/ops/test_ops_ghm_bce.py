import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.log import UserError
from evocomp.ops import ghm_bce, ghm_histogram


def brute_force(logits, targets, bins, rule):
    """The published sum by a plain loop over tokens."""
    g = (torch.sigmoid(logits) - targets).abs().tolist()
    index = [min(int(x * bins), bins - 1) for x in g]
    regions = bins if rule == "paper" else len(set(index))
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    n = len(g)
    return sum(n / (index.count(b) * regions) * bce[i] for i, b in enumerate(index)) / n


@pytest.mark.parametrize("rule", ["paper", "non_empty"])
@pytest.mark.parametrize("n,bins", [(1, 10), (37, 10), (37, 1), (577, 30)])
def test_equals_the_published_sum(n, bins, rule, generator):
    logits = torch.randn(n, generator=generator, dtype=torch.float64) * 3
    targets = (torch.rand(n, generator=generator) < 0.3).double()
    torch.testing.assert_close(ghm_bce(logits, targets, bins=bins, rule=rule), brute_force(logits, targets, bins, rule))


@pytest.mark.parametrize("rule", ["paper", "non_empty"])
def test_gradcheck(rule, generator):
    logits = torch.randn(3, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(3, 11, generator=generator, dtype=torch.float64)
    valid = torch.rand(3, 11, generator=generator) < 0.7
    distance = (logits.detach().sigmoid() - targets).abs() * 10
    assert (distance - distance.round()).abs().min() > 1e-4  # no bin changes within the finite difference
    assert torch.autograd.gradcheck(lambda x: ghm_bce(x, targets, valid, rule=rule), logits)


def test_backward_is_the_closed_form(generator):
    logits = torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = (torch.rand(50, generator=generator) < 0.5).double()
    ghm_bce(logits, targets).backward()
    slope = logits.detach().sigmoid() - targets
    counts = ghm_histogram(logits, targets)
    expected = slope / (counts[(slope.abs() * 10).long()] * 10)
    torch.testing.assert_close(logits.grad, expected)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(0, 30), min_size=1, max_size=5),
    st.sampled_from(["paper", "non_empty"]),
)
def test_shards_with_summed_counts_equal_the_combined_batch(seed, sizes, rule):
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    logits = (torch.randn(n, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    targets = torch.rand(n, generator=generator, dtype=torch.float64)
    joined = ghm_bce(logits, targets, rule=rule)
    expected = torch.autograd.grad(joined, logits)[0]
    shards = list(zip(logits.split(sizes), targets.split(sizes), strict=True))
    counts = sum(ghm_histogram(x, y) for x, y in shards)
    total = sum(ghm_bce(x, y, counts=counts, rule=rule) for x, y in shards)
    torch.testing.assert_close(total, joined)
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 31))
def test_histogram_counts_valid_tokens_only(seed, n, bins):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, n, generator=generator) * 5
    targets = torch.rand(2, n, generator=generator)
    valid = torch.rand(2, n, generator=generator) < 0.6
    counts = ghm_histogram(logits, targets, valid, bins)
    assert counts.dtype == torch.int64 and counts.sum() == valid.sum()
    assert torch.equal(counts, ghm_histogram(logits[valid], targets[valid], bins=bins))


def test_padding_may_hold_nan(generator):
    logits, targets = torch.randn(2, 9, generator=generator), torch.rand(2, 9, generator=generator)
    valid = torch.arange(9) < torch.tensor([[9], [5]])
    expected = ghm_bce(logits[valid], targets[valid])
    logits[~valid], targets[~valid] = torch.nan, torch.nan
    logits.requires_grad_()
    loss = ghm_bce(logits, targets, valid)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert (logits.grad[~valid] == 0).all() and (logits.grad[valid] != 0).all()


def test_nothing_valid_is_zero():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = ghm_bce(logits, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_a_nan_logit_makes_a_nan_loss_and_no_crash():
    logits = torch.tensor([0.5, torch.nan], requires_grad=True)
    loss = ghm_bce(logits, torch.ones(2))
    loss.backward()
    assert loss.isnan() and logits.grad[1].isnan()


def test_extreme_logits_stay_finite():
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    targets = torch.tensor([1.0, 0, 0, 1])
    loss = ghm_bce(logits, targets)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(2e4 / 20))
    torch.testing.assert_close(logits.grad, torch.tensor([0, 0, 1, -1]) / 20)


def test_low_precision_logits_get_a_gradient_of_their_dtype(generator):
    logits = torch.randn(40, generator=generator).bfloat16().requires_grad_()
    targets = torch.rand(40, generator=generator) < 0.5
    loss = ghm_bce(logits, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, ghm_bce(logits.detach().float(), targets))


def test_unknown_rule():
    with pytest.raises(UserError, match="paper, non_empty"):
        ghm_bce(torch.zeros(1), torch.zeros(1), rule="mean")
