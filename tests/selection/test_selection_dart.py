import pytest
import torch

from evocomp.selection.dart import DART, dart, dart_pivots, exact_takes, published_takes


@pytest.mark.parametrize("case", [0, 1])
def test_published(case, cases, arrays, inputs144):
    want = cases("dart")[case]
    pivots = dart_pivots(arrays["llm_keys"], 5, 144)
    assert pivots == want["pivot_order_used(absolute positions; CPython set order, affects the result)"]
    kept = dart(arrays["llm_hidden"], 5, 144, pivots, [want["topk_per_pivot"]] * 8)
    truth = want["expected_kept_sorted(image-relative)"]
    assert kept.tolist() == truth
    # for 44 and 52, which are 4 + 8 t, the exact and the published variant agree
    assert DART()(inputs144, want["kept_count"]).indices.tolist() == truth
    asked = want["max_num_trunction"] or int(144 * (1 - want["reduction_ratio"]))
    assert DART(exact=False)(inputs144, asked).indices.tolist() == truth


@pytest.mark.parametrize("asked,kept", [(192, 196), (128, 132), (64, 68)])
def test_published_counts(asked, kept):
    assert 4 + sum(published_takes(asked, 576, 8)) == kept


def test_exact_counts_give_the_remainder_to_the_first_pivots():
    assert exact_takes(19, 8) == [3, 3, 3, 2, 2, 2, 2, 2]


def test_pivots_select_the_least_similar_tokens_in_turn():
    # indices: prefix 0, visual 1-6, text 7-8
    hidden = torch.tensor(
        [[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.1], [-1.0, -0.1], [0.1, -1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]
    )
    kept = dart(hidden, 1, 6, [1, 7], [1, 2])
    # for the pivot at index 1 (visual 0), visual 2 and 3 tie at the lowest cosine and the lower index is selected; then
    # text pivot 7 selects visual 4 (cosine near -1) and visual 3 (near -0.1)
    assert kept.tolist() == [0, 2, 3, 4]


def test_few_text_tokens_and_small_budgets(drawn):
    for n, text, keep in [(30, 2, 15), (30, 0, 9), (3, 1, 3), (20, 5, 2), (12, 6, 12)]:
        kept = DART()(drawn(n, n, text=text), keep).indices
        assert len(kept.unique()) == keep
    loudest = drawn(20, 20).llm_keys[4:24].abs().sum(1).topk(2).indices.sort().values
    assert torch.equal(DART()(drawn(20, 20), 2).indices, loudest)
    assert len(DART(exact=False)(drawn(10, 10), 10).indices) == 4
