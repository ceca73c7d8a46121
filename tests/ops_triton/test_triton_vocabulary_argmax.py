import pytest
import torch
from kernel_checks import DEVICE, DoesNothing, between_bands, strided

from evocomp.ops import vocabulary_argmax

SHAPES = [(1, 1, 1), (1, 577, 37), (37, 123, 16), (37, 37, 65), (40, 1, 8)]


def example(generator, n, v, d, dtype=torch.float32):
    tokens = torch.randn(n, d, generator=generator, device=DEVICE).to(dtype)
    table = torch.randn(v, d, generator=generator, device=DEVICE).to(dtype)
    return tokens, table


def check(tokens, table, mask=None):
    index, cosine = vocabulary_argmax(tokens, table, mask)
    scores = (
        torch.nn.functional.normalize(tokens.double(), dim=-1) @ torch.nn.functional.normalize(table.double(), dim=-1).T
    )
    allowed = table.double().norm(dim=-1) > 0 if mask is None else (table.double().norm(dim=-1) > 0) & mask
    scores = scores.masked_fill(~allowed, -torch.inf)
    assert ((index >= 0) & (index < len(table))).all()
    regret = scores.amax(-1) - scores.gather(1, index[:, None])[:, 0]
    assert (regret <= 1e-5).all(), "the chosen row is not the nearest one"
    torch.testing.assert_close(cosine.double(), scores.amax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_finds_the_nearest_row(shape, dtype, generator, guarded):
    tokens, table = example(generator, *shape, dtype)
    check(between_bands(tokens), between_bands(table))


def test_mixed_dtypes_and_strides(generator):
    tokens, table = example(generator, 20, 70, 37)
    check(strided(tokens), strided(table.bfloat16()))


def test_duplicate_rows_tie_to_the_lowest_id(generator):
    # copies in one block, in other blocks and in other slices of the vocabulary
    # (small integers: every sum is exact, so that copies have bitwise equal scores in any order of addition)
    tokens, table = (x.mul(2).round() for x in example(generator, 37, 40, 19))
    index, _ = vocabulary_argmax(tokens, table.repeat(5, 1))
    assert torch.equal(index, vocabulary_argmax(tokens, table)[0])
    check(tokens, table)


def test_zero_nan_and_masked_rows_are_never_nearest(generator):
    tokens, table = example(generator, 30, 100, 8)
    table[3], table[64], table[4, 2], table[5] = 0, 0, torch.nan, tokens[0]
    mask = torch.rand(100, generator=generator, device=DEVICE) < 0.8
    mask[5] = False
    check(tokens, table, strided(mask))
    index, cosine = vocabulary_argmax(tokens, table, torch.zeros_like(mask))
    assert (cosine == -torch.inf).all() and (index == 0).all()
    assert vocabulary_argmax(torch.zeros_like(tokens), table)[1].eq(0).all()


def test_same_bits_twice_and_inputs_untouched(generator):
    tokens, table = example(generator, 37, 200, 33)
    before = tokens.clone(), table.clone()
    first, second = vocabulary_argmax(tokens, table), vocabulary_argmax(tokens, table)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(tokens, before[0]) and torch.equal(table, before[1])


def test_operator_registration(generator):
    tokens, table = example(generator, 5, 40, 8)
    mask = torch.ones(40, dtype=torch.bool, device=DEVICE)
    for arguments in ((tokens, table, None), (tokens, table, mask)):
        torch.library.opcheck(_module().vocabulary_argmax, arguments)


def test_a_kernel_that_does_nothing_fails_the_check(generator, guarded, monkeypatch):
    monkeypatch.setattr(_module(), "_argmax_kernel", DoesNothing())
    with pytest.raises(AssertionError):
        check(*example(generator, 37, 123, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_real_sizes(dtype, generator):
    check(*example(generator, 576, 32_000, 4096, dtype))


def _module():
    from evocomp.ops.vocabulary_argmax import triton

    return triton
