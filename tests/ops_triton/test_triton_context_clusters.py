import pytest
import torch
from kernel_checks import DEVICE, DoesNothing, between_bands, strided

from evocomp.ops import context_clusters
from evocomp.ops.context_clusters import reference

SHAPES = [(1, 1, 2, 1, 1, 1), (2, 3, 9, 2, 4, 5), (1, 2, 33, 1, 32, 7), (3, 1, 130, 20, 17, 12)]


def example(generator, b, k, n, r, d, dtype=torch.float32):
    visual = torch.randn(b, n, d, generator=generator, device=DEVICE).to(dtype)
    order = torch.rand(b, k, n, generator=generator, device=DEVICE).argsort(-1)
    return visual, order[..., :r].contiguous()


def check(visual, selected, count):
    """Check in float64, up to rounding, that centres are farthest points and tokens have their nearest centre."""
    centres, assignment = context_clusters(visual, selected, count)
    n = visual.shape[1]
    assert ((centres >= 0) & (centres < n)).all() and ((assignment >= 0) & (assignment < n)).all()
    for image, masks, found, owner in zip(visual, selected, centres, assignment, strict=True):
        cosines = torch.nn.functional.normalize(image.double(), dim=-1)
        cosines = cosines @ cosines.T
        for kept, chosen, of in zip(masks, found, owner, strict=True):
            assert len(set(chosen.tolist())) == count and not set(chosen.tolist()) & set(kept.tolist())
            assert chosen.tolist() == sorted(chosen.tolist())
            assert torch.equal(of[kept], kept) and torch.equal(of[chosen], chosen)
            others = torch.ones(n, dtype=torch.bool, device=DEVICE)
            others[kept] = others[chosen] = False
            assert torch.isin(of[others], chosen).all()
            regret = cosines[:, chosen].amax(-1) - cosines.gather(1, of[:, None])[:, 0]
            assert (regret[others] <= 1e-5).all(), "a token is not with its nearest centre"
            assert_farthest_points(cosines, kept, set(chosen.tolist()))


def assert_farthest_points(cosines, kept, chosen):
    """Whether farthest-point sampling can select the centres in some order, which is reconstructed step by step."""
    dropped = torch.ones(len(cosines), dtype=torch.bool, device=cosines.device)
    dropped[kept] = False
    typical = (cosines * dropped).sum(1).masked_fill(~dropped, -torch.inf)
    nearest = torch.full_like(typical, -torch.inf).masked_fill(~dropped, torch.inf)
    left = set(chosen)
    value, wanted = -typical, "typical"
    for _ in range(len(chosen)):
        centre = min(left, key=lambda i: float(value[i]))
        assert float(value[centre] - value.min()) <= 1e-4, f"no {wanted} token among the centres"
        left.remove(centre)
        nearest = torch.maximum(nearest, cosines[centre])
        nearest[centre] = torch.inf
        value, wanted = nearest, "farthest"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_centres_are_farthest_points(shape, dtype, generator, guarded):
    *sizes, count, d = shape
    visual, selected = example(generator, *sizes, d, dtype)
    check(between_bands(visual), selected, count)


def test_equals_the_reference_away_from_ties(generator):
    visual, selected = example(generator, 2, 3, 60, 6, 16)
    centres, assignment = context_clusters(visual, selected, 9)
    for b in range(2):
        expected = reference.context_clusters(visual[b], selected[b], 9)
        assert torch.equal(centres[b], expected[0]) and torch.equal(assignment[b], expected[1])


def test_strided_tokens(generator):
    visual, selected = example(generator, 2, 1, 20, 4, 8)
    check(strided(visual), selected, 6)


def test_equal_tokens_have_distinct_centres_and_the_lowest_index_wins(generator):
    visual = torch.ones(1, 10, 4, device=DEVICE)
    centres, assignment = context_clusters(visual, torch.tensor([[[7]]], device=DEVICE), 3)
    assert centres.tolist() == [[[0, 1, 2]]]
    assert assignment.tolist() == [[[0, 1, 2, 0, 0, 0, 0, 7, 0, 0]]]


def test_zero_tokens_have_cosine_zero(generator):
    visual, selected = example(generator, 1, 1, 12, 2, 4)
    visual[0, 5] = 0
    check(visual, selected, 4)


def test_a_kernel_that_does_nothing_fails_the_check(generator, guarded, monkeypatch):
    from evocomp.ops.context_clusters import triton

    monkeypatch.setattr(triton, "_clusters_kernel", DoesNothing())
    with pytest.raises(AssertionError):
        check(*example(generator, 1, 2, 40, 4, 8), 5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes(dtype, generator):
    check(*example(generator, 2, 1, 2880, 339, 4096, dtype), 301)
