import pytest
import torch
from kernel_checks import DEVICE, DoesNothing, between_bands, strided

from evocomp.ops import top_r_compact
from evocomp.ops.top_r_compact import reference

CASES = [(1, 1), (37, 1), (37, 37), (64, 64), (577, 64), (577, 576)]


def example(generator, b, n, d=5, dtype=torch.float32):
    scores = torch.randn(b, n, generator=generator, device=DEVICE).to(dtype)
    embeddings = torch.randn(b, n, d, generator=generator, device=DEVICE).to(dtype)
    valid = torch.rand(b, n, generator=generator, device=DEVICE) < 0.8
    return scores, embeddings, valid


def check(scores, r, embeddings, valid):
    positions = torch.arange(scores.shape[1], device=DEVICE).expand(3, *scores.shape) * 2
    index = reference.top_r_index(scores, r, valid)
    # test the index alone first: gathering with a wrong index reads out of bounds, which makes the GPU context unusable
    assert torch.equal(_module().top_r_index(scores, r, valid), index)
    kept = top_r_compact(scores, r, embeddings, positions, valid)
    assert torch.equal(kept.index, index)
    assert torch.equal(kept.embeddings, reference.gather_embeddings(embeddings, index))
    assert torch.equal(kept.position_ids, (index * 2).expand(3, -1, -1))
    assert valid is None or torch.equal(kept.mask, valid.gather(1, index))


@pytest.mark.parametrize("n,r", CASES)
def test_equals_a_stable_sort(n, r, generator, guarded):
    scores, embeddings, valid = example(generator, 3, n)
    check(between_bands(scores), r, between_bands(embeddings), None)
    check(between_bands(scores), r, between_bands(embeddings), between_bands(valid))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_scores_with_many_ties(dtype, generator, guarded):
    scores, embeddings, valid = example(generator, 3, 577, dtype=dtype)
    check((scores * 4).round() / 4, 64, embeddings, valid)


def test_special_values(generator):
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45], device=DEVICE)
    pick = torch.randint(0, len(special), (3, 100), generator=generator, device=DEVICE)
    _, embeddings, valid = example(generator, 3, 100)
    for r in (1, 50, 99):
        check(special[pick], r, embeddings, valid)
        check(special[pick], r, embeddings, None)


def test_all_equal_and_all_padding(generator):
    _, embeddings, valid = example(generator, 2, 37)
    same = torch.full((2, 37), -3.0, device=DEVICE)
    assert top_r_compact(same, 4, embeddings).index.tolist() == [[0, 1, 2, 3]] * 2
    check(same, 4, embeddings, torch.zeros_like(valid))


def test_strides_wide_rows_and_gradient(generator):
    scores, embeddings, valid = example(generator, 2, 37, d=1030)
    check(strided(scores), 7, strided(embeddings), strided(valid))
    mine, theirs = (embeddings.clone().requires_grad_() for _ in range(2))
    up = torch.randn(2, 7, 1030, generator=generator, device=DEVICE)
    top_r_compact(scores, 7, mine).embeddings.backward(up)
    reference.gather_embeddings(theirs, reference.top_r_index(scores, 7, None)).backward(up)
    assert torch.equal(mine.grad, theirs.grad)


def test_operator_registration(generator):
    module = _module()
    scores, embeddings, valid = example(generator, 2, 37)
    index = reference.top_r_index(scores, 4, valid)
    torch.library.opcheck(module._top_r_index, (scores, 4, valid))
    torch.library.opcheck(module._top_r_index, (scores, 37, None))
    torch.library.opcheck(module._gather_embeddings, (embeddings.requires_grad_(), index))


@pytest.mark.parametrize("name", ["_index_kernel", "_gather_kernel"])
def test_a_kernel_that_does_nothing_fails_the_check(name, generator, guarded, monkeypatch):
    monkeypatch.setattr(_module(), name, DoesNothing())
    scores, embeddings, valid = example(generator, 2, 37)
    with pytest.raises(AssertionError):
        check(scores, 4, embeddings, valid)


@pytest.mark.gpu
@pytest.mark.parametrize("n,r", [(576, 64), (2880, 160), (2880, 2880)])
def test_real_sizes(n, r, generator):
    check(*_swap(example(generator, 8, n, 4096, torch.bfloat16), r))


def _swap(example, r):
    scores, embeddings, valid = example
    return scores, r, embeddings, valid


def _module():
    from evocomp.ops.top_r_compact import triton

    return triton
