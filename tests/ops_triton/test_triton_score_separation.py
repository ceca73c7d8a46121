import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, DoesNothing, assert_accurate, between_bands, strided

from evocomp.ops import cosine_separation, score_separation
from evocomp.ops.score_separation import reference

SHAPES = [(1, 1, 1), (2, 37, 16), (1, 577, 8), (3, 33, 37), (2, 5, 600)]


def example(generator, shape, dtype=torch.float32):
    hidden = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    weight = torch.randn(shape[2], generator=generator, device=DEVICE).to(dtype)
    bias = torch.randn(1, generator=generator, device=DEVICE).to(dtype)
    retained = torch.rand(shape[:2], generator=generator, device=DEVICE) < 0.4
    valid = torch.rand(shape[:2], generator=generator, device=DEVICE) < 0.8
    return hidden, weight, bias, retained, valid


def eager(hidden, weight, bias, retained, valid):
    """An eager implementation: normalise, average both segments, multiply; gradients by autograd."""
    valid = torch.ones_like(retained) if valid is None else valid
    hidden = hidden.masked_fill(~valid[..., None], 0)
    unit = F.normalize(hidden, dim=-1, eps=max(reference.EPS, torch.finfo(hidden.dtype).tiny))
    means = []
    for segment in (valid & ~retained, valid & retained):
        size = segment.sum(1, keepdim=True).clamp_min(1)
        means.append((unit * segment[..., None]).sum(1) / size.to(unit.dtype))
    separation = (means[0] * means[1]).sum(-1)
    if weight is None:
        return (separation,)
    return F.linear(hidden, weight[None], bias)[..., 0].masked_fill(~valid, 0), separation


def outcome(function, hidden, weight, bias, retained, valid, dtype, ups):
    """[outputs..., gradients...] of the function with its inputs in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias) if x is not None]
    outputs = function(*leaves, *[None] * (3 - len(leaves)), retained, valid)
    gradients = torch.autograd.grad(outputs, leaves, [up.to(out) for up, out in zip(ups, outputs, strict=True)])
    return [out.detach() for out in outputs] + list(gradients)


def kernel(hidden, weight, bias, retained, valid):
    if weight is None:
        return (cosine_separation(hidden, retained, valid),)
    return score_separation(hidden, weight, bias, retained, valid)


def check(generator, hidden, weight, bias, retained, valid):
    ups = [torch.randn(shape, generator=generator, device=DEVICE) for shape in (retained.shape, len(retained))]
    ups = ups if weight is not None else ups[1:]
    arguments = (hidden, weight, bias, retained, valid)
    got = outcome(kernel, *arguments, hidden.dtype, ups)
    plain = outcome(eager, *arguments, hidden.dtype, ups)
    truth = outcome(eager, *arguments, torch.float64, ups)
    for results in zip(got, plain, truth, strict=True):
        assert_accurate(*results)


@pytest.mark.parametrize(
    "shape,dtype",
    [(shape, torch.float32) for shape in SHAPES]
    + [(shape, low) for shape in SHAPES[:2] + SHAPES[3:] for low in (torch.float16, torch.bfloat16)],
)
def test_outputs_and_gradients(shape, dtype, generator, guarded):
    hidden, weight, bias, retained, valid = example(generator, shape, dtype)
    hidden = between_bands(hidden)
    check(generator, hidden, between_bands(weight), between_bands(bias), between_bands(retained), valid)
    check(generator, hidden, weight, None, retained, None)
    check(generator, hidden, None, None, retained, between_bands(valid))


def test_strides(generator):
    check(generator, *[strided(x) for x in example(generator, (3, 37, 19))])
    hidden, *rest = example(generator, (37, 3, 19))
    hidden, rest = hidden.transpose(0, 1), [x.T if x.ndim == 2 else x for x in rest]
    check(generator, hidden, *rest)


@pytest.mark.parametrize("keep", [True, False])
def test_an_empty_segment_is_zero_with_zero_gradient(keep, generator):
    hidden, _, _, retained, valid = example(generator, (2, 37, 8))
    hidden.requires_grad_()
    separation = cosine_separation(hidden, torch.full_like(retained, keep), valid)
    separation.sum().backward()
    assert (separation == 0).all() and (hidden.grad == 0).all()


def test_padding_may_hold_nan(generator):
    hidden, weight, bias, retained, valid = example(generator, (2, 37, 8))
    clean = score_separation(hidden, weight, bias, retained, valid)
    hidden[~valid] = torch.nan
    hidden.requires_grad_()
    weight.requires_grad_()
    dirty = score_separation(hidden, weight, bias, retained, valid)
    (dirty[0].sum() + dirty[1].sum()).backward()
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert (dirty[0][~valid] == 0).all() and (hidden.grad[~valid] == 0).all()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_zero_and_tiny_rows_follow_the_reference(generator):
    hidden, weight, bias, retained, valid = example(generator, (2, 37, 8))
    hidden[:, :4], hidden[:, 4:8] = 0, hidden[:, 4:8] * 1e-12
    results = [
        outcome(op, hidden, None, None, retained, valid, dtype, [torch.ones(2, device=DEVICE)])
        for op, dtype in ((kernel, torch.float32), (eager, torch.float32), (eager, torch.float64))
    ]
    for got, plain, truth in zip(*results, strict=True):
        if truth.ndim < 3:
            assert_accurate(got, plain, truth)
            continue
        for rows in (slice(0, 4), slice(4, 8), slice(8, None)):  # gradients of each kind have a scale of their own
            assert_accurate(got[:, rows], plain[:, rows], truth[:, rows])


def test_same_bits_twice_and_inputs_untouched(generator):
    arguments = example(generator, (2, 70, 16))
    before = [x.clone() for x in arguments]
    ups = [torch.ones(2, 70, device=DEVICE), torch.ones(2, device=DEVICE)]
    first, second = (outcome(kernel, *arguments, torch.float32, ups) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=True))


def test_operator_registration(generator):
    module = _module()
    hidden, weight, bias, retained, valid = example(generator, (2, 5, 8))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    torch.library.opcheck(module._forward, (*leaves, retained, valid))
    torch.library.opcheck(module._forward, (hidden, None, None, retained, None))


@pytest.mark.parametrize("name", ["_forward_kernel", "_finish_kernel", "_backward_kernel"])
def test_a_kernel_that_does_nothing_fails_the_check(name, generator, guarded, monkeypatch):
    monkeypatch.setattr(_module(), name, DoesNothing())
    with pytest.raises(AssertionError):
        check(generator, *example(generator, (2, 37, 16)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_real_sizes(dtype, generator):
    check(generator, *example(generator, (4, 577, 4096), dtype))


def _module():
    from evocomp.ops.score_separation import triton

    return triton
