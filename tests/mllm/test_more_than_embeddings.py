"""Decoders that read more than embeddings (DeepStack, bidirectional blocks): the frozen MLLM on shortened prompts
against the model's own forward, one pass for each mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from evocomp.inference.hooks import compress
from evocomp.log import UserError
from evocomp.mllm import attention, families
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring.answer_losses import AnswerLosses
from evocomp.scoring.gate import gate_gradient
from tests.inference.test_speculation import one_prompt
from tests.inference.tiny_models import build
from tests.mllm.answer_logits import answer_logits

FAMILIES = ["qwen3_vl", "gemma3", "paligemma"]
every_family = pytest.mark.parametrize("family", FAMILIES)
ANSWER = torch.tensor([33, 44, 55])
KEPT = torch.tensor([[0, 3, 4, 9, 11], [1, 2, 5, 8, 10], [2, 3, 6, 7, 9]])


def encoded(family, attention_kernel="sdpa", answer=ANSWER):
    """The tiny model as a frozen MLLM, its inputs, and their features."""
    model, inputs = build(family, attention_kernel), one_prompt(family)
    with torch.no_grad():
        output = families.encode(model, inputs)
        rows = families.visual_tokens(model, inputs["input_ids"], output)
    ids = inputs["input_ids"][0]
    features = Features(
        id=0,
        image_id="a",
        visual=rows,
        prompt_ids=ids,
        visual_at=families.visual_mask(model, ids).nonzero()[:, 0],
        positions=families.position_ids(model, inputs, forward=True)[..., 0, :],
        answer_ids=answer,
        deepstack=families.deepstack_rows(output),
        blocks=families.block_ids(model, ids),
    )
    return FrozenMLLM(model, None, family), inputs, features


def by_the_model(model, inputs, kept, answer):
    """Logits [A, V] of an answer by the model's own forward and cache, behind the hooks of `compress`."""

    def selector(visual, text, keep):
        return torch.zeros(len(visual)).index_fill(0, kept, 1.0)

    with torch.no_grad(), compress(model, selector, keep=len(kept)) as handle:
        first = model(**inputs, use_cache=True)
        assert torch.equal(handle.last.indices[0][0], kept)
        mask = torch.ones(1, inputs["input_ids"].shape[1] + len(answer) - 1, dtype=torch.long)
        cache = first.past_key_values
        rest = model(input_ids=answer[None, :-1], past_key_values=cache, attention_mask=mask, use_cache=True)
    return torch.cat([first.logits[0, -1:], rest.logits[0]])


def losses_by_the_model(model, inputs, kept, answer):
    return torch.stack([F.cross_entropy(by_the_model(model, inputs, row, answer), answer) for row in kept])


@every_family
def test_features_hold_what_the_decoder_reads(family):
    mllm, inputs, features = encoded(family)
    assert (features.deepstack is not None) == (family == "qwen3_vl")
    if features.deepstack is not None:
        assert features.deepstack.shape == (3, len(features.visual), features.visual.shape[1])
        rows = features.deepstack_rows()
        assert torch.equal(rows[:, features.visual_at], features.deepstack)
        assert not rows[:, features.text_at].any()
    if family == "gemma3":
        assert torch.equal(features.blocks >= 0, inputs["token_type_ids"][0] == 1)
    if family == "paligemma":
        assert not features.blocks.any()


