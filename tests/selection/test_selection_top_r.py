import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.selection.top_r import descending, top_r


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.lists(st.integers(-2, 2), min_size=7, max_size=7), min_size=1, max_size=4),
    r=st.integers(0, 7),
)
def test_agrees_with_sorting_in_python_where_most_scores_tie(scores, r):
    want = [sorted(sorted(range(7), key=lambda i, row=row: (-row[i], i))[:r]) for row in scores]
    assert top_r(torch.tensor(scores, dtype=torch.float32), r).tolist() == want


def test_long_rows_of_equal_scores_keep_the_lowest_indices():
    scores = torch.zeros(3, 5000)
    scores[1, 4999] = 1
    assert torch.equal(top_r(scores, 100)[0], torch.arange(100))
    assert torch.equal(top_r(scores, 100)[1], torch.tensor([*range(99), 4999]))
    assert torch.equal(descending(-scores)[1], torch.tensor([*range(5000)]))


def test_rows_of_a_batch_do_not_see_each_other(generator):
    scores = torch.randn(2, 3, 20, generator=generator)
    scores[1] *= 1000
    alone = torch.stack([torch.stack([top_r(row, 6) for row in rows]) for rows in scores])
    assert torch.equal(top_r(scores, 6), alone)
    assert top_r(scores, 6).dtype == torch.int64
