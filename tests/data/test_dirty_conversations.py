"""Irregular LLaVA files: each variant is read as intended or refused with a clear message."""

import base64
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from evocomp.config.schema import DataConfig
from evocomp.data.conversations import read_conversations
from evocomp.data.images import as_array
from evocomp.data.splits import digest, load_splits
from evocomp.log import UserError

ASKED = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "a cat"}]


def said(*texts, speakers=("human", "gpt")) -> list[dict]:
    return [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["a.png", "b.png", "sub/c.png", "with space.png", "ä.png"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * number + 10, np.uint8)).save(path)
    return tmp_path


def write(folder, records, name="data.json"):
    (folder / name).write_text(json.dumps(records))
    return folder / name


def read(folder, record, **settings):
    """The examples of one record, in a file with another valid record."""
    good = {"id": "good", "image": "a.png", "conversations": said("good?", "yes")}
    reading = read_conversations(write(folder, [record, good]), **settings)
    assert reading.examples[-1].prompt == "good?"
    return reading.examples[:-1], reading


def fault(folder, record) -> str:
    """The warning about the only record, which is left out."""
    examples, reading = read(folder, {"id": "r7", **record})
    assert examples == [] and len(reading.bad) == 1 and reading.text_only == 0, (examples, reading)
    assert reading.bad[0].startswith("record r7: ") and "\n" not in reading.bad[0]
    for wrong in ("text-only", "is missing"):
        assert wrong not in reading.bad[0]
    return reading.bad[0]


# ------------------------------------------------------------ the file


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "data.jsonl"])
def test_json_lines_and_byte_order_marks(folder, name, start, end):
    records = [{"id": i, "image": "a.png", "conversations": said(f"q{i} \u2028 x", "a")} for i in range(3)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (folder / name).write_bytes((start + end.join(lines) + end + end).encode())
    reading = read_conversations(folder / name)
    assert [e.prompt for e in reading.examples] == [f"q{i} \u2028 x" for i in range(3)]
    (folder / "list.json").write_bytes((start + json.dumps(records)).encode())
    assert [e.id for e in read_conversations(folder / "list.json").examples] == [e.id for e in reading.examples]
    if name == "data.jsonl":
        assert len(read_conversations(folder).examples) == 3


def test_one_record_and_mistakes_in_json_lines(folder):
    record = {"image": "a.png", "conversations": ASKED}
    for name in ("one.jsonl", "one.json"):
        write(folder, record, name)
        assert len(read_conversations(folder / name).examples) == 1
    (folder / "one.json").write_text(json.dumps(record, indent=1))
    assert len(read_conversations(folder / "one.json").examples) == 1
    (folder / "x.jsonl").write_text(json.dumps(record) + "\n" + "{broken\n")
    with pytest.raises(UserError, match=r"x.jsonl:2: not valid JSON .*one record per line"):
        read_conversations(folder / "x.jsonl")
    (folder / "deep.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="deep.json"):
        read_conversations(folder / "deep.json")
    (folder / "digits.json").write_text(f'[{{"id": {"9" * 5000}}}]')
    with pytest.raises(UserError, match="not valid JSON"):
        read_conversations(folder / "digits.json")


# ------------------------------------------------------------ valid variants


@pytest.mark.parametrize(
    "speakers",
    [("Human", "GPT"), (" human ", "gpt"), ("USER", "Assistant"), ("user", "model"), ("human", "chatgpt")],
)
def test_other_names_of_roles(folder, speakers):
    (example,), _ = read(folder, {"image": "a.png", "conversations": said("<image>\nwhat", "cat", speakers=speakers)})
    assert (example.prompt, example.answer) == ("what", "cat")


CAT = ("what is it", "a cat")


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a.png", "conversations": ASKED},
        {"image": ["a.png"], "conversations": ASKED},
        {"images": ["a.png"], "conversations": ASKED},
        {"images": "a.png", "conversations": ASKED},
        {"image": "a.png", "images": ["a.png"], "conversations": ASKED},
        {"image": None, "images": ["a.png"], "video": None, "conversations": ASKED},
        {"image": {"path": "a.png", "bytes": None}, "conversations": ASKED},
        {"image": "a.png", "conversations": said("what is it\n<image>", "a cat")},
        {"image": "a.png", "conversations": said("<image> what is it ", " a cat\n")},
        {"image": "a.png", "conversations": said("<image-placeholder>\nwhat is it", "a cat")},
        {"image": "a.png", "conversations": said("<Image>\nwhat is it", "a cat")},
        {"image": "a.png", "conversations": said("<im_start><image><im_end>\nwhat is it", "a cat")},
        {"image": "a.png", "conversations": said("what is it", "a cat")},
        {
            "image": "a.png",
            "messages": [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a cat"}],
        },
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "what is it"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
            ]
        },
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": [{"type": "image"}, {"type": "text", "text": "what is it"}]},
                {"from": "gpt", "value": {"type": "text", "text": "a cat"}},
            ],
        },
    ],
)
def test_all_notations_of_one_image(folder, record):
    (example,), reading = read(folder, record)
    assert (example.prompt, example.answer, example.history, example.placed) == (*CAT, (), ())
    assert example.images == (str(folder / "a.png"),) and example.image_id == "a.png" and reading.bad == []


