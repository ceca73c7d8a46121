"""Masks of the shortened sequence, against masks of the full one with rows and columns removed in loops."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.inference.choose import short_index, take
from evocomp.inference.masks import gathered_mask, is_plain, padding_mask

rows = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3).filter(
    lambda batch: any(map(any, batch))
)


@given(rows)
@settings(deadline=None)
def test_short_index_is_the_left_padded_list_of_kept_tokens(batch):
    index, valid = short_index(torch.tensor(batch))
    length = max(map(sum, batch))
    for row, stays in enumerate(batch):
        kept = [place for place, stay in enumerate(stays) if stay]
        assert valid[row].tolist() == [False] * (length - len(kept)) + [True] * len(kept)
        assert index[row][valid[row]].tolist() == kept


@given(rows, st.sampled_from([None, 1, 2, 4]), st.booleans(), st.booleans(), st.integers(0, 3), st.randoms())
@settings(max_examples=60, deadline=None)
def test_gathered_mask_is_the_full_mask_without_dropped_rows_and_columns(
    batch, window, spares, floating, extra, random
):
    stays = torch.tensor(batch)
    blocks = torch.tensor([[random.choice([-1, 0, 1]) for _ in range(6)] for _ in batch])
    whole = torch.ones(len(batch), 1, 6, 6).tril().bool()
    whole |= ((blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, :, None])[:, None]
    given_mask = torch.where(whole, 0.0, torch.finfo(torch.float32).min) if floating else whole
    index, valid = short_index(stays)
    length = index.shape[1]
    mask = gathered_mask(given_mask, index, valid, window, spares, length + extra)
    mask = mask == 0 if floating else mask
    assert mask.shape == (len(batch), 1, length, length + extra)
    assert not mask[..., length:].any()
    assert mask.any(-1).all()  # no row without a key, or attention would be NaN
    for row in range(len(batch)):
        for q in range(length):
            for k in range(length):
                if not valid[row, q]:
                    continue
                a, b = int(index[row, q]), int(index[row, k])
                same_block = bool(blocks[row, a] == blocks[row, b]) and blocks[row, a] >= 0
                near = window is None or q - k < window or (spares and same_block)
                expected = bool(valid[row, k]) and bool(whole[row, 0, a, b]) and near
                assert bool(mask[row, 0, q, k]) == expected


def test_take_gathers_along_the_sequence_for_any_leading_dimensions():
    x = torch.arange(3 * 2 * 5 * 4).view(3, 2, 5, 4)
    index = torch.tensor([[0, 3], [2, 4]])
    expected = torch.stack([torch.stack([x[r, b][index[b]] for b in range(2)]) for r in range(3)])
    assert torch.equal(take(x, index), expected)
    assert torch.equal(take(x[0], index), expected[0])
    assert torch.equal(take(x[0, :1], index), torch.stack([x[0, 0][index[b]] for b in range(2)])[None][0])


def test_a_word_hidden_from_the_last_token_is_not_padding():
    mask = torch.ones(1, 2, 5, 5).tril().bool() & torch.tensor([False, True, True, True, True])
    mask[:, :, -1, 1:3] = False
    assert padding_mask(mask | torch.eye(5).bool(), 5).tolist() == [[False, True, True, True, True]]


@pytest.mark.parametrize("window", [None, 2])
def test_plain_masks_are_distinguished_from_a_callers_own(window):
    config = SimpleNamespace(num_hidden_layers=2, sliding_window=window)
    real = torch.tensor([[False, True, True, True], [True, True, True, False]])
    back = torch.arange(4)[:, None] - torch.arange(4)
    plain = ((back >= 0) & (back < (window or 4)) & real[:, None])[:, None]
    floating = torch.where(plain, 0.0, torch.finfo(torch.float32).min)
    for mask in (plain, plain | torch.eye(4).bool(), torch.nn.functional.pad(plain, (0, 3)), floating):
        assert is_plain(mask, real, config)
    for row, query, key in ((0, 2, 1), (0, 1, 2), (1, 1, 3)):
        other = plain.clone()
        other[row, 0, query, key] ^= True
        assert not is_plain(other, real, config)
    unlike = SimpleNamespace(num_hidden_layers=2, sliding_window=2, layer_types=["full_attention", "sliding_attention"])
    assert not is_plain(plain, real, unlike)


@pytest.mark.parametrize("as_dict", [False, True])
def test_padding_is_derived_from_prepared_masks(as_dict):
    real = torch.tensor([[False, False, True, True], [True, True, True, True]])
    causal = torch.ones(4, 4).tril().bool()
    prepared = torch.nn.functional.pad((causal & real[:, None])[:, None], (0, 3))  # a static cache has more columns
    floating = torch.where(prepared, 0.0, torch.finfo(torch.float32).min)
    for mask in (prepared, floating):
        given_mask = {"sliding_attention": None, "full_attention": mask} if as_dict else mask
        assert torch.equal(padding_mask(given_mask, 4), real)
    assert padding_mask({"full_attention": None} if as_dict else None, 4) is None
    assert torch.equal(padding_mask(real.long(), 4), real)
