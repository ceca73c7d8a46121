"""Priority orders and the tokens that they add to a selection."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evocomp.log import UserError
from evocomp.selection.divprune import divprune
from evocomp.selection.priority import fill, priority_order


@given(st.integers(1, 40), st.integers(0, 1000))
def test_every_order_holds_each_token_once(total, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(total, 5, generator=generator)
    attention = torch.rand(3, total, generator=generator)
    for name in ("cls_attention", "divprune", "uniform_stride"):
        assert sorted(priority_order(name, tokens, attention).tolist()) == list(range(total))


def test_orders_begin_with_what_their_selectors_keep():
    tokens, attention = torch.randn(30, 4), torch.rand(2, 30)
    assert priority_order("divprune", tokens)[:7].tolist() == divprune(tokens, 7).tolist()
    best = attention.mean(0).topk(7).indices
    assert priority_order("cls_attention", tokens, attention)[:7].tolist() == best.tolist()


@pytest.mark.parametrize("prefix", [4, 8, 16, 48])
def test_any_prefix_of_the_even_order_leaves_no_wide_gap(prefix):
    taken = priority_order("uniform_stride", torch.zeros(144, 2))[:prefix].sort().values
    gaps = torch.diff(torch.cat([torch.tensor([-1]), taken, torch.tensor([144])]))
    assert gaps.max() <= 3 * 144 / prefix


@given(st.integers(2, 30), st.data())
def test_fill_takes_the_best_of_the_rest(total, data):
    order = data.draw(st.permutations(range(total)))
    selected = data.draw(st.sets(st.integers(0, total - 1), max_size=total - 1))
    count = data.draw(st.integers(0, total - len(selected)))
    got = fill(torch.tensor(sorted(selected), dtype=torch.long), torch.tensor(order), count)
    assert got.tolist() == [token for token in order if token not in selected][:count]


def test_a_tower_without_class_token_and_an_unknown_order_are_named():
    with pytest.raises(UserError, match="class token; use divprune"):
        priority_order("cls_attention", torch.zeros(4, 2))
    with pytest.raises(UserError, match="hedge_by='cls' is unknown"):
        priority_order("cls", torch.zeros(4, 2))
