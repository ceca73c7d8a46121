import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.log import UserError
from evocomp.ops import top_r_compact


def expected_index(scores, r, valid):
    """Indices by Python's sort: by (padding, -score, index), padding by index only; then ascending."""
    value = [-torch.inf if s != s else s for s in scores]
    order = sorted(range(len(scores)), key=lambda i: (not valid[i], -value[i] if valid[i] else 0, i))
    return sorted(order[:r])


scores_strategy = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), float("-inf"), float("nan")]),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(scores_strategy, st.data())
def test_keeps_the_best_in_order_with_ties_to_the_lowest(scores, data):
    n = len(scores)
    r = data.draw(st.integers(1, n))
    valid = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    embeddings = torch.arange(n * 3.0).view(1, n, 3)
    kept = top_r_compact(torch.tensor([scores]), r, embeddings, torch.arange(n)[None] + 7, torch.tensor([valid]))
    index = expected_index(scores, r, valid)
    assert kept.index.tolist() == [index]
    assert torch.equal(kept.embeddings[0], embeddings[0, index])
    assert kept.position_ids.tolist() == [[i + 7 for i in index]]
    assert kept.mask.tolist() == [[valid[i] for i in index]]


@pytest.mark.parametrize("n,r", [(1, 1), (37, 1), (37, 37), (577, 64)])
def test_batch_equals_boolean_indexing(n, r, generator):
    scores = torch.randn(4, n, generator=generator)
    embeddings = torch.randn(4, n, 5, generator=generator)
    positions = torch.randint(0, 99, (3, 4, n), generator=generator)
    kept = top_r_compact(scores, r, embeddings, positions)
    chosen = scores >= scores.topk(r).values[:, -1:]
    assert torch.equal(kept.embeddings, embeddings[chosen].view(4, r, 5))
    assert torch.equal(kept.position_ids, positions[:, chosen].view(3, 4, r))
    assert kept.mask is None


def test_gradients_reach_the_kept_rows_only(generator):
    embeddings = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(2, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: top_r_compact(scores, 4, e).embeddings, embeddings)
    kept = top_r_compact(scores, 4, embeddings)
    kept.embeddings.sum().backward()
    assert torch.equal(embeddings.grad[..., 0].nonzero()[:, 1].view(2, 4), kept.index)
    assert scores.grad is None


def test_copies_nothing_to_the_host():
    # meta tensors hold no values: any .item(), nonzero() or boolean indexing would raise
    kept = top_r_compact(
        torch.empty(2, 9, device="meta"),
        4,
        torch.empty(2, 9, 3, device="meta"),
        torch.empty(3, 2, 9, device="meta", dtype=torch.long),
        torch.empty(2, 9, device="meta", dtype=torch.bool),
    )
    assert kept.embeddings.shape == (2, 4, 3) and kept.position_ids.shape == (3, 2, 4)


@pytest.mark.parametrize("r", [0, 10])
def test_r_out_of_range_is_refused(r):
    with pytest.raises(UserError, match="from 1 to 9"):
        top_r_compact(torch.zeros(1, 9), r, torch.zeros(1, 9, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_does_not_synchronise_a_gpu(backend, monkeypatch):
    monkeypatch.setenv("EVOCOMP_OPS", backend)
    scores, embeddings = torch.randn(8, 577, device="cuda"), torch.randn(8, 577, 64, device="cuda")
    mask = scores < 1
    top_r_compact(scores, 64, embeddings, None, mask)  # builds the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        top_r_compact(scores, 64, embeddings, None, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
