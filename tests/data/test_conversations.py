"""LLaVA's format: what is read, what is left out, and the error messages."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evocomp.data.conversations import read_conversations, write_scenes
from evocomp.data.images import as_array
from evocomp.data.scenes import scene_examples
from evocomp.log import UserError


def turns(*texts: str, first: str = "<image>\n") -> list[dict]:
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    if said:
        said[0]["value"] = first + said[0]["value"]
    return said


def picture(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png", ord(name))

    def write(records, name="data.json") -> Path:
        (tmp_path / name).write_text(records if isinstance(records, str) else json.dumps(records))
        return tmp_path

    return write


def test_every_answered_turn_is_an_example_with_its_history(folder):
    said = turns("what is it", "a cat", "what color", "black", "is it big")
    source = folder([{"id": "7", "image": "a.png", "conversations": said}])
    first, second = read_conversations(source).examples
    assert (first.prompt, first.answer, first.history) == ("what is it", "a cat", ())
    assert (second.prompt, second.answer) == ("what color", "black")
    assert second.history == (("what is it", "a cat"),)
    assert first.image == second.image == str(source / "a.png") and first.image_id == second.image_id
    assert first.id != second.id


def test_the_image_placeholder_is_removed_at_any_position(folder):
    said = turns("what is it\n<image>", "a cat", first="")
    assert read_conversations(folder([{"image": "a.png", "conversations": said}])).examples[0].prompt == "what is it"


def test_openai_roles_and_contents_are_read_too(folder):
    said = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "cat"}]
    (example,) = read_conversations(folder([{"image": "a.png", "conversations": said}])).examples
    assert (example.prompt, example.answer) == ("what", "cat")


def test_system_turns_and_empty_answers_give_no_example(folder):
    said = [{"from": "system", "value": "be brief"}, *turns("a", "", "b", "yes")]
    examples = read_conversations(folder([{"image": "a.png", "conversations": said}])).examples
    assert [(e.prompt, e.answer, e.history) for e in examples] == [("b", "yes", (("a", ""),))]


def test_text_only_records_are_left_out_and_counted(folder, caplog):
    caplog.set_level("INFO", "evocomp")
    records = [{"image": "a.png", "conversations": turns("q", "a")}]
    records += [{"id": i, "conversations": turns("q", "a", first="")} for i in range(3)]
    records += [{"id": 9, "image": "", "conversations": turns("q", "a", first="")}]
    reading = read_conversations(folder(records))
    assert len(reading.examples) == 1 and reading.text_only == 4 and reading.bad == []
    assert "4 text-only records left out" in caplog.text


def missing(folder, names: list[str]) -> list[dict]:
    """Records whose images are missing, and one good one."""
    records = [{"id": f"r-{name}", "image": f"{name}.png", "conversations": turns("q", "a")} for name in names]
    return [*records, {"id": "good", "image": "a.png", "conversations": turns("q", "a")}]


def test_missing_images_are_named_and_left_out(folder, caplog):
    """Images that cannot be decoded are tested in tests/mllm/test_reader.py."""
    reading = read_conversations(folder(missing(folder, ["gone", "lost"])), max_bad=2)
    assert [e.image_id for e in reading.examples] == ["a.png"]
    assert len(reading.bad) == 2
    for name, line in zip(["gone", "lost"], reading.bad, strict=True):
        assert line.startswith(f"record r-{name}: image ") and line.endswith("is missing") and line in caplog.text


def test_more_bad_images_than_allowed_are_fatal(folder):
    source = folder(missing(folder, ["gone", "lost", "away"]))
    assert len(read_conversations(source, max_bad=3).examples) == 1
    with pytest.raises(UserError, match=r"more than data.max_bad=2 .*record r-away.*raise data.max_bad"):
        read_conversations(source, max_bad=2)


def test_a_broken_image_of_many_records_counts_for_each(folder):
    records = [{"id": i, "image": "gone.png", "conversations": turns("q", "a")} for i in range(3)]
    with pytest.raises(UserError, match="record 2"):
        read_conversations(folder(records), max_bad=2)


def test_broken_json_names_file_and_line(folder):
    source = folder('[\n {"id": 1,\n  "image": oops}\n]')
    with pytest.raises(UserError, match=r"data.json:3: not valid JSON"):
        read_conversations(source)
    (source / "data.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="not UTF-8"):
        read_conversations(source)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"a": 1}, "must be a list of records"),
        (["text"], "record 0 has no list `conversations`"),
        ([{"image": "a.png", "conversations": "q"}], "record 0 has no list `conversations`"),
        ([{"image": "a.png", "conversations": ["q", "a"]}], "record 0 has a turn that is not"),
        ([{"image": "a.png", "conversations": turns("q")}], "no usable question about an image in 1 records"),
        ([], "no usable question"),
    ],
)
def test_files_of_another_format_are_refused(folder, records, message):
    with pytest.raises(UserError, match=message):
        read_conversations(folder(records))


def test_missing_files_and_folders_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="data.source=.*nowhere: no such file or folder"):
        read_conversations(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a folder must hold data.json"):
        read_conversations(tmp_path)
    source = folder([{"image": "a.png", "conversations": turns("q", "a")}])
    with pytest.raises(UserError, match="data.image_folder=.*pictures: no such folder"):
        read_conversations(source, tmp_path / "pictures")


def test_images_may_be_in_another_folder(folder, tmp_path):
    source = folder([{"image": "sub/x.png", "conversations": turns("q", "a")}], "train.json")
    picture(tmp_path / "pictures" / "sub" / "x.png")
    (example,) = read_conversations(source / "train.json", tmp_path / "pictures").examples
    assert Path(example.image).is_file()


# ------------------------------------------------------------ ids


def test_ids_do_not_depend_on_place_or_order(folder, tmp_path):
    records = [{"id": str(i), "image": "a.png", "conversations": turns(f"q{i}", "a", "r", "b")} for i in range(4)]
    here = {e.id for e in read_conversations(folder(records)).examples}
    assert len(here) == 8
    picture(tmp_path / "other" / "a.png")
    (tmp_path / "other" / "data.json").write_text(json.dumps(records[::-1]))
    assert {e.id for e in read_conversations(tmp_path / "other").examples} == here
    # golden: label stores on users' disks are keyed by these
    assert read_conversations(folder(records[:1])).examples[0].id == 6183972512948754557


def test_records_that_share_an_id_are_still_different_questions(folder):
    """Several records of LLaVA-1.5's mixture have the id of the same COCO image."""
    records = [{"id": "000000033471", "image": "a.png", "conversations": turns(f"q{i}", "a")} for i in range(3)]
    assert len({e.id for e in read_conversations(folder(records)).examples}) == 3


