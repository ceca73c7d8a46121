"""Encoding of examples: image orientation, several images per question, and broken images."""

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
from tests.mllm.answer_logits import answer_logits


@pytest.fixture
def fresh(nano):
    """A reader with an empty cache."""
    return FrozenMLLM(nano.model, nano.processor, "nano")


def scenes(count: int) -> list[np.ndarray]:
    return [draw_scene(91, index).image for index in range(count)]


def conversation(folder, *records) -> list[Example]:
    (folder / "data.json").write_text(json.dumps(list(records)))
    return read_conversations(folder).examples


def said(*texts) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_exif_orientation_is_applied(fresh, tmp_path):
    (pixels,) = scenes(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation: rotate clockwise by 90 degrees
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
    """A conversation of two turns; each turn has one image."""
    for number, pixels in enumerate(scenes(2)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    turns = said("<image>\ncolor of circle", "red", "and <image> there is", "blue")
    return conversation(tmp_path, {"id": 5, "image": ["0.png", "1.png"], "conversations": turns})


def test_images_are_at_their_position_in_the_prompt(fresh, two):
    first, second = fresh.features(two)
    count = len(first.visual)
    tokenizer, image = fresh.processor.tokenizer, fresh.processor.image_token
    # written by hand: nano's template keeps the order of text and images, and ends an answer with <eos>
    expected = f"{' '.join([image] * count)} color of circle red <eos> and {' '.join([image] * count)} there is"
    assert second.prompt_ids.tolist() == tokenizer(expected).input_ids
    assert second.counts == (count, count) and first.counts == () and len(second.visual) == 2 * count
    assert torch.equal(second.visual[:count], first.visual)
    alone = fresh.features([replace(two[1], image=two[1].images[1], further_images=(), image_ids=(), placed=())])[0]
    assert torch.equal(second.visual[count:], alone.visual)


def test_all_tokens_of_two_images_give_the_logits_of_the_unmodified_model(fresh, two):
    (features,) = fresh.features(two[1:])
    kept = torch.arange(len(features.visual))
    ours = answer_logits(fresh, features, features.visual[None], kept[None])[0, 0]
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


def test_a_wrong_image_is_never_one_of_the_questions_own(fresh, two):
    """Questions that share an image are not used as each other's wrong image."""
    alone = replace(two[0], id=7, prompt="shape of red")
    assert "no other image" in Panel(fresh, [two[0], alone]).wrong_image().not_applicable
    a, b = two[1].images
    names = two[1].names[::-1]
    swapped = replace(two[1], id=8, image=b, further_images=(a,), image_ids=names, image_id=" + ".join(names))
    assert "no other image" in Panel(fresh, [two[1], swapped]).wrong_image().not_applicable


def _rival(name: str) -> Rival:
    return Rival(selector(name), name)


def test_base64_images_are_cached_by_content(fresh, tmp_path):
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
    """Four records; the images of the second and third cannot be decoded."""
    (pixels,) = scenes(1)
    for name in ("a", "b", "c", "d"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "c.png").write_text("no image")
    records = [{"id": f"r-{n}", "image": f"{n}.png", "conversations": said("what is it", "red")} for n in "abcd"]
    return conversation(tmp_path, *records)


def test_errors_about_broken_images_name_the_record(fresh, broken, tmp_path):
    with pytest.raises(BrokenImage, match=r"^record r-b: image .*b.png does not decode \("):
        fresh.features(broken)
    (tmp_path / "d.png").unlink()
    with pytest.raises(UserError, match=r"^record r-d: image .*d.png is missing") as caught:
        fresh.features(broken[3:])
    assert not isinstance(caught.value, BrokenImage)


def test_examples_with_broken_images_are_skipped_up_to_a_limit(fresh, broken, caplog):
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


def test_a_panel_skips_broken_images(fresh, broken):
    panel = Panel(fresh, broken)
    assert len(panel.questions) == 2 and len(panel.full().answers) == 2
    with pytest.raises(UserError, match="none of the images of the questions can be decoded"):
        Panel(fresh, broken[1:3])


def test_encoding_of_scenes_is_unchanged(fresh):
    """Support for several images does not change the features of questions about one image, to the last bit."""
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
