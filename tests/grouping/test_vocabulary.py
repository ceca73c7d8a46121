import numpy as np
import pytest
import torch

from evocomp.grouping import nearest_words, vocabulary_groups
from evocomp.log import UserError


def brute_force(tokens, table, mask=None):
    """Cosines in fp64, word by word."""
    tokens, table = tokens.double().numpy(), table.double().numpy()
    index = []
    for v in tokens:
        best, at = -np.inf, None
        for j, e in enumerate(table):
            norm = np.linalg.norm(e)
            if norm == 0 or (mask is not None and not mask[j]):
                continue
            cosine = v @ e / (np.linalg.norm(v) * norm)
            if cosine > best:
                best, at = cosine, j
        index.append((at, best))
    return [i for i, _ in index], [c for _, c in index]


@pytest.mark.parametrize("chunk", [1, 5, 37, 100])
def test_nearest_words_equal_brute_force_for_any_chunk(chunk, generator):
    tokens = torch.randn(29, 8, generator=generator)
    table = torch.randn(37, 8, generator=generator) * torch.rand(37, 1, generator=generator)
    mask = torch.rand(37, generator=generator) < 0.8
    table[3] = 0
    index, cosine = nearest_words(tokens, table, mask, chunk=chunk)
    expected, cosines = brute_force(tokens, table, mask)
    assert index.tolist() == expected
    assert np.allclose(cosine.numpy(), cosines, atol=1e-6)


@pytest.mark.parametrize("chunk", [2, 8192])
def test_ties_go_to_the_lowest_id_and_zero_rows_are_never_nearest(chunk):
    table = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    tokens = torch.tensor([[3.0, 0.0], [-1.0, -1.0]])
    assert nearest_words(tokens, table, chunk=chunk)[0].tolist() == [2, 1]


def test_groups_are_tokens_with_the_same_nearest_word():
    table = torch.eye(3)
    tokens = torch.tensor([[0.1, 2, 0], [5, 0, 1], [0, 1, 0.0], [0, 0, 1]])
    assert vocabulary_groups(tokens, table).of.tolist() == [0, 1, 0, 2]


def test_bfloat16_inputs_are_compared_in_float32(generator):
    tokens = torch.randn(20, 16, generator=generator).bfloat16()
    table = torch.randn(50, 16, generator=generator).bfloat16()
    assert nearest_words(tokens, table)[0].tolist() == brute_force(tokens, table)[0]


def test_centring_and_whitening_equal_the_formula_in_fp64(generator):
    # a narrow cone: tokens and words have a large common mean, so that plain and centred results differ
    tokens = torch.randn(30, 6, generator=generator) * torch.tensor([5, 1, 1, 1, 1, 0.1]) + 4
    table = torch.randn(40, 6, generator=generator) - 3
    mask = torch.arange(40) < 33
    v = tokens.double() - tokens.double().mean(0)
    e = table.double() - table[mask].double().mean(0)
    centred, _ = nearest_words(tokens, table, mask, centre=True)
    assert centred.tolist() == brute_force(v, e, mask)[0]
    covariance = v.T @ v / len(v)
    shrunk = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(6, dtype=torch.double)
    values, vectors = torch.linalg.eigh(shrunk)
    inverse_root = vectors @ torch.diag(values**-0.5) @ vectors.T
    whitened, cosine = nearest_words(tokens, table, mask, whiten=True)
    expected, cosines = brute_force(v @ inverse_root, e @ inverse_root, mask)
    assert whitened.tolist() == expected
    assert np.allclose(cosine.numpy(), cosines, atol=1e-5)
    raw, _ = nearest_words(tokens, table, mask)
    assert len({tuple(x.tolist()) for x in (raw, centred, whitened)}) == 3


def test_whitening_works_with_fewer_tokens_than_dimensions(generator):
    tokens, table = torch.randn(4, 9, generator=generator), torch.randn(12, 9, generator=generator)
    index, cosine = nearest_words(tokens, table, whiten=True)
    assert torch.isfinite(cosine).all() and index.shape == (4,)


def test_inputs_stay_unchanged(generator):
    tokens, table = torch.randn(5, 4, generator=generator), torch.randn(7, 4, generator=generator)
    before = tokens.clone(), table.clone()
    nearest_words(tokens, table, whiten=True)
    assert torch.equal(tokens, before[0]) and torch.equal(table, before[1])


def test_tokens_that_are_not_finite_and_empty_vocabularies_are_refused():
    table = torch.eye(3)
    for tokens, mask in ((torch.full((2, 3), torch.nan), None), (torch.ones(2, 3), torch.zeros(3).bool())):
        with pytest.raises(UserError, match="cannot be grouped"):
            nearest_words(tokens, table, mask)
