import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.ops import cosine_separation, score_separation


def pairwise(hidden, retained, valid):
    """The published double sum over pairs, with an N x N matrix; differentiable by autograd."""
    out = []
    for h, keep, ok in zip(hidden, retained, valid, strict=True):
        zero, one = h[ok & ~keep], h[ok & keep]
        pairs = F.cosine_similarity(zero[:, None], one[None], dim=-1)
        out.append(pairs.mean() if pairs.numel() else h[ok].sum() * 0)
    return torch.stack(out)


def example(generator, b=3, n=13, d=7, dtype=torch.float64):
    hidden = torch.randn(b, n, d, generator=generator, dtype=dtype)
    retained = torch.rand(b, n, generator=generator) < 0.4
    valid = torch.rand(b, n, generator=generator) < 0.8
    return hidden, retained, valid


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 40), st.integers(1, 9))
def test_factorised_is_pairwise_with_its_gradient(seed, b, n, d):
    hidden, retained, valid = example(torch.Generator().manual_seed(seed), b, n, d)
    weight = torch.linspace(-1, 2, b, dtype=torch.float64)
    hidden.requires_grad_()
    ours, truth = cosine_separation(hidden, retained, valid), pairwise(hidden, retained, valid)
    torch.testing.assert_close(ours, truth)
    got, want = (torch.autograd.grad(x, hidden, weight)[0] for x in (ours, truth))
    torch.testing.assert_close(got, want)


def test_gradcheck_of_both_outputs(generator):
    hidden, retained, valid = example(generator)
    hidden.requires_grad_()
    weight = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, generator=generator, dtype=torch.float64, requires_grad=True)
    for mask in (valid, None):
        assert torch.autograd.gradcheck(
            lambda h, w, b, mask=mask: score_separation(h, w, b, retained, mask), (hidden, weight, bias)
        )
    assert torch.autograd.gradcheck(lambda h: cosine_separation(h, retained, valid), hidden)


def test_logits_are_the_linear_head(generator):
    hidden, retained, valid = example(generator)
    weight, bias = (
        torch.randn(7, generator=generator, dtype=torch.float64),
        torch.tensor(0.3, dtype=torch.float64),
    )
    logits, separation = score_separation(hidden, weight, bias, retained, valid)
    torch.testing.assert_close(logits, F.linear(hidden, weight[None], bias[None])[..., 0] * valid)
    torch.testing.assert_close(separation, cosine_separation(hidden, retained, valid))
    assert torch.equal(score_separation(hidden, weight, None, retained)[0], hidden @ weight)


@pytest.mark.parametrize("keep", [True, False])
def test_an_empty_segment_is_zero_with_zero_gradient(keep, generator):
    hidden = torch.randn(2, 5, 4, generator=generator, requires_grad=True)
    separation = cosine_separation(hidden, torch.full((2, 5), keep))
    separation.sum().backward()
    assert (separation == 0).all() and (hidden.grad == 0).all()


def test_padding_may_hold_nan(generator):
    hidden, retained, valid = example(generator)
    weight = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    want = cosine_separation(hidden, retained, valid)
    hidden[~valid] = torch.nan
    hidden.requires_grad_()
    logits, separation = score_separation(hidden, weight, None, retained, valid)
    (logits.sum() + separation.sum()).backward()
    torch.testing.assert_close(separation, want)
    assert (logits[~valid] == 0).all() and (hidden.grad[~valid] == 0).all()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_zero_rows_follow_the_clamp_of_torch(generator):
    hidden, retained, valid = example(generator)
    hidden[0, :4], hidden[1, 0] = 0, hidden[1, 0] * 1e-12  # zero, and a norm below EPS
    hidden.requires_grad_()
    ours, truth = cosine_separation(hidden, retained, valid), pairwise(hidden, retained, valid)
    torch.testing.assert_close(ours, truth)
    assert torch.autograd.grad(ours.sum(), hidden)[0].isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_bounded_and_independent_of_length_and_order(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    hidden, retained, valid = example(generator)
    base = cosine_separation(hidden, retained, valid)
    assert (base.abs() <= 1 + 1e-12).all()
    torch.testing.assert_close(cosine_separation(hidden * scale, retained, valid), base)
    torch.testing.assert_close(cosine_separation(hidden, ~retained, valid), base)
    order = torch.randperm(13, generator=generator)
    torch.testing.assert_close(cosine_separation(hidden[:, order], retained[:, order], valid[:, order]), base)


def test_low_precision_is_computed_in_fp32_even_under_autocast(generator):
    hidden, retained, valid = example(generator, n=50, d=64, dtype=torch.float32)
    low = hidden.bfloat16().requires_grad_()
    truth = cosine_separation(low.detach().double(), retained, valid)
    with torch.autocast("cpu", torch.bfloat16):
        separation = cosine_separation(low, retained, valid)
    separation.sum().backward()
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(separation.double(), truth, rtol=1e-5, atol=1e-6)