@pytest.mark.parametrize(
    "name", ["sub/c.png", "./sub/c.png", "sub/../a.png", "with space.png", "ä.png", "sub\\c.png", "file", "absolute"]
)
def test_names_of_files(folder, name):
    name = {"file": (folder / "with space.png").as_uri(), "absolute": str(folder / "a.png")}.get(name, name)
    (example,), _ = read(folder, {"image": name, "conversations": ASKED})
    assert as_array(example.image).shape == (8, 8, 3) and example.image_id == name


@pytest.mark.parametrize("form", ["data:image/png;base64,{}", "{}"])
def test_base64_is_an_image(folder, form):
    text = form.format(base64.b64encode((folder / "b.png").read_bytes()).decode())
    (example,), _ = read(folder, {"image": text, "conversations": ASKED})
    assert np.array_equal(as_array(example.image), as_array(str(folder / "b.png")))
    assert len(example.image_id) < 40
    content = [{"type": "image_url", "image_url": {"url": text}}, {"type": "text", "text": "what"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "cat"}]
    (example,), _ = read(folder, {"messages": turns})
    assert np.array_equal(as_array(example.image), as_array(str(folder / "b.png")))


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (2.5, "2.5"), (0, "0")])
def test_numbers_as_answers(folder, value, text):
    (example,), _ = read(folder, {"id": 7, "image": "a.png", "conversations": said("how many", value)})
    assert example.answer == text


def test_a_null_answer_is_no_answer(folder, caplog):
    caplog.set_level("INFO", "evocomp")
    turns = said("q", None, "r", "b")
    (example,), reading = read(folder, {"id": "r7", "image": "a.png", "kind": None, "conversations": turns})
    assert (example.prompt, example.answer, example.history, example.kind) == ("r", "b", (("q", ""),), "")
    assert reading.left_out == {"no answer": ["record r7"]} and "no answer), first in record r7" in caplog.text
    examples, reading = read(folder, {"id": "r7", "image": "a.png", "conversations": said(None, "a")})
    assert examples == [] and reading.left_out == {"the question is null": ["record r7"]}


def test_an_answer_before_the_first_question_is_skipped_as_in_llava(folder):
    turns = [{"from": "gpt", "value": "hello"}, *ASKED]
    (example,), reading = read(folder, {"id": "r7", "image": "a.png", "conversations": turns})
    assert (example.prompt, example.answer, example.history) == (*CAT, ())
    assert reading.left_out == {"an answer before the first question": ["record r7"]}


def test_system_turns_are_left_to_the_model_and_counted(folder):
    turns = [{"from": "system", "value": None}, *ASKED]
    (example,), reading = read(folder, {"id": "r7", "image": "a.png", "conversations": turns})
    assert (example.prompt, example.history) == (CAT[0], ()) and reading.left_out == {"a system turn": ["record r7"]}


def test_an_image_that_comes_in_a_later_turn(folder):
    turns = said("hello", "hi", "<image>\nwhat is it", "a cat", "what color", "black")
    (second, third), reading = read(folder, {"id": "r7", "image": "a.png", "conversations": turns})
    assert (second.prompt, second.answer, second.history) == (*CAT, (("hello", "hi"),))
    assert second.placed == third.placed == ((1, 0),) and third.history[1] == CAT
    assert reading.left_out == {"before the first image": ["record r7"]}


# ------------------------------------------------------------ several images


