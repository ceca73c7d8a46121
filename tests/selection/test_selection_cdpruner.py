import pytest
import torch

from evocomp.selection.cdpruner import CDPruner, cdpruner, relevance


@pytest.mark.parametrize("case", [0, 1])
def test_published(case, cases, inputs144):
    want = cases("cdpruner")[case]
    assert CDPruner()(inputs144, want["r"]).indices.tolist() == want["expected_kept_sorted"]


def greedy_determinant(tokens: torch.Tensor, quality: torch.Tensor, r: int) -> list[int]:
    """Greedy selection by the determinant of the kernel on the selected set, in fp64."""
    x = torch.nn.functional.normalize(tokens.double(), dim=1)
    kernel = quality.double()[:, None] * (x @ x.T) * quality.double()
    picked = []
    for _ in range(r):
        free = [i for i in range(len(x)) if i not in picked]
        picked.append(max(free, key=lambda i: float(torch.det(kernel[[*picked, i]][:, [*picked, i]]))))
    return picked


@pytest.mark.parametrize("n,r", [(1, 1), (7, 7), (15, 6)])
def test_greedy_map(n, r, generator):
    tokens = torch.randn(n, 9, generator=generator)
    quality = torch.rand(n, generator=generator) + 0.1
    assert cdpruner(tokens, quality, r).tolist() == greedy_determinant(tokens, quality, r)


def test_relevance_is_negated_and_scaled_to_the_range_of_the_sample():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
    text = torch.tensor([[2.0, 0.0]])
    score = relevance(image, text)  # cosines 1, 0, 0.707; low cosine counts as relevant
    assert torch.allclose(score, torch.tensor([1e-6, 1 + 1e-6, 1 - 0.5**0.5 + 1e-6]), atol=1e-6)
    assert score.min() > 5e-7  # the least relevant patch still has a positive kernel entry
    assert torch.allclose(relevance(image, text, sign=1.0)[0], torch.tensor(1.0), atol=1e-5)
    assert torch.equal(relevance(image[:1], text), torch.ones(1))


def test_beyond_the_rank_the_budget_is_filled_by_quality(generator):
    tokens = torch.randn(40, 5, generator=generator)
    quality = torch.rand(40, generator=generator) + 0.1
    order = cdpruner(tokens, quality, 40)
    assert order[:5].tolist() == greedy_determinant(tokens, quality, 5)
    assert sorted(order.tolist()) == list(range(40))
    assert (quality[order[5:]].diff() <= 0).all()


def test_zero_tokens_still_fill_the_budget():
    assert cdpruner(torch.zeros(4, 3), torch.ones(4), 3).tolist() == [0, 1, 2]