def test_a_duplicate_record_is_read_once(folder):
    record = {"id": "1", "image": "a.png", "conversations": turns("q", "a", "r", "b")}
    assert len(read_conversations(folder([record, record])).examples) == 2


# ------------------------------------------------------------ scenes written and read back


def test_scenes_come_back_as_they_were_drawn(tmp_path):
    count = write_scenes(tmp_path / "out", seed=31, count=3, relation=True)
    drawn = scene_examples(31, 0, 3, relation=True)
    read = read_conversations(tmp_path / "out").examples
    assert count == len(drawn) == len(read)
    for one, other in zip(drawn, read, strict=True):
        assert (one.prompt, one.answer, one.kind) == (other.prompt, other.answer, other.kind)
        assert np.array_equal(one.image, as_array(other.image))
    assert len({e.id for e in read}) == count and len({e.image_id for e in read}) == 3


def test_existing_data_are_not_overwritten(tmp_path):
    write_scenes(tmp_path, seed=1, count=1)
    before = (tmp_path / "data.json").read_bytes()
    with pytest.raises(UserError, match="already holds data.json; choose another folder"):
        write_scenes(tmp_path, seed=2, count=1)
    assert (tmp_path / "data.json").read_bytes() == before
    with pytest.raises(UserError, match="is a file"):
        write_scenes(tmp_path / "data.json", seed=2, count=1)