def test_several_images_are_placed_at_their_placeholders(folder):
    turns = said("<image>\nFirst <image> then, differ?", "yes", "and <image>?", "no")
    record = {"id": 1, "image": ["a.png", "b.png", "sub/c.png"], "conversations": turns}
    (one, two), _ = read(folder, record)
    assert one.prompt == "First  then, differ?" and one.images == tuple(str(folder / n) for n in ("a.png", "b.png"))
    assert one.placed == ((0, 0), (0, 6)) and one.names == ("a.png", "b.png") and one.image_id == "a.png + b.png"
    assert two.placed == ((0, 0), (0, 6), (1, 4)) and two.names == ("a.png", "b.png", "sub/c.png")


def test_several_images_without_placeholders_come_first(folder):
    (example,), _ = read(folder, {"image": ["a.png", "b.png"], "conversations": said("differ?", "yes")})
    assert len(example.images) == 2 and example.placed == ()


def test_images_named_in_the_turns(folder):
    content = [
        {"type": "text", "text": "Is"},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "or"},
        {"type": "image", "path": "b.png"},
        {"type": "text", "text": "red?"},
    ]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]
    (example,), _ = read(folder, {"messages": turns})
    assert example.prompt == "Isorred?" and example.placed == ((0, 2), (0, 4)) and example.names == ("a.png", "b.png")


def test_images_of_one_question_are_in_one_split(folder):
    names = ["a.png", "b.png", "sub/c.png", "ä.png"]
    records = [{"id": i, "image": n, "conversations": said("q", "a")} for i, n in enumerate(names)]
    records += [{"id": "both", "image": ["a.png", "b.png"], "conversations": said("q", "a")}]
    splits = load_splits(DataConfig(source=str(write(folder, records)), max_samples=0, val_samples=9, test_samples=9))
    parts = [{name for e in part for name in e.names} for part in (splits.train, splits.val, splits.test)]
    assert all(parts) and sum(map(len, parts)) == 4
    assert digest(splits.train) == digest(splits.train)


# ------------------------------------------------------------ faults


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"image": "a.png", "conversations": said("<image>\n<image>\nq", "a")}, "2 image placeholders .* for 1 image$"),
        ({"image": "a.png", "conversations": said("<image>\nq", "a", "<image>\nr", "b")}, "2 image placeholders"),
        ({"image": ["a.png", "b.png"], "conversations": said("<image>\nq", "a")}, "1 image placeholder .* 2 images"),
        ({"conversations": ASKED}, "names no image"),
        ({"image": "", "conversations": ASKED}, "names no image"),
        ({"image": [], "conversations": ASKED}, "names no image"),
        ({"image": None, "conversations": said("<image-placeholder> q", "a")}, "names no image"),
        ({"image": [["a.png"]], "conversations": ASKED}, "nested list of images"),
        ({"image": ["a.png", None], "conversations": ASKED}, "without a name"),
        ({"image": 7, "conversations": ASKED}, "by int; give a string"),
        ({"image": True, "conversations": ASKED}, "by bool"),
        ({"image": "a.png", "images": ["b.png"], "conversations": ASKED}, "both `image` and `images`"),
        ({"image": "sub", "conversations": ASKED}, "is a folder"),
        ({"image": "http://host.example/a.png", "conversations": ASKED}, "is a URL; download it"),
        ({"image": "https://host.example/a.png", "conversations": ASKED}, "is a URL"),
        ({"image": "s3://bucket/a.png", "conversations": ASKED}, "is a URL"),
        ({"image": "data:image/svg+xml,%3Csvg", "conversations": ASKED}, "not base64"),
        ({"video": "a.mp4", "conversations": said("<video>\nq", "a")}, "has `videos?`, which is not supported"),
        ({"videos": ["a.mp4"], "conversations": said("q", "a")}, "has `videos?`, which is not supported"),
        ({"video": "a.mp4", "image": "a.png", "conversations": ASKED}, "has `videos?`, which is not supported"),
        ({"audio": "a.wav", "conversations": said("q", "a")}, "has `audio`"),
        ({"image": "a.png", "conversations": said("<video>\nq", "a")}, "placeholder for video"),
        ({"conversations": said("<video>\nq", "a")}, "placeholder for video"),
        ({"image": "a.png", "conversations": said("q", "a", "r", "b <image>")}, "turn 4 has an image placeholder"),
        ({"image": "a.png", "conversations": said("<|im_start|>user\nq", "a")}, r"token <\|im_start\|>"),
        ({"image": "a.png", "conversations": said("q", "a<|im_end|>")}, r"the answer of turn 2 .*<\|im_end\|>"),
        ({"image": "a.png", "conversations": said("<im_start>\nq", "a")}, "token <im_start>"),
        ({"image": "a.png", "conversations": said("<im_patch> q", "a")}, "token <im_patch>"),
        ({"image": "a.png", "conversations": said("<|image_pad|> q", "a")}, "token"),
        ({"image": "a.png", "conversations": said("<image 1> q", "a")}, "token <image 1>"),
        ({"image": "a.png", "conversations": said("<image_placeholder> q", "a")}, "token <image_placeholder>"),
        ({"image": "a.png", "conversations": [*ASKED, ASKED[1]]}, r"two answers in a row \(turns 2 and 3\)"),
        ({"image": "a.png", "conversations": [ASKED[0], *ASKED]}, r"two questions in a row \(turns 1 and 2\)"),
        ({"image": "a.png", "conversations": [{"from": "tool", "value": "x"}, *ASKED]}, "turn 1 has the role 'tool'"),
        ({"image": "a.png", "conversations": [{"from": ["human"], "value": "x"}, *ASKED]}, "turn 1 has the role"),
        ({"image": "a.png", "conversations": [{"value": "x"}, *ASKED]}, "turn 1 has the role none"),
        ({"image": "a.png", "conversations": said("q", True)}, "turn 2 is True, not text"),
        ({"image": "a.png", "conversations": said("q", float("nan"))}, "turn 2 is nan, not text"),
        ({"image": "a.png", "conversations": said("q", ["a", ["b"]])}, "turn 2 has"),
        ({"image": "a.png", "conversations": said("q", [{"type": "video", "video": "x"}])}, "part of type 'video'"),
        ({"image": "a.png", "conversations": said("q", {"a": 1})}, "turn 2 has a part of type"),
        ({"image": "a.png", "conversations": said("q", "\ud800")}, "surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, ASKED[1]]}, "part of type"),
    ],
)
def test_faulty_records_are_reported(folder, record, what):
    assert re.search(what, fault(folder, record)), fault(folder, record)


