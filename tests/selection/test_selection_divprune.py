import pytest
import torch

from evocomp.selection.divprune import DivPrune, divprune


@pytest.mark.parametrize("case", [0, 1])
def test_published(case, cases, arrays, inputs144):
    want = cases("divprune")[case]
    assert divprune(arrays["tokens"], want["r"]).tolist() == want["expected_selection_order"]
    assert DivPrune()(inputs144, want["r"]).indices.tolist() == want["expected_kept_sorted"]


def greedy_max_min(tokens: torch.Tensor, r: int) -> list[int]:
    """The greedy rule in fp64, which recomputes the distances to the selected set in every step."""
    x = tokens.double()
    n = len(x)
    distance = [[1 - float(x[i] @ x[j] / (x[i].norm() * x[j].norm())) for j in range(n)] for i in range(n)]
    apart = [min((distance[i][j] for j in range(n) if j != i), default=0.0) for i in range(n)]
    picked = [max(range(n), key=lambda i: apart[i])]
    while len(picked) < r:
        free = [i for i in range(n) if i not in picked]
        picked.append(max(free, key=lambda i: min(distance[i][j] for j in picked)))
    return picked


@pytest.mark.parametrize("n,r", [(1, 1), (2, 2), (9, 4), (17, 17)])
def test_greedy_rule(n, r, generator):
    tokens = torch.randn(n, 8, generator=generator)
    assert divprune(tokens, r).tolist() == greedy_max_min(tokens, r)


def test_duplicates_are_not_picked_twice(generator):
    tokens = torch.randn(3, 4, generator=generator).repeat(4, 1)
    order = divprune(tokens, 12).tolist()
    assert sorted(order) == list(range(12))
    assert {i % 3 for i in order[:3]} == {0, 1, 2}


def test_scale_of_a_token_does_not_matter(generator):
    tokens = torch.randn(20, 6, generator=generator)
    scale = 2.0 ** torch.randint(-3, 4, (20, 1), generator=generator)
    assert torch.equal(divprune(tokens, 9), divprune(tokens * scale, 9))
