import numpy as np
import pytest
import torch

from evocomp.grouping.dpc_knn import dpc_knn_groups
from evocomp.log import UserError


def plain_loops(points, count, k):
    """The definition, token by token, in fp64."""
    n, d = points.shape
    distance = np.array([[np.sqrt(((a - b) ** 2).sum() / d) for b in points] for a in points])
    density = [np.exp(-np.mean([x**2 for x in sorted(np.delete(distance[i], i))[:k]])) for i in range(n)]
    product = []
    for i in range(n):
        denser = [distance[i, j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        product.append(density[i] * (min(denser) if denser else distance.max()))
    centres = sorted(sorted(range(n), key=lambda i: (-product[i], i))[:count])
    return [int(np.argmin([distance[i, c] for c in centres])) for i in range(n)]


@pytest.mark.parametrize(("n", "count", "k"), [(30, 4, 5), (17, 17, 3), (25, 1, 2), (12, 5, 40)])
def test_equals_the_definition(n, count, k, generator):
    tokens = torch.randn(n, 6, generator=generator)
    groups = dpc_knn_groups(tokens, count, k)
    expected = plain_loops(tokens.double().numpy(), count, k)
    seen = {}
    assert groups.of.tolist() == [seen.setdefault(c, len(seen)) for c in expected]
    assert groups.count == count


def test_finds_separated_clusters(generator):
    truth = torch.randint(0, 4, (60,), generator=generator)
    tokens = 8 * torch.eye(4, 10)[truth] + 0.1 * torch.randn(60, 10, generator=generator)
    of = dpc_knn_groups(tokens, 4).of
    assert len({(int(t), int(g)) for t, g in zip(truth, of, strict=True)}) == 4


def test_equal_tokens_and_few_tokens_still_give_the_wanted_number():
    assert dpc_knn_groups(torch.ones(6, 3), 4).count == 4
    assert dpc_knn_groups(torch.ones(1, 3), 4).count == 1
    assert dpc_knn_groups(torch.randn(3, 3), 8).count == 3
    with pytest.raises(UserError):
        dpc_knn_groups(torch.ones(6, 3), 0)
