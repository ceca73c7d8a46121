"""Every way of scoring, for many kinds of text decoders, against one plain transformers forward pass per mask."""

import sys

import pytest
import torch
import torch.nn.functional as F
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evocomp.config.schema import ScorerConfig
from evocomp.log import UserError
from evocomp.mllm import attention
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring.answer_losses import AnswerLosses
from evocomp.scoring.gate import gate_gradient
from evocomp.scoring.sequences import Packing
from evocomp.scoring.transformers_decoder import TransformersBody
from tests.mllm.text_decoders import DECODERS, EAGER, REFUSED, TOKENS, build, samples

SETTINGS = {
    "auto": ScorerConfig(),
    "prefix": ScorerConfig(shared_prefix="always", prefix_reuse="always"),
    "transformers": ScorerConfig(own_pass=False, shared_prefix="always", prefix_reuse="always"),
}
NO_GATES = {
    "llama, a window that it ignores": "needs a decoder that follows an explicit attention mask",
    "lfm2": "layers of type conv do not accept an attention mask",
    "qwen3_next": "layers of type linear_attention do not accept an attention mask",
}
"""Decoders that are refused for gate gradients, and a part of the error message."""
APART = ("llama, a window that it ignores", "lfm2", "qwen3_next", "llama4, scaled queries")
"""Decoders whose questions are scored one after another, not packed."""
CASES = [(name, None) for name in DECODERS] + [(name, "eager") for name in EAGER]
every_decoder = pytest.mark.parametrize(
    ("name", "kernel"), CASES, ids=[f"{name}{', ' + kernel if kernel else ''}" for name, kernel in CASES]
)


def masks() -> torch.Tensor:
    """Masks [4, 5], ascending: the first one, and others that differ from it in one or more tokens."""
    first = torch.tensor([0, 2, 3, 5, 8])
    return torch.stack(
        [first, torch.tensor([0, 2, 3, 6, 8]), torch.tensor([0, 2, 4, 5, 8]), TOKENS - 5 + torch.arange(5)]
    )


