"""Family policies against transformers' own forward pass on the same inputs."""

import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from evocomp.log import UserError
from evocomp.mllm import families
from tests.inference.tiny_models import FAMILIES, IMAGE, PICTURE_TOKENS, build, prompts
from tests.mllm.image_features import image_features

ROOT = Path(__file__).resolve().parent.parent.parent

every_family = pytest.mark.parametrize("family", FAMILIES)


def decoder_inputs(model, inputs) -> dict:
    """The input embeddings that the unmodified model passes to its LLM."""
    seen = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda _, __, kw: seen.update(kw), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen


@every_family
def test_image_features_are_the_rows_of_the_llm_input(family):
    model, inputs = build(family), prompts(family)
    with torch.no_grad():
        features = image_features(model, inputs)
    mask = families.visual_mask(model, inputs["input_ids"])
    assert [len(rows) for rows in features] == list(PICTURE_TOKENS[family])
    assert torch.equal(torch.cat(features), decoder_inputs(model, inputs)["inputs_embeds"][mask])


@every_family
def test_image_numbers_follow_the_images(family):
    model, inputs = build(family), prompts(family)
    with torch.no_grad():
        numbers = families.image_numbers(model, inputs["input_ids"], families.encode(model, inputs))
    expected = sum(([i] * n for i, n in enumerate(PICTURE_TOKENS[family])), [])
    assert numbers[numbers >= 0].tolist() == expected
    assert torch.equal(numbers >= 0, inputs["input_ids"] == IMAGE)


@every_family
def test_positions_are_those_of_generate(family):
    model, inputs = build(family), prompts(family)
    seen = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, __, kw: seen.append(kw["position_ids"]), with_kwargs=True
    )
    model.generate(**inputs, max_new_tokens=1)
    hook.remove()
    rope_deltas = getattr(model.base_model, "rope_deltas", None)
    positions = families.position_ids(model, inputs, forward=True)
    assert torch.equal(positions, seen[0])
    assert positions.shape[-2:] == inputs["input_ids"].shape
    assert (positions.ndim == 3) == families.policy(model).mrope
    assert getattr(model.base_model, "rope_deltas", None) is rope_deltas


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newline_rows_end_the_rows_of_the_unpadded_grid(family):
    model, inputs = build(family), prompts(family)
    with torch.no_grad():
        first = image_features(model, inputs)[0]
    # 16 tokens of the base tile, then a grid of 4 rows of 8 tokens and a separator each
    rows = families.newline_rows(model, first).nonzero().squeeze(1).tolist()
    assert rows == [16 + 8, 16 + 17, 16 + 26, 16 + 35]


@every_family
def test_policy_table_agrees_with_the_model_classes(family):
    model, table = build(family), families.policy(build(family))
    assert table.newline == hasattr(model.base_model, "image_newline")
    assert table.mrope == hasattr(model.base_model, "rope_deltas")
    assert table.deepstack == hasattr(model.get_decoder(), "_deepstack_process")


def test_unknown_family_is_refused_with_the_list_of_known_ones():
    with pytest.raises(UserError, match="not supported.*llava, llava_next"):
        families.check_supported(nn.Linear(2, 2))


def test_old_transformers_is_refused(monkeypatch):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers>={families.MIN_TRANSFORMERS}" in declared
    monkeypatch.setattr(families.transformers, "__version__", "5.22.1")
    with pytest.raises(UserError, match="5.22.1 is too old.*5.23"):
        families.check_supported(build("llava"))
    monkeypatch.setattr(families.transformers, "__version__", "5.23.0.dev0")
    families.check_supported(build("llava"))


def test_prompts_that_do_not_match_the_pixels_are_refused():
    model, inputs = build("llava"), prompts("llava")
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    with pytest.raises(UserError, match="48 image placeholders.*32 tokens"):
        image_features(model, inputs)


def test_peft_wrapped_models_are_unwrapped():
    import copy

    import peft

    model, inputs = build("llava"), prompts("llava")
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"], r=2))
    families.check_supported(wrapped)
    with torch.no_grad():
        ours, plain = image_features(wrapped, inputs), image_features(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_no_pixels_means_no_features():
    assert image_features(build("llava"), {"input_ids": torch.tensor([[1, 20]])}) == []
