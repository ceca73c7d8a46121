import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.ops import vocabulary_argmax


@pytest.mark.parametrize("chunk", [1, 7, 64, 8192])
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 123, 19), (64, 577, 32)])
def test_is_the_argmax_of_the_full_cosine_matrix(shape, chunk):
    n, v, d = shape
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randn(n, d, generator=generator, dtype=torch.float64)
    table = torch.randn(v, d, generator=generator, dtype=torch.float64) * torch.rand(v, 1, generator=generator)
    full = F.cosine_similarity(tokens[:, None], table[None], dim=-1)
    index, cosine = vocabulary_argmax(tokens, table, chunk=chunk)
    assert torch.equal(index, full.argmax(-1))
    torch.testing.assert_close(cosine, full.amax(-1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 40), st.integers(1, 41))
def test_small_integers_tie_to_the_lowest_id_for_any_chunk(seed, n, v, chunk):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-2, 3, (n, 3), generator=generator).float()
    # powers of two only: every product, sum and norm is exact, so that equal cosines are bitwise equal
    table = torch.zeros(v, 3)
    table[torch.arange(v), torch.randint(0, 3, (v,), generator=generator)] = 2.0 ** torch.randint(
        -2, 3, (v,), generator=generator
    )
    scores = tokens @ F.normalize(table, dim=-1).T
    lowest = torch.tensor([[row.index(max(row))] for row in scores.tolist()]).squeeze(1)
    assert torch.equal(vocabulary_argmax(tokens, table, chunk=chunk)[0], lowest)


def test_zero_nan_and_masked_rows_are_never_nearest(generator):
    tokens = torch.randn(30, 8, generator=generator)
    table = torch.randn(20, 8, generator=generator)
    table[3], table[4, 2] = 0, torch.nan
    table[5] = tokens[0]  # the nearest row, but masked
    mask = torch.ones(20, dtype=torch.bool)
    mask[5] = False
    index, cosine = vocabulary_argmax(tokens, table, mask, chunk=6)
    assert not set(index.tolist()) & {3, 4, 5}
    assert cosine.isfinite().all()


def test_zero_token_has_cosine_zero():
    index, cosine = vocabulary_argmax(torch.zeros(2, 4), torch.eye(4), chunk=2)
    assert index.tolist() == [0, 0] and cosine.tolist() == [0, 0]


def test_without_an_allowed_row_the_cosine_is_minus_infinity():
    _, cosine = vocabulary_argmax(torch.ones(2, 4), torch.eye(4), torch.zeros(4, dtype=torch.bool))
    assert (cosine == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_scored_in_fp32(dtype, generator):
    tokens = torch.randn(64, 48, generator=generator).to(dtype)
    table = torch.randn(500, 48, generator=generator).to(dtype)
    exact_index, _ = vocabulary_argmax(tokens.double(), table.double())
    with torch.autocast("cpu", torch.bfloat16):  # must not affect the scores
        index, cosine = vocabulary_argmax(tokens, table, chunk=100)
    assert cosine.dtype == torch.float32
    full = F.cosine_similarity(tokens.double()[:, None], table.double()[None], dim=-1)
    regret = full.gather(1, exact_index[:, None]) - full.gather(1, index[:, None])
    assert regret.max() <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunks_on_a_gpu(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    # small integers: sums are exact in any order, so that copies in other chunks have bitwise equal scores
    both = (torch.randn(n, 4096, generator=generator, device="cuda").mul(2).round() for n in (577, 9001))
    tokens, table = (one.to(dtype) for one in both)
    table[7000:] = table[:2001]
    index, cosine = vocabulary_argmax(tokens, table, chunk=4008)
    scores = F.normalize(tokens.double(), dim=-1) @ F.normalize(table.double(), dim=-1).T
    assert cosine.dtype == torch.float32 and (index < 7000).all()
    regret = scores.amax(-1) - scores.gather(1, index[:, None])[:, 0]
    assert (regret <= 1e-5).all()
    torch.testing.assert_close(cosine.double(), scores.amax(-1), rtol=0, atol=1e-5)
