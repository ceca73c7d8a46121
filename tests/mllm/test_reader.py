"""From examples to features: images as transformers reads them, several of them, and broken ones."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from evocomp.data.conversations import read_conversations
from evocomp.data.example import Example
from evocomp.data.images import BrokenImage
from evocomp.data.scenes import draw_scene, scene_examples
from evocomp.evaluation.panel import Panel, Rival
from evocomp.log import UserError
from evocomp.mllm.features import first_image, grid_of
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.reader import picture_key
from evocomp.scoring.answer_losses import AnswerLosses
from evocomp.selection import selector


@pytest.fixture
def fresh(nano):
    """A reader that remembers nothing."""
    return FrozenMLLM(nano.model, nano.processor, "nano")


def scenes(count: int) -> list[np.ndarray]:
    return [draw_scene(91, index).image for index in range(count)]


def conversation(folder, *records) -> list[Example]:
    (folder / "data.json").write_text(json.dumps(list(records)))
    return read_conversations(folder).examples


def said(*texts) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_a_photo_on_its_side_is_read_upright(fresh, tmp_path):
    (pixels,) = scenes(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    on_its_side = Image.fromarray(np.rot90(pixels).copy())
    on_its_side.save(tmp_path / "photo.png", exif=exif)
    upright = Example(1, pixels, "upright", "what is it", "red")
    photo = Example(2, str(tmp_path / "photo.png"), "photo", "what is it", "red")
    one, other = fresh.features([upright, photo])
    assert torch.equal(one.visual, other.visual)
    resized = [fresh.encode_resized(example, None) for example in (upright, photo)]
    assert torch.equal(*resized)


# ------------------------------------------------------------ several images


@pytest.fixture
def two(fresh, tmp_path) -> list[Example]:
    """Two turns about two images, the second of which comes in the second turn."""
    for number, pixels in enumerate(scenes(2)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    turns = said("<image>\ncolor of circle", "red", "and <image> there is", "blue")
    return conversation(tmp_path, {"id": 5, "image": ["0.png", "1.png"], "conversations": turns})


def test_prompts_hold_each_image_where_it_was_put(fresh, two):
    first, second = fresh.features(two)
    count = len(first.visual)
    tokenizer, image = fresh.processor.tokenizer, fresh.processor.image_token
    # by hand: nano's template writes words and images in their order, and <eos> after an answer
    expected = f"{' '.join([image] * count)} color of circle red <eos> and {' '.join([image] * count)} there is"
    assert second.prompt_ids.tolist() == tokenizer(expected).input_ids
    assert second.counts == (count, count) and first.counts == () and len(second.visual) == 2 * count
    assert torch.equal(second.visual[:count], first.visual)
    alone = fresh.features([replace(two[1], image=two[1].images[1], further_images=(), image_ids=(), placed=())])[0]
    assert torch.equal(second.visual[count:], alone.visual)


def test_all_tokens_of_two_images_give_the_logits_of_the_unmodified_model(fresh, two):
    (features,) = fresh.features(two[1:])
    kept = torch.arange(len(features.visual))
    ours = fresh.answer_logits(features, features.visual[None], kept[None])[0, 0]
    pixels = fresh.processor.image_processor([Image.open(path) for path in two[1].images], return_tensors="pt")
    with torch.no_grad():
        theirs = fresh.model(input_ids=features.prompt_ids[None], **pixels).logits[0, -1]
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=0)
    losses = AnswerLosses(fresh).candidates(features, kept[None])
    wanted = -theirs.log_softmax(-1)[features.answer_ids[0]]
    assert torch.allclose(losses, wanted[None], atol=1e-4)


def test_a_panel_with_questions_about_two_images(fresh, two):
    single = [replace(two[0], id=7, image=pixels, image_id=f"own {n}", extra={}) for n, pixels in enumerate(scenes(3))]
    panel = Panel(fresh, [*two, *single])
    assert panel.questions.images == ["0.png", "0.png", "own 0", "own 1", "own 2"]
    for outcome in (panel.full(), panel.no_image(), panel.wrong_image()):
        assert len(outcome.answers) == 5
    assert "several images" in panel.downsampling(16).not_applicable
    outcomes = panel.selectors([_rival("divprune"), _rival("cls_attention")], [8])
    assert len(outcomes[0].answers) == 5 and outcomes[1].not_applicable
    features = panel.asked[1].features
    assert grid_of(features) == (1, 288)
    lit, grid = first_image(features, np.array([3, 143, 144, 200]))
    assert lit.tolist() == [3, 143] and grid == (12, 12)


def test_another_image_is_none_of_the_questions_own(fresh, two):
    """Of two questions about a + b and about a, neither is shown to the other as a wrong image."""
    alone = replace(two[0], id=7, prompt="shape of red")
    assert "no other image" in Panel(fresh, [two[0], alone]).wrong_image().not_applicable
    a, b = two[1].images
    names = two[1].names[::-1]
    swapped = replace(two[1], id=8, image=b, further_images=(a,), image_ids=names, image_id=" + ".join(names))
    assert "no other image" in Panel(fresh, [two[1], swapped]).wrong_image().not_applicable


def _rival(name: str) -> Rival:
    return Rival(selector(name), name)


def test_images_given_as_base64_are_remembered_by_their_content(fresh, tmp_path):
    (pixels,) = scenes(1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    text = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    (example,) = conversation(tmp_path, {"image": text, "conversations": said("what is it", "red")})
    assert len(picture_key(example)) < 40
    plain = fresh.features([Example(1, pixels, "pixels", "what is it", "red")])[0]
    assert torch.equal(fresh.features([example])[0].visual, plain.visual)


# ------------------------------------------------------------ broken images


@pytest.fixture
def broken(tmp_path) -> list[Example]:
    """Four records, of which the second and third have images that do not decode."""
    (pixels,) = scenes(1)
    for name in ("a", "b", "c", "d"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "c.png").write_text("no image")
    records = [{"id": f"r-{n}", "image": f"{n}.png", "conversations": said("what is it", "red")} for n in "abcd"]
    return conversation(tmp_path, *records)


def test_broken_images_are_named_with_their_record(fresh, broken, tmp_path):
    with pytest.raises(BrokenImage, match=r"^record r-b: image .*b.png does not decode \("):
        fresh.features(broken)
    (tmp_path / "d.png").unlink()
    with pytest.raises(UserError, match=r"^record r-d: image .*d.png is missing") as caught:
        fresh.features(broken[3:])
    assert not isinstance(caught.value, BrokenImage)


def test_examples_with_broken_images_are_left_out_until_there_are_too_many(fresh, broken, caplog):
    fresh.max_bad = 2
    found = fresh.readable(broken)
    assert [example.record for example, _ in found] == ["record r-a", "record r-d"]
    assert [line.split(":")[0] for line in caplog.messages] == ["left out record r-b", "left out record r-c"]
    fresh.readable(broken)
    assert len(caplog.messages) == 2, "each record is reported and counted once"
    assert [example.record for example, _ in fresh.readable(broken, most=1)] == ["record r-a"]
    other = FrozenMLLM(fresh.model, fresh.processor, "nano")
    other.max_bad = 1
    with pytest.raises(UserError, match=r"more than data.max_bad=1 .*last: record r-c: image .*raise data.max_bad"):
        other.readable(broken)


def test_a_panel_judges_without_them(fresh, broken):
    panel = Panel(fresh, broken)
    assert len(panel.questions) == 2 and len(panel.full().answers) == 2
    with pytest.raises(UserError, match="no image decodes"):
        Panel(fresh, broken[1:3])


def test_scenes_are_encoded_as_ever(fresh):
    """One image, first of its prompt: nothing of the above changes a bit of it."""
    (example,) = scene_examples(3, 0, 1)[:1]
    (features,) = fresh.features([example])
    text = fresh.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.prompt}]}],
        add_generation_prompt=True,
    )
    inputs = fresh.processor(text=[text], images=[Image.fromarray(example.image)], return_tensors="pt")
    assert torch.equal(features.prompt_ids, inputs["input_ids"][0]) and features.counts == ()
    with torch.no_grad():
        rows = fresh.model.base_model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    assert torch.equal(features.visual, rows)