@pytest.mark.parametrize("name", ["gone.png", "nowhere/a.png", "x" * 5000, "a\0b", "sub/c.png/d.png"])
def test_missing_images(folder, name):
    _, reading = read(folder, {"id": "r7", "image": name, "conversations": ASKED})
    assert len(reading.bad) == 1 and reading.bad[0].endswith("is missing") and len(reading.bad[0]) < 300


def test_text_only_records_may_say_anything(folder):
    turns = said("image of <video> in HTML?", "<image> <|x|>", "r", "b", "s")
    for nothing in (None, "", [], float("nan")):
        assert read(folder, {"image": nothing, "conversations": said("q", "a")})[1].text_only == 1
    for text in (said("image", "a"), [{"from": "tool", "value": "q"}], said("q", None), turns[1:]):
        examples, reading = read(folder, {"conversations": text})
        assert examples == [] and reading.text_only == 1 and reading.bad == []


def test_faults_count_with_missing_images(folder):
    records = [{"id": 1, "video": "x", "conversations": ASKED}, {"id": 2, "image": "no.png", "conversations": ASKED}]
    records += [{"id": 3, "image": "a.png", "conversations": ASKED}]
    assert len(read_conversations(write(folder, records), max_bad=2).bad) == 2
    with pytest.raises(UserError, match=r"more than data.max_bad=1 .*last: record 2: image .*no.png is missing"):
        read_conversations(write(folder, records), max_bad=1)


def test_names_of_records_stay_on_one_line(folder):
    _, reading = read(folder, {"id": "x\ny" * 100, "video": "x", "conversations": ASKED})
    assert "\n" not in reading.bad[0] and len(reading.bad[0]) < 200


# ------------------------------------------------------------ no image is opened


def test_nothing_is_opened_and_each_folder_is_listed_once(folder, monkeypatch):
    records = [{"id": i, "image": "sub/c.png", "conversations": said(f"q{i}", "a")} for i in range(20_000)]
    source = write(folder, records)
    (folder / "sub" / "c.png").write_bytes(b"no image")

    def refuse(*_, **__):
        raise AssertionError("opened at start")

    monkeypatch.setattr(Image, "open", refuse)
    started = time.process_time()
    assert len(read_conversations(source).examples) == 20_000
    assert time.process_time() - started < 10
