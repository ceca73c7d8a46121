"""Probes recompute attention from hooked projections; compared with the attention of transformers' eager kernels."""

import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image

from evocomp.data.scenes import draw_scene
from evocomp.evaluation.rivals.probes import Probes
from evocomp.mllm.hf import FrozenMLLM
from tests.inference.tiny_models import build
from tests.mllm.test_hf import tiny

VISION = ("clip_hidden", "clip_keys", "clip_queries", "clip_next_keys", "clip_next_queries", "cls_attention",
          "cls_attention_first", "project")  # fmt: skip
LLM = ("llm_attention", "llm_keys", "llm_hidden")


@pytest.fixture(scope="module")
def eager():
    return FrozenMLLM.load("nano", attention="eager")


@pytest.fixture(scope="module")
def tower(eager, questions):
    """The tower's own outputs for the image of the first question."""
    pixels = eager._process(questions[0])["pixel_values"]
    with torch.no_grad():
        return eager.model.base_model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)


def test_class_attention_is_that_of_the_tower(nano, questions, encoded, tower):
    found = Probes(nano).gather(questions[0], encoded[0], VISION)
    for name, layer in (("cls_attention", -1), ("cls_attention_first", 0)):
        theirs = tower.attentions[layer][0, :, 0, 1:]
        assert found[name].shape == (3, 144)
        assert torch.allclose(found[name], theirs, atol=1e-6)


def test_clip_keys_and_queries_give_the_whole_attention(nano, questions, encoded, tower):
    found = Probes(nano).gather(questions[0], encoded[0], VISION)
    heads = [found[name].unflatten(1, (3, 32)).transpose(0, 1) for name in ("clip_queries", "clip_keys")]
    attention = (heads[0] @ heads[1].mT / 32**0.5).softmax(-1)
    assert torch.allclose(attention, tower.attentions[-1][0], atol=1e-6)
    # the projector reads the last layer of the tower: there is no next layer
    assert torch.equal(found["clip_next_keys"], found["clip_keys"])


def test_hidden_states_go_through_the_projector_to_the_visual_tokens(nano, questions, encoded, tower):
    found = Probes(nano).gather(questions[0], encoded[0], VISION)
    assert torch.allclose(found["clip_hidden"], tower.hidden_states[-1][0], atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(found["project"](found["clip_hidden"][1:]), encoded[0].visual, atol=1e-5)


def test_the_layer_is_the_one_that_the_projector_reads(nano, questions, encoded, tower):
    model = copy.deepcopy(nano.model)
    model.config.vision_feature_layer = -2
    found = Probes(FrozenMLLM(model, nano.processor)).gather(questions[0], encoded[0], VISION)
    assert torch.allclose(found["cls_attention"], tower.attentions[-2][0, :, 0, 1:], atol=1e-6)
    assert torch.allclose(found["clip_hidden"], tower.hidden_states[-2][0], atol=1e-5)
    heads = [found[name].unflatten(1, (3, 32)).transpose(0, 1) for name in ("clip_next_queries", "clip_next_keys")]
    attention = (heads[0] @ heads[1].mT / 32**0.5).softmax(-1)
    assert torch.allclose(attention, tower.attentions[-1][0], atol=1e-6)


def test_llm_attention_keys_and_states_are_those_of_the_decoder(nano, eager, questions, encoded):
    found = Probes(nano).gather(questions[0], encoded[0], LLM)
    features = encoded[0]
    with torch.no_grad():
        theirs = eager.model(
            **eager._process(questions[0]), output_attentions=True, output_hidden_states=True, use_cache=True
        )
    asked = len(features.prompt_ids) - 1 - int(features.visual_at[-1])
    assert asked == len(questions[0].prompt.split())
    norm = nano.decoder.norm
    for layer in range(3):
        ours = found["llm_attention"][layer]
        assert ours.shape == (3, asked, len(features.prompt_ids))
        assert torch.allclose(ours, theirs.attentions[layer][0, :, -asked:], atol=1e-5)
        keys = theirs.past_key_values.layers[layer].keys[0].transpose(0, 1).flatten(1)
        assert torch.allclose(found["llm_keys"][layer], keys, atol=1e-4)
        # transformers applies the norm to the last hidden states
        states = theirs.hidden_states[layer + 1][0]
        states = states if layer == 2 else norm(states)
        assert torch.allclose(found["llm_hidden"][layer], states, atol=1e-4)


def test_text_is_what_stands_after_the_picture(nano, questions, encoded):
    found = Probes(nano).gather(questions[0], encoded[0], {"text"})
    ids = nano.processor.tokenizer(questions[0].prompt, add_special_tokens=False).input_ids
    assert torch.equal(found["text"], nano.vocabulary[ids])


def test_only_what_is_asked_for_is_gathered(nano, questions, encoded):
    assert Probes(nano).gather(questions[0], encoded[0], {"cls_attention"}).keys() == {"cls_attention"}
    assert Probes(nano).gather(questions[0], encoded[0], {"grid"}) == {}


def test_one_picture_is_looked_at_once_and_another_one_anew(nano, questions, encoded, tmp_path):
    probes = Probes(nano)
    calls = []
    handle = nano.model.base_model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    same = [i for i, e in enumerate(questions) if e.image_id == questions[0].image_id]
    other = next(i for i, e in enumerate(questions) if e.image_id != questions[0].image_id)
    try:
        rows = [probes.gather(questions[i], encoded[i], {"cls_attention"})["cls_attention"] for i in same[:3]]
        assert len(calls) == 1 and torch.equal(rows[0], rows[2])
        row = probes.gather(questions[other], encoded[other], {"cls_attention"})["cls_attention"]
        assert len(calls) == 2 and not torch.equal(row, rows[0])
    finally:
        handle.remove()
    # two files of the same name in two folders
    found = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / "a.png"
        Image.fromarray(draw_scene(6, number).image).save(path)
        example = replace(questions[0], id=number, image=str(path), image_id="a.png")
        found.append(probes.gather(example, encoded[0], {"cls_attention"})["cls_attention"])
    assert not torch.equal(*found)


def test_hooks_are_gone_afterwards(nano, questions, encoded):
    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in nano.model.modules())

    before = hooks()
    Probes(nano).gather(questions[0], encoded[0], {*VISION, *LLM})
    assert hooks() == before


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "internvl", "llava_onevision"])
def test_what_a_model_does_not_have_is_not_in_the_answer(family, questions):
    """These towers have no class token."""
    features, _, model = tiny(family)
    found = Probes(FrozenMLLM(model, processor=None)).gather(questions[0], features, {*VISION, *LLM})
    assert not set(VISION) & found.keys()
    assert set(LLM) == found.keys()


@pytest.mark.parametrize("family", ["smolvlm", "internvl", "mistral3", "qwen2_vl", "qwen2_5_vl"])
def test_grouped_heads_and_other_decoders(family, questions):
    """Compared with the same tiny model with its eager kernel."""
    features, inputs, model = tiny(family)
    found = Probes(FrozenMLLM(model, processor=None)).gather(questions[0], features, LLM)
    with torch.no_grad():
        theirs = build(family, "eager")(**inputs, output_attentions=True).attentions
    # selectors need the tokens of an image contiguous and right before the text, without separators of tiles and rows
    after = range(features.picture_end, len(features.prompt_ids))
    rest = [i for i in range(features.picture_end) if i not in features.visual_at.tolist()]
    order = [*rest, *features.visual_at.tolist(), *after]
    for layer, attention in enumerate(theirs):
        ours = found["llm_attention"][layer]
        assert torch.allclose(ours, attention[0, :, -ours.shape[1] :][..., order], atol=1e-5)