def prompt(mllm: FrozenMLLM, features: Features, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask's LLM input, built by hand: embeddings [1, L, D] and positions [1, L] or [4, 1, L]."""
    start, end = int(features.visual_at[0]), features.picture_end
    ids = torch.cat([features.prompt_ids, features.answer_ids[:-1]])
    text = mllm.embed(ids)
    at = torch.cat([torch.arange(start), start + kept, torch.arange(end, len(ids))])
    rows = torch.cat([text[:start], features.visual[kept], text[end:]])
    if features.positions.ndim == 1:
        return rows[None].detach(), at[None]
    steps = 1 + torch.arange(len(features.answer_ids) - 1)
    positions = torch.cat([features.positions, features.positions[:, -1:] + steps], dim=1)[:, at]
    positions[0] = torch.arange(len(at))  # M-RoPE: transformers' mask depends on the text row, which must have no gaps
    return rows[None].detach(), positions[:, None]


def ones(embeds: torch.Tensor) -> torch.Tensor:
    """The attention mask of sequences without padding."""
    return torch.ones(embeds.shape[:2], dtype=torch.long)


def plain_loss(mllm: FrozenMLLM, features: Features, kept: torch.Tensor) -> torch.Tensor:
    """A forward pass of transformers' decoder with its own masks."""
    embeds, positions = prompt(mllm, features, kept)
    with torch.no_grad():
        hidden = mllm.decoder(
            inputs_embeds=embeds, position_ids=positions, attention_mask=ones(embeds), use_cache=False
        ).last_hidden_state[0]
        logits = mllm.head(hidden)[-len(features.answer_ids) :]
    return F.cross_entropy(logits, features.answer_ids)


def plain_losses(mllm: FrozenMLLM, features: Features, kept: torch.Tensor) -> torch.Tensor:
    return torch.stack([plain_loss(mllm, features, row) for row in kept])


def close(given: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@every_decoder
def test_every_path_gives_the_losses_of_plain_forwards(name, kernel):
    mllm, kept = build(name, kernel), masks()
    asked = samples(mllm)
    if name in REFUSED:
        for call in (
            lambda losses: losses.candidates(asked[0], kept),
            lambda losses: losses.candidates(asked[0], kept, flips=True),
            lambda losses: losses.batch(asked, kept.expand(3, -1, -1)),
            lambda losses: losses.shared(asked, kept),
        ):
            with pytest.raises(UserError, match=REFUSED[name]):
                call(AnswerLosses(mllm))
        return
    expected = torch.stack([plain_losses(mllm, one, kept) for one in asked])
    spread = expected.std(dim=1).max()
    assert spread > 1e-3, "the masks must differ in their losses for the comparison to mean something"
    for settings in SETTINGS.values():
        losses = AnswerLosses(mllm, settings=settings)
        close(losses.candidates(asked[0], kept), expected[0])
        close(losses.candidates(asked[0], kept, flips=True), expected[0])
        close(losses.batch(asked, kept.expand(3, -1, -1)), expected)
        close(losses.shared(asked, kept), expected.T)
        assert losses.body.packs == (name not in APART), "which decoders pack is part of the table"


@every_decoder
def test_gate_gradients(name, kernel):
    """Compare with autograd through transformers' own masks and a custom attention function that applies the gates."""
    mllm = build(name, kernel)
    features = samples(mllm)[0]
    gate = torch.linspace(0.2, 1.0, TOKENS)
    reason = REFUSED.get(name) or NO_GATES.get(name)
    if reason:
        with pytest.raises(UserError, match=reason):
            gate_gradient(mllm, features, gate)
        return
    expected = gradient_through_attention(mllm, features, gate)
    given = gate_gradient(mllm, features, gate)
    assert expected.abs().max() > 1e-3
    close(given, expected)


def gradient_through_attention(mllm: FrozenMLLM, features: Features, gate: torch.Tensor) -> torch.Tensor:
    embeds, positions = prompt(mllm, features, torch.arange(TOKENS))
    gate = gate.clone().requires_grad_()
    added = torch.zeros(embeds.shape[1]).index_put((features.visual_at,), gate.log())
    off_diagonal = added.expand(len(added), -1) * (1 - torch.eye(len(added)))

    def gated(module, query, key, value, attention_mask, **settings):
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, attention_mask + off_diagonal, **settings)

    ALL_ATTENTION_FUNCTIONS.register("gated", gated)
    AttentionMaskInterface.register("gated", eager_mask)
    config = mllm.decoder.config
    before, config._attn_implementation = config._attn_implementation, "gated"
    try:
        with torch.enable_grad():
            hidden = mllm.decoder(
                inputs_embeds=embeds, position_ids=positions, attention_mask=ones(embeds), use_cache=False
            ).last_hidden_state[0]
            loss = F.cross_entropy(mllm.head(hidden)[-len(features.answer_ids) :], features.answer_ids)
            return torch.autograd.grad(loss, gate)[0]
    finally:
        config._attn_implementation = before


def test_shared_states_need_full_attention():
    for name, shares in (("llama", True), ("mistral, window 6", False), ("mistral, window 64", False), ("lfm2", False)):
        mllm, features = build(name), samples()[0]
        losses = AnswerLosses(mllm, settings=ScorerConfig(own_pass=False, shared_prefix="always"))
        losses.candidates(features, masks())
        assert any(past is not None for past in losses._prefixes.values()) == shares


def test_windows_of_packed_tokens_depend_on_their_own_sequence():
    """A case by hand: window 2, one common token, and two sequences of two tokens."""
    packing = Packing.of(1, (2, 2))
    assert packing.part.tolist() == [-1, 0, 0, 1, 1] and packing.index.tolist() == [0, 1, 2, 1, 2]
    window = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert packing.mask(window).int().tolist() == expected
    assert packing.mask(window, start=3).int().tolist() == expected[3:]


def test_a_kernel_without_masks_scores_questions_separately_and_refuses_gates(monkeypatch):
    mllm = build("qwen2, window 6")
    assert TransformersBody(mllm.decoder, torch.float32).packs
    monkeypatch.setattr(mllm.decoder.config, "_attn_implementation_internal", "flash_attention_2")
    assert not TransformersBody(mllm.decoder, torch.float32).packs
    with pytest.raises(UserError, match="flash_attention_2 does not accept an explicit attention mask"):
        attention.check_masks(mllm.decoder.config)


@pytest.mark.parametrize("name", DECODERS)
def test_layer_types_are_those_of_the_models_own_masks(name):
    """The attention masks that each layer receives, recorded during a forward pass."""
    mllm = build(name, "eager")
    if name in REFUSED or name in NO_GATES:
        return
    config, caught = mllm.decoder.config, []
    for layer in mllm.decoder.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: caught.append(kwargs["attention_mask"]), with_kwargs=True
        )
    length = 20
    with torch.no_grad():
        mllm.decoder(inputs_embeds=torch.randn(1, length, 32), attention_mask=torch.ones(1, length, dtype=torch.long))
    plain = attention.plain_masks(config, length)
    kinds = attention.layer_types(config)
    assert len(kinds) == len(caught) == 3
    for kind, seen in zip(kinds, caught, strict=True):
        assert torch.equal(plain[kind], seen[0, 0] == 0)
