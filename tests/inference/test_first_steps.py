"""First steps without training: the shipped model, a drawn scene, a selector by name."""

import socket

import pytest
import torch

import evocomp
from evocomp.cli import main
from evocomp.data.scenes import KINDS, draw_question, draw_scene
from evocomp.inference.card import card
from evocomp.inference.names import SHIPPED
from evocomp.log import UserError
from evocomp.selection import SELECTORS

SNIPPET = """
import evocomp

model, processor = evocomp.load_nano()
image, question, answer = evocomp.draw_question(0)
message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")
with evocomp.compress(model, "divprune", keep=16, context=0.25) as handle:
    output = model.generate(**inputs)
print(processor.decode(output[0], skip_special_tokens=True))
print(handle.last.before, "->", handle.last.after, "visual tokens; the answer is", answer)
"""


def test_the_snippet_prints_the_answer(capsys, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    exec(SNIPPET, {})
    assert capsys.readouterr().out.splitlines() == [
        "color of diamond orange",
        "[144] -> [16] visual tokens; the answer is orange",
    ]


def test_shipped_models_load_in_one_line():
    for name, pixels in (("nano", 96), ("nano576", 192)):
        model, processor = evocomp.load_nano(name)
        assert model.config.vision_config.image_size == pixels
        assert processor.tokenizer.decode([3], skip_special_tokens=True) == ""
    with pytest.raises(UserError, match="'micro' is not a shipped model; use one of nano, nano576"):
        evocomp.load_nano("micro")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_compressors_are_small_and_have_their_card(name):
    if not SHIPPED[name].is_dir():
        pytest.skip("its weights are not in the source tree yet")
    assert (SHIPPED[name] / "README.md").read_text().startswith("---")
    assert sum(path.stat().st_size for path in SHIPPED[name].iterdir()) < 2**20
    model, processor = evocomp.load_nano()
    with evocomp.compress(model, name, keep=16) as handle, torch.no_grad():
        model(**processor(images=draw_question(1).image, text="<image> how many red", return_tensors="pt"))
    assert handle.last.after == [16]


def test_the_snippet_of_a_model_card_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    draw_question(0).image.save("image.png")
    model, _ = evocomp.load_nano()
    evocomp.EvoCompCompressor.from_mllm(model, base_model_name_or_path="nano", keep=1.0).save_pretrained("mine")
    text = card(evocomp.EvoCompConfig.from_pretrained("mine"))
    code = text.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", "mine")
    exec(code.replace("the question", draw_question(0).question), {})
    assert capsys.readouterr().out.splitlines() == ["color of diamond orange", "[144] -> [144] visual tokens"]


def test_drawn_questions_are_of_their_scene_and_kind():
    for number in range(3):
        drawn, scene = draw_question(number), draw_scene(404, number)
        assert (drawn.question, drawn.answer) == (scene.questions[0].text, scene.questions[0].answer)
        assert drawn.image.size == (96, 96) and drawn.image.tobytes() == scene.image.tobytes()
    assert draw_question(0, "count").question.startswith("how many ")
    with pytest.raises(UserError, match="scene 0 has no question of kind 'read'; it has .*count"):
        draw_question(0, "read")
    with pytest.raises(UserError, match="numbered from 0"):
        draw_question(-1)
    assert "read" in KINDS


# ------------------------------------------------------------ on the command line


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Arguments of `evocomp generate` for a drawn image."""
    monkeypatch.chdir(tmp_path)
    drawn = draw_question(0)
    drawn.image.save("a.png")
    return ["generate", "--model", "nano", "--image", "a.png", "--prompt", drawn.question, "--keep", "16"]


@pytest.mark.parametrize("name", ["divprune", "visionzip", "fastv"])
def test_generate_takes_selectors_by_name(asked, capsys, tmp_path, name):
    assert main([*asked, "--compressor", name, "--save", "kept.png"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("orange\n") and "144 -> 16 visual tokens" in shown
    assert (tmp_path / "kept.png").is_file()


def test_generate_lists_the_names_before_it_loads_anything(asked, capsys, monkeypatch):
    monkeypatch.setattr("evocomp.mllm.hf.FrozenMLLM.load", lambda *_: pytest.fail("the model was loaded"))
    assert main([*asked, "--compressor", "divprun"]) == 2
    shown = capsys.readouterr().err
    assert "did you mean 'divprune'?" in shown and all(name in shown for name in SELECTORS)
    assert "Traceback" not in shown and len(shown.strip().splitlines()) == 1


def test_generate_names_what_a_model_lacks(asked, capsys):
    assert main([*asked, "--compressor", "cdpruner"]) == 2
    assert "cdpruner needs CLIP's text tower" in capsys.readouterr().err
