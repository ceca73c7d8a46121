"""Losses of masks against transformers' own decoder, in which dropped tokens are masked instead of removed."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from evocomp.config.schema import ScorerConfig
from evocomp.log import UserError
from evocomp.mllm.context import Shown, shown
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring import llama_decoder as llama_body
from evocomp.scoring.answer_losses import AnswerLosses
from evocomp.scoring.llama_decoder import LlamaBody
from evocomp.scoring.sequences import prompt_index, prompt_table
from evocomp.scoring.transformers_decoder import TransformersBody
from tests.mllm.test_hf import SCORABLE, tiny

SWITCHES = [field.name for field in fields(ScorerConfig)]
OFF = {name: "never" if "prefix" in name else False for name in SWITCHES}
SETTINGS = {
    "all": ScorerConfig(),
    "prefix": ScorerConfig(shared_prefix="always"),
    "prefix, transformers": ScorerConfig(shared_prefix="always", own_pass=False),
    "none": ScorerConfig(**OFF),
    **{f"without {name}": ScorerConfig(**{name: OFF[name]}) for name in SWITCHES},
    **{
        f"own pass and {name}": ScorerConfig(**{**OFF, "own_pass": True, name: "always" if "prefix" in name else True})
        for name in ("shared_prefix", "last_layer_at_answers", "first_layer_once", "onednn")
    },
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def masked_losses(mllm: FrozenMLLM, features: Features, kept: torch.Tensor) -> torch.Tensor:
    """Losses [Q], one mask at a time, from full prompts in which the attention mask hides the dropped tokens."""
    ids, answer = features.prompt_ids, features.answer_ids
    embeds = mllm.embed(ids.index_fill(0, features.visual_at, 0)).detach()
    embeds[features.visual_at] = features.visual
    if features.separators is not None:
        embeds[features.separators_at] = features.separators
    embeds = torch.cat([embeds, mllm.embed(answer)])
    last, steps = features.positions[..., -1:], torch.arange(1, len(answer) + 1)
    positions = torch.cat([features.positions, last + steps], dim=-1)
    if positions.ndim == 2:
        positions[0] = torch.arange(len(embeds))
    losses = []
    for row in kept:
        seen = torch.ones(len(embeds), dtype=torch.long)
        seen[features.visual_at] = 0
        seen[features.visual_at[row]] = 1
        with torch.no_grad():
            hidden = mllm.decoder(
                inputs_embeds=embeds[None], attention_mask=seen[None], position_ids=positions[..., None, :]
            ).last_hidden_state[0]
            logits = mllm.head(hidden)
        losses.append(F.cross_entropy(logits[len(ids) - 1 : -1].float(), answer))
    return torch.stack(losses)


def masks(features: Features, count: int, size: int, seed: int = 0) -> torch.Tensor:
    order = torch.rand(count, len(features.visual), generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :size].sort(1).values


def with_answer(features: Features, *ids: int) -> Features:
    return replace(features, answer_ids=torch.tensor(ids))


def later_picture(features: Features, words: int = 11) -> Features:
    """The same prompt after additional text, such as a system prompt."""
    text = torch.arange(20, 20 + words)
    return replace(
        features,
        prompt_ids=torch.cat([features.prompt_ids[:1], text, features.prompt_ids[1:]]),
        visual_at=features.visual_at + words,
        separators_at=None if features.separators_at is None else features.separators_at + words,
        positions=torch.arange(len(features.prompt_ids) + words),
    )


@every_setting
@pytest.mark.parametrize("words", [0, 11])
def test_optimizations_do_not_change_losses_of_candidates(nano, encoded, settings, words):
    losses = AnswerLosses(nano, settings=settings)
    for features in encoded[:3]:
        asked = later_picture(with_answer(features, 9, 14, 22), words)
        for size in (1, 16):
            kept = masks(asked, 5, size)
            expected = masked_losses(nano, asked, kept)
            for flips in (False, True):
                given = losses.candidates(asked, kept, flips)
                torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@every_setting
def test_optimizations_do_not_change_losses_of_batches(nano, encoded, settings):
    answers = ((9,), (14, 22, 30), (22, 9))
    some = [with_answer(f, *a) for f, a in zip((encoded[0], encoded[25], encoded[45]), answers, strict=True)]
    kept = torch.stack([masks(one, 4, 16, seed) for seed, one in enumerate(some)])
    expected = torch.stack([masked_losses(nano, one, own) for one, own in zip(some, kept, strict=True)])
    given = AnswerLosses(nano, settings=settings).batch(some, kept)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@every_setting
@pytest.mark.parametrize("words", [0, 11])
def test_optimizations_do_not_change_losses_of_shared_scoring(nano, encoded, settings, words):
    one_picture = [f for f in encoded if f.image_id == encoded[0].image_id][:4]
    asked = [later_picture(with_answer(f, *range(9, 10 + i)), words) for i, f in enumerate(one_picture)]
    kept = masks(asked[0], 5, 16)
    expected = torch.stack([masked_losses(nano, one, kept) for one in asked], dim=1)
    given = AnswerLosses(nano, settings=settings).shared(asked, kept)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own_pass", [True, False])
@pytest.mark.parametrize("prefix", ["never", "always"])
@pytest.mark.parametrize("family", [f for f in SCORABLE if not f.startswith("paligemma")])
def test_families(family, own_pass, prefix):
    features, _, model = tiny(family)
    features = with_answer(features, 40, 60, 80)
    mllm = FrozenMLLM(model, processor=None)
    losses = AnswerLosses(mllm, settings=ScorerConfig(own_pass=own_pass, shared_prefix=prefix))
    expected_body = LlamaBody if own_pass else TransformersBody
    assert type(losses.body) is expected_body
    kept = masks(features, 4, 5)
    expected = masked_losses(mllm, features, kept)
    for flips in (False, True):
        torch.testing.assert_close(losses.candidates(features, kept, flips), expected, atol=1e-4, rtol=1e-4)
    together = losses.shared([features, with_answer(features, 60, 40)], kept)
    torch.testing.assert_close(together[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_candidates_with_a_cached_prefix_give_the_same_losses(nano, encoded):
    """Masks as in local search: each differs from one mask in a single token, early or late; and that mask itself."""
    features = with_answer(encoded[0], 9, 14)
    base = masks(features, 1, 24)[0]
    others = torch.tensor([i for i in range(144) if i not in base.tolist()])
    kept = torch.stack(
        [base]
        + [
            torch.cat([base[:i], base[i + 1 :], others[7 * i][None]]).sort().values
            for i in range(len(others) // 7)[:24]
        ]
    )
    for settings in (ScorerConfig(), ScorerConfig(own_pass=False)):
        losses = AnswerLosses(nano, settings=settings)
        expected = masked_losses(nano, features, kept)
        torch.testing.assert_close(losses.candidates(features, kept, flips=True), expected, atol=1e-5, rtol=1e-5)
        table, index = prompt_table(features, nano.embed), prompt_index(features, kept)
        shared = [past[0][0].shape[2] if past else 0 for _, past in losses._buckets(table, index, 2)]
        assert shared == sorted(shared) and shared[-1] > 10, "later flips share more"


def test_bfloat16_losses_are_close(nano, encoded):
    kept = masks(encoded[0], 8, 16)
    near = AnswerLosses(nano, torch.bfloat16).candidates(encoded[0], kept)
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, masked_losses(nano, encoded[0], kept), atol=0.2, rtol=0.1)


def test_llama_body_is_not_used_if_it_disagrees_with_the_model(nano, encoded, monkeypatch):
    assert type(AnswerLosses(nano).body) is LlamaBody
    right = LlamaBody._after
    monkeypatch.setattr(LlamaBody, "_after", lambda *a: right(*a) * 1.001)
    assert not llama_body.agrees(LlamaBody(nano.decoder, torch.float32, ScorerConfig()), nano.decoder)
    assert type(AnswerLosses(nano).body) is TransformersBody


@pytest.mark.parametrize("family", [f for f in SCORABLE if f.startswith("qwen")])
def test_llama_body_needs_every_axis_of_the_positions(family, monkeypatch):
    _, _, model = tiny(family)
    decoder = FrozenMLLM(model, processor=None).decoder
    ours = LlamaBody(decoder, torch.float32, ScorerConfig())
    assert llama_body.agrees(ours, decoder)
    right = ours.rotary
    for axis in range(3):
        ours.rotary = lambda x, positions, axis=axis: right(x, positions[axis].expand(3, -1, -1))
        assert not llama_body.agrees(ours, decoder)


def test_llama_body_supports_known_layers_only(nano, monkeypatch):
    assert llama_body.fits(nano.decoder)
    layer = nano.decoder.layers[1].mlp
    monkeypatch.setitem(layer._modules, "up_proj", torch.nn.Sequential(layer.up_proj))
    assert not llama_body.fits(nano.decoder)


def test_images_with_the_same_system_prompt_share_its_cached_prefix(nano, encoded):
    losses = AnswerLosses(nano)
    first, second = (later_picture(features) for features in (encoded[0], encoded[30]))
    made = []
    prefix = losses.body.prefix
    losses.body.prefix = lambda *a: made.append(1) or prefix(*a)
    for asked in (first, second, first):
        kept = masks(asked, 3, 8)
        torch.testing.assert_close(
            losses.candidates(asked, kept), masked_losses(nano, asked, kept), atol=1e-5, rtol=1e-5
        )
    assert len(made) == 1
    losses.candidates(encoded[0], masks(encoded[0], 3, 8))
    assert len(made) == 1, "one token before the picture is not worth a cache"


def test_shared_scoring_needs_one_image(nano, encoded):
    others = next(f for f in encoded if f.image_id != encoded[0].image_id)
    with pytest.raises(UserError, match="prompts differ before the end of the image"):
        AnswerLosses(nano).shared([encoded[0], others], masks(encoded[0], 2, 4))


@pytest.mark.parametrize("own_pass", [True, False])
@pytest.mark.parametrize("prefix", ["never", "always"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_masks_with_context_tokens(family, own_pass, prefix):
    """Losses equal those of `FrozenMLLM` for the same tokens and cluster sizes, one mask at a time."""
    features, _, model = tiny(family)
    mllm = FrozenMLLM(model, processor=None)
    losses = AnswerLosses(mllm, settings=ScorerConfig(own_pass=own_pass, shared_prefix=prefix))
    assert type(losses.body) is (LlamaBody if own_pass else TransformersBody)
    samples = [with_answer(features, 40), with_answer(features, 60, 80)]
    kept = torch.stack([masks(features, 4, 5, seed) for seed in (0, 1)])
    given = losses.batch(samples, kept, context=3)
    for one, own, found in zip(samples, kept, given, strict=True):
        expected = [_loss_of(mllm, one, shown(one.visual, mask, 3)) for mask in own]
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert (given - losses.batch(samples, kept)).abs().max() > 1e-3


def _loss_of(mllm: FrozenMLLM, features: Features, one: Shown) -> torch.Tensor:
    """Mean answer loss of tokens with cluster sizes, from the decoder with an attention mask built by hand."""
    embeds, positions = mllm.assemble(features, one.tokens[None], one.places[None])
    tail = mllm.embed(features.answer_ids)[None]
    steps = torch.arange(1, tail.shape[1] + 1)
    positions = torch.cat([positions, positions[..., -1:] + steps], dim=-1)
    if positions.ndim == 3:
        positions[0] = torch.arange(positions.shape[-1])
    at = torch.cat([features.fixed_at, features.visual_at[one.places]])
    sizes = torch.cat([torch.zeros(len(features.fixed_at)), one.log_size])[at.argsort()]
    length = embeds.shape[1] + tail.shape[1]
    added = torch.zeros(length, length)
    added[:, : len(sizes)] = sizes
    added = added.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    with torch.no_grad():
        hidden = mllm.decoder(
            inputs_embeds=torch.cat([embeds, tail], dim=1), position_ids=positions, attention_mask=added[None, None]
        ).last_hidden_state[0]
        logits = mllm.head(hidden)[-1 - tail.shape[1] : -1]
    return F.cross_entropy(logits, features.answer_ids)