@every_family
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_losses_are_those_of_one_forward_pass_per_mask(family, kernel):
    mllm, inputs, features = encoded(family, kernel)
    ours = AnswerLosses(mllm).candidates(features, KEPT)
    wanted = losses_by_the_model(mllm.model, inputs, KEPT, ANSWER)
    assert_close(ours, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 1e-3


@every_family
def test_logits_of_the_answer_are_the_models(family):
    mllm, inputs, features = encoded(family)
    ours = answer_logits(mllm, features, features.visual[KEPT], KEPT)
    for row, kept in zip(ours, KEPT, strict=True):
        wanted = by_the_model(mllm.model, inputs, kept, ANSWER)
        assert_close(row, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@every_family
def test_what_makes_the_difference_is_read(family):
    # without DeepStack rows or blocks the losses are others
    mllm, _, features = encoded(family)
    losses = AnswerLosses(mllm)
    bare = replace(features, deepstack=None, blocks=None)
    assert (losses.candidates(features, KEPT) - losses.candidates(bare, KEPT)).abs().min() > 1e-4


@every_family
def test_all_ways_to_score_agree(family):
    mllm, inputs, features = encoded(family)
    losses = AnswerLosses(mllm)
    wanted = losses_by_the_model(mllm.model, inputs, KEPT, ANSWER)
    assert_close(losses.candidates(features, KEPT, flips=True), wanted, rtol=0, atol=1e-5)
    # another question of another length about the same image
    other = torch.cat([features.prompt_ids, torch.tensor([61, 62])])
    positions = torch.cat([features.positions, features.positions[..., -1:] + torch.tensor([1, 2])], dim=-1)
    blocks = families.block_ids(mllm.model, other)
    second = replace(features, id=1, prompt_ids=other, positions=positions, blocks=blocks, answer_ids=ANSWER[:1])
    alone = losses.candidates(second, KEPT)
    batch = losses.batch([features, second], torch.stack([KEPT, KEPT]))
    assert_close(batch, torch.stack([wanted, alone]), rtol=0, atol=1e-5)
    shared = losses.shared([features, second], KEPT)
    assert_close(shared, torch.stack([wanted, alone], dim=1), rtol=0, atol=1e-5)


class Tokenizer:
    pad_token_id = eos_token_id = 0

    def batch_decode(self, rows, **settings):
        return [" ".join(map(str, row)) for row in rows]


class Processor:
    tokenizer = Tokenizer()


@every_family
def test_answers_in_a_batch_are_the_models(family):
    mllm, inputs, features = encoded(family)
    mllm.processor = Processor()
    few, many = KEPT[0][:2], KEPT[1]
    shown = [(features, features.visual[kept], kept) for kept in (few, many)]
    texts, first = mllm.answer(shown, max_new_tokens=3)
    for text, logits, kept in zip(texts, first, (few, many), strict=True):
        said = torch.tensor([int(word) for word in text.split()])
        wanted = by_the_model(mllm.model, inputs, kept, said)
        assert torch.equal(wanted.argmax(-1), said)
        assert_close(logits, wanted[0], rtol=0, atol=1e-5 * wanted.abs().max().item())


@every_family
def test_what_is_not_made_is_refused_by_name(family):
    mllm, _, features = encoded(family)
    with pytest.raises(UserError, match=f"{family}.*more than embeddings"):
        gate_gradient(mllm, features, torch.full((len(features.visual),), 0.5))
    with pytest.raises(UserError, match=f"{family}.*more than embeddings"):
        mllm.check_weighable()


def test_families_outside_the_table_are_refused():
    from tests.inference.derived_models import build as build_derived

    with pytest.raises(UserError, match="ovis2: labels and panel are made for these families only"):
        AnswerLosses(FrozenMLLM(build_derived("ovis2")[0], None, "ovis2"))


def test_a_cap_on_logits_is_refused():
    with pytest.raises(UserError, match="cap on its logits"):
        AnswerLosses(FrozenMLLM(build("paligemma2"), None, "paligemma2"))


@pytest.mark.parametrize("beyond", [False, True])
def test_block_masks_against_a_loop(beyond):
    config = build("gemma3").get_decoder().config
    blocks = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, (2, 12)))
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, :3] = False
    masks = attention.block_masks(config, blocks, beyond, real)
    for kind, window in (("full_attention", 99), ("sliding_attention", config.sliding_window)):
        for q in range(2):
            for i in range(12):
                for j in range(12):
                    block = bool(blocks[q, i] == blocks[q, j] >= 0)
                    near = i - j < window
                    seen = (j <= i and near) or (block and (near or beyond))
                    assert masks[kind][q, 0, i, j] == (seen and bool(real[q, j]) or i == j)
