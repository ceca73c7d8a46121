"""Reusing a known image's token ids in another prompt gives the same inputs as the family's own processor."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evocomp.mllm.families import FAMILIES
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.image_span import find_image_span
from tests.mllm import processors

# the text that Gemma 3 and PaliGemma insert next to an image may merge with the prompt's text
PREPARED_EACH_TIME = {"gemma3", "paligemma"}
NOT_BUILT = {"llama4"}  # its image processor needs torchvision
IMAGES = [
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    for size in ((48, 80), (24, 24))
]
parts = st.lists(st.sampled_from([" ", "\n", "\n\n", "what", " colour", "  squares", "?", "<s>", "</s>", "é"]))


@cache
def prepared(family: str):
    with pytest.MonkeyPatch.context() as patch:  # video processors need torchvision and are not used here
        patch.setattr(tf.ProcessorMixin, "check_argument_for_proper_class", lambda self, name, value: type(value))
        return processors.build(family)


def both(family: str, image: Image.Image, text: str, special: bool) -> tuple[dict, list[int]]:
    """The processor's output for text and image, and the token ids of the text with the placeholder."""
    processor, _ = prepared(family)
    inputs = processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=special)
    ids = processor.tokenizer(text, add_special_tokens=special).input_ids
    return {name: value for name, value in inputs.items() if not name.startswith("pixel_")}, ids


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PREPARED_EACH_TIME | NOT_BUILT])
@settings(max_examples=30)
@given(before=parts, after=parts, image=st.sampled_from(IMAGES), special=st.booleans())
def test_a_spliced_prompt_is_the_processors_own(family, before, after, image, special):
    processor, placeholder = prepared(family)
    inputs, ids = both(family, image, f"User: {placeholder}\nwhat colour?", special)
    span = find_image_span(processor, ids, inputs)
    expected, ids = both(family, image, "".join(before) + placeholder + "".join(after), special)
    found = span.insert(ids)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


@pytest.mark.parametrize("family", sorted(PREPARED_EACH_TIME))
def test_there_is_no_span_where_text_could_merge_with_it(family):
    processor, placeholder = prepared(family)
    inputs, ids = both(family, IMAGES[0], f"User: {placeholder}\nwhat colour?", True)
    assert find_image_span(processor, ids, inputs) is None


def test_prompts_without_exactly_one_placeholder_use_the_processor():
    processor, placeholder = prepared("llava")
    inputs, ids = both("llava", IMAGES[0], f"{placeholder} what", True)
    span = find_image_span(processor, ids, inputs)
    for text in ("what", f"{placeholder} what {placeholder}"):
        assert span.insert(processor.tokenizer(text).input_ids) is None


def test_the_image_processor_runs_once_for_an_image(nano, questions, monkeypatch):
    fresh, calls = FrozenMLLM(nano.model, nano.processor), []
    process = FrozenMLLM._process
    monkeypatch.setattr(FrozenMLLM, "_process", lambda self, example: calls.append(1) or process(self, example))
    spliced = fresh.features(questions)
    assert len(calls) == len({question.image_id for question in questions}) < len(questions)
    for one, question in zip(spliced, questions, strict=True):
        (alone,) = FrozenMLLM(nano.model, nano.processor).features([question])
        for name in ("visual", "prompt_ids", "visual_at", "positions", "answer_ids"):
            assert torch.equal(getattr(one, name), getattr(alone, name)), name


def test_an_evicted_image_is_processed_again(nano, questions, monkeypatch):
    small = FrozenMLLM(nano.model, nano.processor)
    small.cache_bytes = 1
    first, other = questions[0], next(one for one in questions if one.image_id != questions[0].image_id)
    small.features([first, other])
    (again,) = small.features([replace(first, id=987654)])
    (alone,) = FrozenMLLM(nano.model, nano.processor).features([first])
    assert torch.equal(again.prompt_ids, alone.prompt_ids) and torch.equal(again.visual, alone.visual)
    assert len(small._spans) == len(small._pictures) == 1
