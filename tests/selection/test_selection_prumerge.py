from dataclasses import replace

import numpy as np
import pytest
import torch

from evocomp.selection.base import NotApplicable
from evocomp.selection.prumerge import (
    PruMerge,
    PruMergePlus,
    class_attention,
    merge,
    outlier_ratio,
    plus_centres,
    plus_centres_exact,
)


def test_published_adaptive(cases, expected, arrays, inputs144):
    want = cases("prumerge")[0]
    attention = class_attention(arrays["clip_q"], arrays["clip_k"])
    assert outlier_ratio(attention) == want["reduction_ratio_used"]
    out = PruMerge(adaptive=True)(inputs144, 1)
    assert out.extra["centres"].tolist() == want["expected_centre_order(patch indices, in output order)"]
    assert torch.allclose(out.tokens, expected["prumerge/base_n144_adaptive"], atol=1e-4, rtol=0)


def test_published_fixed_budget(cases, expected, inputs144):
    want = cases("prumerge")[1]
    out = PruMerge()(inputs144, want["tokens_out(centres+1 extra)"])
    assert out.extra["centres"].tolist() == want["expected_centre_order(patch indices, in output order)"]
    assert torch.allclose(out.tokens, expected["prumerge/base_n144_fixed"], atol=1e-4, rtol=0)
    assert out.extra["layer"] == "used"


def merge_by_hand(x, keys, attention, centres):
    """Merging by loops over patches, with lists of centres and other patches as in the authors' code."""
    x, keys, attention = x.double(), keys.double(), attention.double()
    keys = keys / keys.norm(dim=1, keepdim=True)
    rest = [j for j in range(len(x)) if j not in centres]
    rest = rest[len(centres) - len(set(centres)) :]
    rows = []
    for place, i in enumerate(centres):
        pool = centres[:place] + centres[place + 1 :] + rest
        others = sorted(pool, key=lambda j: -float(keys[i] @ keys[j]))[:32]
        rows.append(x[i] + sum((attention[j] * x[j] for j in others), torch.zeros_like(x[0])))
    rows.append(sum((attention[j] * x[j] for j in rest), torch.zeros_like(x[0])))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "n,centres",
    [(50, [3, 40, 7]), (20, [0, 19]), (1, [0]), (5, []), (40, [4, 2, 4]), (36, [4, 2, 4, 0, 2])],
)
def test_merging_by_hand(n, centres, generator):
    x, keys = torch.randn(n, 6, generator=generator), torch.randn(n, 6, generator=generator)
    attention = torch.rand(n, generator=generator).softmax(0)
    got = merge(x, keys, attention, torch.tensor(centres, dtype=torch.long))
    assert torch.allclose(got.double(), merge_by_hand(x, keys, attention, centres), atol=1e-5)


def test_class_attention_is_one_head_over_all_keys(generator):
    queries, keys = torch.randn(9, 16, generator=generator), torch.randn(9, 16, generator=generator)
    full = (queries.double() @ keys.double().T / 4).softmax(1)
    assert torch.allclose(class_attention(queries, keys).double(), full[0, 1:], atol=1e-6)


def test_outliers_as_numpy_counts_them(generator):
    for n in (4, 33, 60):
        a = torch.randn(n, generator=generator).exp()
        low, high = np.percentile(a.double().numpy(), [25, 75])
        assert outlier_ratio(a) == (a.double().numpy() > high + 1.5 * (high - low)).sum() / n


def test_plus_adds_a_grid_a_third_as_wide_as_outliers_are_rare(generator):
    attention = torch.rand(61, generator=generator)
    attention[[5, 15, 50]] += 10
    centres = plus_centres(attention, 3 / 61).tolist()  # step 20, stride 6, up to 59: 60 is left out
    assert set(centres[:3]) == {5, 15, 50}
    assert centres[3:] == [0, 6, 12, 18, 24, 30, 36, 42, 48, 54]
    attention[12] += 20
    assert plus_centres(attention, 3 / 61).tolist()[3:] == [0, 6, 18, 24, 30, 36, 42, 48, 54]
    assert plus_centres(attention, 3 / 61, adaptive=False).tolist()[3:] == [10, 30, 50]


def test_plus_in_cases_where_the_original_fails():
    attention = torch.linspace(0, 1, 9)
    assert plus_centres(attention, 0.5).tolist() == [8, 7, 6, 5, 0, 1, 2, 3, 4]
    assert plus_centres(attention, 0.0).tolist() == [0, 3, 6]


def test_plus_with_a_budget_is_a_quarter_attention_and_the_rest_spread(generator):
    attention = torch.zeros(16)
    attention[[2, 9]] = 1
    # 6 of the 14 remaining patches: indices 1, 3, 5, 8, 10, 12 among them
    assert plus_centres_exact(attention, 8).tolist() == [2, 9, 1, 4, 6, 10, 12, 14]
    assert plus_centres_exact(torch.arange(16.0), 9)[:4].tolist() == [15, 14, 13, 1]  # a quarter, rounded up
    for count in range(1, 17):
        assert len(plus_centres_exact(attention, count).unique()) == count


@pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
def test_the_following_layers_projections_are_preferred(method, drawn):
    inputs, other = drawn(0, 40), drawn(1, 40)
    both = replace(inputs, clip_next_keys=other.clip_keys, clip_next_queries=other.clip_queries)
    swapped = replace(inputs, clip_keys=other.clip_keys, clip_queries=other.clip_queries)
    got = method()(both, 11)
    assert got.extra["layer"] == "next"
    assert torch.equal(got.tokens, method()(swapped, 11).tokens)
    assert not torch.equal(got.tokens, method()(inputs, 11).tokens)
    assert torch.equal(method()(replace(both, clip_keys=None, clip_queries=None), 11).tokens, got.tokens)
    with pytest.raises(NotApplicable, match="clip_queries"):
        method()(replace(inputs, clip_queries=None), 11)


def test_plus_adaptive_ignores_the_budget(inputs144):
    out = PruMergePlus(adaptive=True)(inputs144, 5)
    # 13 outliers of 144: step 11, stride 3, grid 0..141 of 48, without the outliers on it
    outliers = PruMerge(adaptive=True)(inputs144, 5).extra["centres"].tolist()
    grid = [i for i in range(0, 143, 3) if i not in outliers]
    assert out.extra["centres"].tolist() == outliers + grid
    assert len(out.tokens) == len(out.positions) == len(outliers) + len(grid) + 1


def test_a_repeated_centre_is_its_own_neighbour(generator):
    """As in the authors' code with if_adaptive=False, where the grid may contain a centre by attention."""
    x, keys = torch.eye(4), torch.randn(4, 6, generator=generator)
    attention = torch.tensor([0.1, 0.2, 0.3, 0.4])
    rows = merge(x, keys, attention, torch.tensor([3, 3]))
    assert torch.allclose(rows[0], torch.tensor([0.0, 0.2, 0.3, 1.4])) and torch.equal(rows[0], rows[1])
    assert torch.allclose(rows[2], torch.tensor([0.0, 0.2, 0.3, 0.0]))  # the first of the other patches is lost
