"""Timed answers: equal to untimed ones, with consistent times."""

import copy
import time

import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from evocomp.inference.generate import question, timed_generate
from evocomp.inference.hooks import compress
from tests.inference.test_hooks import jumble
from tests.inference.tiny_models import FAMILIES, IMAGE, VIDEO, build, processor_for_llava, prompts


@pytest.fixture
def model():
    model = copy.deepcopy(build("llava"))
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return model


image = Image.new("RGB", (40, 30), (200, 30, 60))


def slow(visual, text, keep):
    time.sleep(0.05)
    return jumble(visual, text, keep)


def test_answers_are_those_of_generate(model):
    processor = processor_for_llava()
    inputs = processor(text=["<image>\nw30 w31"], images=[image], return_tensors="pt")
    for keep in (1.0, 4):
        with compress(model, jumble, keep=keep) as handle:
            wanted = model.generate(**inputs, max_new_tokens=5, do_sample=False)
            answer = timed_generate(model, processor, image, "w30 w31", handle, max_new_tokens=5)
        tail = processor.batch_decode(wanted[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        assert answer.text == tail and answer.new_tokens == 5
        assert (answer.before, answer.after) == (16, 16 if keep == 1.0 else 4)
        assert answer.prompt == inputs["input_ids"].shape[1]


class Prepared:
    """A processor that returns a family's prompts."""

    def __init__(self, family):
        self.inputs = BatchFeature(prompts(family))

    def __call__(self, **_):
        return self.inputs

    def batch_decode(self, ids, **_):
        return [str(row.tolist()) for row in ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_separate_encoding_changes_no_answer(family):
    model, processor = copy.deepcopy(build(family)), Prepared(family)
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    with compress(model, jumble, keep=0.4, layer=1) as handle:
        wanted = model.generate(**processor.inputs, max_new_tokens=4, do_sample=False)
        answer = timed_generate(model, processor, None, "", handle, max_new_tokens=4)
    assert answer.text == str(wanted[0, -4:].tolist()) and answer.after < answer.before


def test_each_time_is_that_of_its_stage(model):
    processor = processor_for_llava()
    plain = timed_generate(model, processor, image, "w30 w31", max_new_tokens=3)
    assert plain.compressor == 0.0 and plain.after == plain.before == 16
    with compress(model, slow, keep=4) as handle:
        picker = handle.picker
        start = time.perf_counter()
        answer = timed_generate(model, processor, image, "w30 w31", handle, max_new_tokens=3)
        wall = time.perf_counter() - start
        assert handle.picker is picker
    assert answer.compressor >= 0.05 > answer.prefill > 0 and answer.encode > 0 and answer.decode > 0
    assert 0.05 < answer.total <= wall
    assert answer.total == answer.encode + answer.compressor + answer.prefill + answer.decode


def test_the_selector_is_restored_after_an_error(model):
    with compress(model, lambda *_: 1 / 0, keep=4) as handle:
        picker = handle.picker
        with pytest.raises(ZeroDivisionError):
            timed_generate(model, processor_for_llava(), image, "w30", handle)
        assert handle.picker is picker


def test_questions_use_the_chat_template_once():
    processor = processor_for_llava()
    processor.chat_template = (
        "<s> {% for part in messages[0].content %}"
        "{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}"
        "{{ ' w99' if add_generation_prompt }}"
    )
    ids = question(processor, image, "w30 w31")["input_ids"][0]
    assert torch.equal(ids, torch.tensor([1, *[IMAGE] * 16, 30, 31, 99]))
