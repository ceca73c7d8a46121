"""The shipped models are ordinary Hugging Face folders, and their answers depend on the image."""

import json
import socket

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from evocomp.data.scenes import COLORS, SHAPES, SIGN_WORDS, SPECS, scene_examples
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.nano import ASSETS, READING_WORDS, WORDS, build_nano, nano_config, nano_processor

FOLDER = ASSETS / "nano"
FRESH = 424242  # a seed that no setting, training or other test uses


@pytest.fixture(scope="module")
def nano576():
    return FrozenMLLM.load("nano576")


def share_right(nano, examples, other_pictures=False, batch=100) -> float:
    """Accuracy with all tokens, or with the visual tokens of another question's image (half of the list away)."""
    features = nano.features(examples)
    everything = torch.arange(len(features[0].visual))
    right = 0
    for start in range(0, len(examples), batch):
        prompts = []
        for i in range(start, min(start + batch, len(examples))):
            seen = features[(i + len(examples) // 2) % len(examples)] if other_pictures else features[i]
            assert (seen.image_id != features[i].image_id) == other_pictures
            prompts.append((features[i], seen.visual, everything))
        answers, _ = nano.answer(prompts)
        right += sum(a == e.answer for a, e in zip(answers, examples[start:], strict=False))
    return right / len(examples)


def fresh(count: int) -> list:
    return scene_examples(FRESH, 0, count // 10)[:count]


def test_answers_new_questions_and_needs_the_image(nano):
    examples = fresh(400)
    assert len(examples) == 400 and {e.kind for e in examples} == {"color", "shape", "digit", "find", "exist", "count"}
    assert share_right(nano, examples) >= 0.93
    assert share_right(nano, examples, other_pictures=True) <= 0.45


def fresh_large(count: int) -> list:
    return scene_examples(FRESH, 0, count // 10, SPECS["large"])[:count]


def test_the_larger_model_answers_new_questions_and_needs_the_image(nano576):
    examples = fresh_large(200)
    assert len(examples) == 200 and "read" in {e.kind for e in examples}
    assert len(nano576.features(examples[:1])[0].visual) == 576
    assert share_right(nano576, examples, batch=50) >= 0.86
    assert share_right(nano576, examples, other_pictures=True, batch=50) <= 0.45


@pytest.mark.slow
def test_the_larger_model_answers_two_thousand_fresh_questions(nano576):
    examples = fresh_large(2000)
    assert share_right(nano576, examples, batch=50) >= 0.90
    assert share_right(nano576, examples, other_pictures=True, batch=50) <= 0.45


@pytest.mark.slow
def test_answers_two_thousand_fresh_questions(nano):
    examples = fresh(2000)
    assert len(examples) == 2000
    assert share_right(nano, examples) >= 0.94
    assert share_right(nano, examples, other_pictures=True) <= 0.45


@pytest.fixture(scope="module")
def plain():
    """transformers alone loads the model, without any network connection."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_):
            raise AssertionError("a connection was opened")

        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return AutoModelForImageTextToText.from_pretrained(FOLDER).eval(), AutoProcessor.from_pretrained(FOLDER)


def test_auto_classes_load_it_offline(plain):
    model, processor = plain
    assert type(model) is LlavaForConditionalGeneration
    assert model.config.image_seq_length == 144 and model.config.text_config.vocab_size == len(WORDS)
    assert processor.tokenizer.get_vocab() == {word: i for i, word in enumerate(WORDS)}
    assert not model.config.text_config.tie_word_embeddings


def test_generate_gives_the_answers_of_frozen_mllm(plain, nano, questions, encoded):
    model, processor = plain
    questions, encoded = questions[::2], encoded[::2]
    theirs = []
    for example in questions:
        content = [{"type": "image", "image": example.image}, {"type": "text", "text": example.prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            said = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        theirs.append(processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    ours, _ = nano.answer([(f, f.visual, torch.arange(144)) for f in encoded], max_new_tokens=4)
    assert ours == theirs
    assert np.mean([a == e.answer for a, e in zip(ours, questions, strict=True)]) > 0.8  # `relation` is among them


def test_the_pipeline_answers(plain, questions):
    from PIL import Image
    from transformers import pipeline

    ask = pipeline("image-text-to-text", model=plain[0], processor=plain[1])
    example = questions[0]
    content = [{"type": "image", "image": Image.fromarray(example.image)}, {"type": "text", "text": example.prompt}]
    out = ask(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
    assert out[0]["generated_text"].strip() == example.answer


@pytest.mark.parametrize("name", ["nano", "nano576"])
def test_assets_are_small_enough_to_ship(name):
    sizes = {path.name: path.stat().st_size for path in (ASSETS / name).iterdir()}
    needed = {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md"}
    assert needed <= sizes.keys()
    assert sum(sizes.values()) < 4_000_000, sizes


@pytest.mark.parametrize(("name", "size", "words"), [("nano", 96, WORDS), ("nano576", 192, READING_WORDS)])
def test_the_recipe_builds_the_shipped_models(nano, nano576, name, size, words):
    shipped = {"nano": nano, "nano576": nano576}[name]
    model, processor = shipped.model, shipped.processor
    config = nano_config(size, words=words)
    again = build_nano(config, torch.Generator().manual_seed(3))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    shipped = json.loads((ASSETS / name / "config.json").read_text())
    rebuilt = json.loads(config.to_json_string(use_diff=False))
    for section in ("text_config", "vision_config"):
        for key, value in shipped[section].items():
            if key not in ("dtype", "_name_or_path"):
                assert rebuilt[section][key] == value, key
    made = nano_processor(config, words)
    text = "color of circle how many red any pink cross sign sun"
    assert made.tokenizer(text).input_ids == processor.tokenizer(text).input_ids
    assert made.chat_template == processor.chat_template


def test_random_weights_depend_only_on_the_generator():
    one, same, other = (build_nano(nano_config(), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    equal = [torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True)]
    assert all(equal)
    embeddings = [m.get_input_embeddings().weight for m in (one, other)]
    assert not torch.equal(*embeddings)
    # initialisation of the recipe: word embeddings have a large variance, visual tokens unit scale
    assert abs(embeddings[0].std().item() - 0.5) < 0.02


@pytest.mark.parametrize("name", ["nano", "nano576"])
def test_every_word_of_every_question_is_in_the_vocabulary(nano, nano576, name):
    spec, words, model = {"nano": ("small", (), nano), "nano576": ("large", SIGN_WORDS, nano576)}[name]
    examples = scene_examples(77, 0, 60, SPECS[spec], relation=True)
    texts = {f"{e.prompt} {e.answer}" for e in examples} | {" ".join([*COLORS, *SHAPES, *map(str, range(10)), *words])}
    unknown = WORDS.index("<unk>")
    for text in texts:
        assert unknown not in model.processor.tokenizer(text).input_ids, text
