"""LLaVA-format files with records that no tool writes: each is refused, or left out with its name."""

import json

import pytest
from one_line import refused
from PIL import Image

from evocomp.data.conversations import read_conversations
from evocomp.data.json_records import read_json

GOOD = {
    "id": "7",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}],
}
ODD = [
    None,
    3,
    3.5,
    True,
    "",
    "x" * 5000,
    "\ud800",
    "\0",
    [],
    [[]],
    [None],
    {},
    {"a": [1]},
    "../../etc/passwd",
    "/dev/zero",
]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def read(folder, content: str):
    (folder / "data.json").write_text(content, errors="surrogatepass")
    return read_conversations(folder, max_bad=0)


def changed(**values) -> str:
    return json.dumps([{**GOOD, **values}])


def turns(*said) -> list[dict]:
    return [{"from": speaker, "value": text} for speaker, text in said]


@pytest.mark.parametrize("value", ODD[1:] + ["a.png\n", "http://x/a.png", "file:///no/a.png", "data:image/png,xx"])
def test_image_names(folder, value):
    if value in ("", []):
        pytest.skip("no image: a record of text only, see below")
    refused(lambda: read(folder, changed(image=value)))


@pytest.mark.parametrize("value", ODD)
def test_conversations(folder, value):
    refused(lambda: read(folder, changed(conversations=value)))


@pytest.mark.parametrize("value", ODD)
def test_turns(folder, value):
    refused(lambda: read(folder, changed(conversations=[value, *GOOD["conversations"]])))


@pytest.mark.parametrize("value", [*ODD[:4], *ODD[4:]])
def test_speakers(folder, value):
    refused(lambda: read(folder, changed(conversations=turns((value, "<image> what"), ("gpt", "red")))))


@pytest.mark.parametrize(
    "value", [None, True, "", "\ud800", [None], {"a": [1]}, [[]], ["<image>"], "<image>", "<|im_end|>"]
)
def test_answers(folder, value):
    refused(lambda: read(folder, changed(conversations=turns(("human", "<image>\nwhat"), ("gpt", value)))))


@pytest.mark.parametrize(
    "value", [None, True, "\ud800 <image>", [None], {"a": [1]}, [[]], "<image><image>", "<video>", "<image> <|x|>"]
)
def test_questions(folder, value):
    refused(lambda: read(folder, changed(conversations=turns(("human", value), ("gpt", "red")))))


@pytest.mark.parametrize("value", ODD)
def test_ids_and_types_are_only_names(folder, value):
    """Any value is taken, and what comes of it is text that can be written."""
    for key in ("id", "kind"):
        example = read(folder, changed(**{key: value})).examples[0]
        assert 0 <= example.id < 2**63
        example.record.encode(errors="strict")
        assert "\n" not in example.record and len(example.record) <= 100


FILES = [
    "", " ", "null", "3", '"text"', "[]", "{}", "[1]", "[null]", "[[]]", "[{}]", "{", "[{", '{"a": 1}{', "[" * 100_000,
    '{"a":' * 100_000, "9" * 5000, f"[{'9' * 5000}]", "[NaN]", "\0", '[{"conversations": 3}]', '[{"messages": [3]}]',
    '{"conversations": []}\n{', "nul", "[1,]", "{'a': 1}", '["\\ud800"]', "<html>", "\x1b[31m",
]  # fmt: skip


@pytest.mark.parametrize("content", FILES)
def test_files(folder, content):
    refused(lambda: read(folder, content))


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, "", "{", "nul", "\0", '{"a":' * 100_000])
def test_other_json(folder, content):
    (folder / "x.json").write_text(content)
    refused(lambda: read_json(folder / "x.json"))


@pytest.mark.parametrize("content", [b"\xff", b"\x80\x04\x95", "[]".encode("utf-16"), b"PK\x03\x04"])
def test_bytes(folder, content):
    (folder / "data.json").write_bytes(content)
    refused(lambda: read_conversations(folder))


def test_a_text_that_fits_no_model_is_named_before_it_is_tokenized(nano, folder):
    record = changed(conversations=turns(("human", "<image>\nwhat"), ("gpt", "red " * 200_000)))
    example = read(folder, record).examples[0]
    refused(lambda: nano.features([example]), "record 7: its text has 8")
    refused(lambda: nano.check_text(example), "record 7")


def test_a_prompt_that_is_longer_than_the_positions_is_named(nano, folder):
    record = changed(conversations=turns(("human", "<image>\n" + "what " * 3000), ("gpt", "red")))
    example = read(folder, record).examples[0]
    message = refused(lambda: nano.features([example]), "record 7: prompt and answer take ")
    assert "2048 tokens" in message and "data.max_tokens" in message
