"""Context tokens: cluster assignment against plain loops, and attention weights against copies of a token."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evocomp.config.schema import ScorerConfig
from evocomp.log import UserError
from evocomp.mllm.context import add_log_size, check_weighable, means, owners, shown, split
from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring.answer_losses import AnswerLosses
from tests.mllm.test_hf import tiny


def by_loops(visual: np.ndarray, kept: list[int], count: int) -> tuple[list[int], list[int]]:
    """Centres in order of selection, and the cluster assignment of each token; float64."""
    unit = visual / np.linalg.norm(visual, axis=1, keepdims=True)
    dropped = [i for i in range(len(visual)) if i not in kept]
    centres = [max(dropped, key=lambda i: unit[i] @ unit[dropped].sum(0))]
    while len(centres) < count:
        left = [i for i in dropped if i not in centres]
        centres.append(min(left, key=lambda i: max(unit[i] @ unit[c] for c in centres)))
    owner = list(range(len(visual)))
    for i in dropped:
        owner[i] = i if i in centres else max(centres, key=lambda c: unit[i] @ unit[c])
    return centres, owner


@given(st.integers(2, 14), st.data())
@settings(max_examples=60, deadline=None)
def test_every_dropped_token_goes_to_its_nearest_centre(size, data):
    kept_count = data.draw(st.integers(1, size - 1))
    assume(size - kept_count != 2)  # with two dropped tokens the first centre is a tie
    count = data.draw(st.integers(1, size - kept_count))
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    visual = rng.normal(size=(size, 5))
    kept = np.stack([np.sort(rng.permutation(size)[:kept_count]) for _ in range(3)])
    centres, owner = owners(torch.from_numpy(visual).float(), torch.from_numpy(kept), count)
    for row in range(3):
        expected, assignment = by_loops(visual, kept[row].tolist(), count)
        assert centres[row].tolist() == sorted(expected)
        assert owner[row].tolist() == assignment


@given(st.integers(3, 12), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_equal_tokens_have_distinct_centres(size, seed):
    """With equal tokens, there are still `count` distinct centres, and every token is assigned."""
    rng = np.random.default_rng(seed)
    visual = torch.from_numpy(rng.integers(1, 3, size=(size, 2))).float()
    kept = torch.from_numpy(rng.permutation(size)[:1])[None]
    count = int(rng.integers(1, size))
    centres, owner = owners(visual, kept, count)
    assert len(set(centres[0].tolist())) == count and int(kept) not in centres[0]
    assert torch.equal(owner[0, centres[0]], centres[0]) and int(owner[0, int(kept)]) == int(kept)
    assert set(owner[0].tolist()) == {*centres[0].tolist(), int(kept)}
    assert means(visual, centres, owner)[1].exp().sum().round() == size - 1


def test_a_context_token_is_the_mean_of_its_cluster():
    visual = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([3, 30, 17])
    one = shown(visual, kept, 5)
    centres, owner = owners(visual, kept.sort().values[None], 5)
    assert torch.equal(one.places, torch.cat([kept, centres[0]]).sort().values)
    for place, token, log_size in zip(*(part.tolist() for part in (one.places, one.tokens, one.log_size)), strict=True):
        members = (owner[0] == place).nonzero()[:, 0]
        assert token == pytest.approx(visual[members].double().mean(0).tolist(), abs=1e-6)
        assert log_size == pytest.approx(np.log(len(members)), abs=1e-6)
    assert torch.equal(one.alone, one.places[one.log_size == 0]) and set(kept.tolist()) <= set(one.alone.tolist())
    assert torch.equal(one.tokens[torch.isin(one.places, kept)], visual[kept.sort().values])


@pytest.mark.parametrize("context", [0, 4])
def test_without_dropped_tokens_nothing_changes(context):
    visual = torch.randn(9, 6)
    one = shown(visual, torch.randperm(9)[: 9 - context], context)
    assert torch.equal(one.tokens, visual) and torch.equal(one.places, torch.arange(9))
    assert one.log_size is None or not one.log_size.any()


@given(st.integers(0, 300), st.one_of(st.just(0.0), st.floats(0.01, 0.99), st.floats(1, 300)))
def test_small_budgets_are_selected_and_large_ones_never_exceed_the_limit(keep, sharp):
    selected, context = split(keep, 576, sharp)
    limit = (sharp if sharp >= 1 else 576 * sharp) or float("inf")
    assert selected + context == keep and 0 <= context and min(keep, 1) <= selected <= max(1, limit + 0.5)
    assert abs(selected - 1 / (1 / max(keep, 1e-9) + 1 / limit)) <= 1
    assert selected <= split(keep + 1, 576, sharp)[0]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_attention_weight_equals_copies_of_the_token(family, attention):
    """The next-token logits equal those of a sequence in which each context token is repeated as often as its cluster
    has members. The copies share a position and attend to each other, so they stay equal."""
    features, _, model = tiny(family)
    model.set_attn_implementation(attention)
    mllm = FrozenMLLM(model, processor=None)
    generator = torch.Generator().manual_seed(0)
    one = shown(features.visual, torch.randperm(len(features.visual), generator=generator)[:4], 3)
    _, given = _answer(mllm, features, one)
    times = torch.ones(len(features.prompt_ids), dtype=torch.long)
    times[features.visual_at] = 0
    times[features.visual_at[one.places]] = one.log_size.exp().round().long()
    assert times.max() > 2
    embeds, positions = mllm.assemble(features, one.tokens[None], one.places[None])
    copies = torch.arange(embeds.shape[1]).repeat_interleave(times[times > 0])
    seen = (copies[None, :] <= copies[:, None])[None, None]
    positions = positions[..., copies]
    if positions.ndim == 3:
        positions[0] = torch.arange(len(copies))
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    hidden = mllm.decoder(inputs_embeds=embeds[:, copies], position_ids=positions, attention_mask=added)
    expected = mllm.head(hidden.last_hidden_state[:, -1])
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    _, unweighed = _answer(mllm, features, one._replace(log_size=None))
    assert (unweighed - expected).abs().max() > 1e-3


def _answer(mllm, features, one):
    """`answer` with a stub tokenizer: only its logits are meaningful."""
    mllm.processor = type("Processor", (), {"tokenizer": _Tokenizer()})()
    return mllm.answer([(features, *one)], max_new_tokens=1)


class _Tokenizer:
    eos_token_id, pad_token_id = 1, 0

    def batch_decode(self, rows, skip_special_tokens):
        return ["" for _ in rows]


def test_sizes_are_added_to_masks_of_either_kind():
    seen = torch.tensor([[True, False, True], [False, False, False]])[None, None]
    log_size = torch.tensor([[0.5, 2.0]])
    lowest = torch.finfo(torch.float32).min
    expected = torch.tensor([[[[0.5, lowest, 0.0], [lowest] * 3]]])
    assert torch.equal(add_log_size(seen, log_size, torch.float32), expected)
    added = torch.zeros(seen.shape).masked_fill(~seen, lowest)
    assert torch.equal(add_log_size(added, log_size, torch.float32), expected)
    assert add_log_size(seen, log_size, torch.bfloat16).dtype == torch.bfloat16
    assert torch.softmax(expected, -1).isfinite().all()


def test_attention_without_additive_masks_is_refused(nano):
    check_weighable(nano.decoder.config)
    config = type(nano.decoder.config)(attn_implementation="flex_attention")
    with pytest.raises(UserError, match=r"attn_implementation='sdpa'"):
        check_weighable(config)


def test_sliding_windows_are_refused_with_context_tokens(monkeypatch):
    features, _, model = tiny("qwen2_5_vl")
    mllm = FrozenMLLM(model, processor=None)
    mllm.check_weighable()
    kept = torch.arange(4)[None, None]
    monkeypatch.setattr(model.get_decoder().config, "layer_types", ["full_attention", "sliding_attention"])
    with pytest.raises(UserError, match=r"set compressor\.sharp=0, or use evocomp\.compress"):
        AnswerLosses(mllm, settings=ScorerConfig(own_pass=False)).batch([features], kept, context=2)
    with pytest.raises(UserError, match="do not support context tokens with sliding_attention layers"):
        _answer(mllm, features, shown(features.visual, kept[0, 0], 2))
