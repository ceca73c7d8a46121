"""Splits have no image in common, and are the same in every process."""

import json
from dataclasses import replace

import pytest

from evocomp.config.schema import DataConfig
from evocomp.data.conversations import write_scenes
from evocomp.data.example import Example
from evocomp.data.splits import digest, drawn, load_splits
from evocomp.data.splits import test_questions as questions_of_the_test
from evocomp.log import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(out, seed=71, count=24)
    return out


def pictures(examples) -> set[str]:
    return {e.image_id for e in examples}


def ids(examples) -> list[int]:
    return [e.id for e in examples]


def assert_apart(splits) -> None:
    assert pictures(splits.train).isdisjoint(pictures(splits.val))
    assert pictures(splits.train).isdisjoint(pictures(splits.test))
    assert pictures(splits.val).isdisjoint(pictures(splits.test))
    everything = [e.id for e in (*splits.train, *splits.val, *splits.test)]
    assert len(set(everything)) == len(everything)


def test_drawn_splits_have_their_sizes_and_no_common_image():
    splits = load_splits(DataConfig(max_samples=50, val_samples=30, test_samples=40))
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [50, 30, 40]
    assert_apart(splits)


def test_images_of_a_folder_are_held_out_for_test_and_validation(folder):
    splits = load_splits(DataConfig(source=str(folder), max_samples=0, val_samples=10, test_samples=30))
    assert_apart(splits)
    assert 0 < len(splits.val) <= 10 and 0 < len(splits.test) <= 30
    assert len(pictures(splits.test)) <= 24 // 4 and len(pictures(splits.val)) <= 24 // 8
    left = load_splits(DataConfig(source=str(folder), max_samples=7, val_samples=10, test_samples=30))
    assert ids(left.train) == ids(splits.train)[:7] and ids(left.test) == ids(splits.test)


def test_what_is_held_out_depends_on_names_not_on_order(folder, tmp_path):
    records = json.loads((folder / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(records[::-1]))
    settings = dict(max_samples=0, val_samples=1000, test_samples=1000)
    one = load_splits(DataConfig(source=str(folder), **settings))
    other = load_splits(DataConfig(source=str(tmp_path), image_folder=str(folder), **settings))
    assert pictures(one.test) == pictures(other.test) and pictures(one.val) == pictures(other.val)
    assert_apart(one)
    # golden: must not change between versions, otherwise test images of one run could be training images of another
    assert pictures(one.test) == {f"images/scene-71-0000{n:02}.png" for n in (2, 3, 7, 10, 16, 19)}


def test_separate_files_for_the_splits(folder, tmp_path):
    write_scenes(tmp_path / "test", seed=72, count=3)
    settings = dict(max_samples=0, val_samples=0, test_samples=20, test_source=str(tmp_path / "test"))
    splits = load_splits(DataConfig(source=str(folder), **settings))
    assert len(splits.test) == 20 and splits.val == [] and len(pictures(splits.train)) == 24
    source = str(tmp_path / "test")
    drawn_train = load_splits(DataConfig(max_samples=5, val_samples=0, test_samples=20, test_source=source))
    assert [e.prompt for e in drawn_train.test] == [e.prompt for e in splits.test]


def test_one_image_cannot_be_split(tmp_path):
    write_scenes(tmp_path, seed=73, count=1)
    splits = load_splits(DataConfig(source=str(tmp_path), max_samples=0, val_samples=5, test_samples=5))
    assert splits.test == [] and splits.val == [] and len(pictures(splits.train)) == 1


def test_questions_per_image_are_limited_and_of_all_kinds():
    few = drawn(DataConfig(), 5, 200, per_image=4)
    counts = [sum(e.image_id == name for e in few) for name in pictures(few)]
    assert max(counts) == 4 and len(counts) == 50
    assert {e.kind for e in few} == {e.kind for e in drawn(DataConfig(), 5, 200)}


def test_other_test_questions():
    data = DataConfig(test_samples=20)
    assert ids(questions_of_the_test(data)) == ids(load_splits(data).test)
    assert len(questions_of_the_test(data, questions=35)) == 35
    fresh = questions_of_the_test(data, seed=9001)
    assert len(fresh) == 20 and pictures(fresh).isdisjoint(pictures(load_splits(data).test))
    assert ids(questions_of_the_test(data, questions=10)) == ids(load_splits(data).test)[:10]


def test_files_have_no_seed(folder):
    with pytest.raises(UserError, match="tested on questions from files"):
        questions_of_the_test(DataConfig(source=str(folder)), seed=1)


def test_the_digest_depends_on_the_questions():
    examples = drawn(DataConfig(), 5, 6)
    assert digest(examples) == digest(drawn(DataConfig(), 5, 6))
    changed = [
        examples[:5],
        examples[::-1],
        drawn(DataConfig(), 6, 6),
        [replace(examples[0], answer="else"), *examples[1:]],
        [replace(examples[0], prompt="else"), *examples[1:]],
        [replace(examples[0], history=(("q", "a"),)), *examples[1:]],
    ]
    assert len({digest(examples), *map(digest, changed)}) == 7


def test_the_digest_depends_on_image_sizes(tmp_path):
    digests = []
    for number, content in enumerate((b"one", b"another", b"one", None)):
        path = tmp_path / str(number) / "x.png"
        path.parent.mkdir()
        if content:
            path.write_bytes(content)
        digests.append(digest([Example(1, str(path), "x.png", "what", "red")]))
    assert digests[0] == digests[2] and len(set(digests)) == 3


def test_the_digest_depends_on_every_image_and_its_position(tmp_path):
    for name, content in (("a", b"one"), ("b", b"another"), ("c", b"the third")):
        (tmp_path / name).write_bytes(content)
    one = Example(1, str(tmp_path / "a"), "a + b", "what", "red", further_images=(str(tmp_path / "b"),))
    others = [replace(one, further_images=(str(tmp_path / "c"),)), replace(one, placed=((0, 0), (0, 2)))]
    assert len({digest([example]) for example in (one, *others)}) == 3


def test_types_left_out_are_not_trained_on(folder):
    for source in ({}, {"source": str(folder)}):
        data = DataConfig(max_samples=60, val_samples=30, test_samples=40, **source)
        whole, some = load_splits(data), load_splits(replace(data, leave_out=("find", "count")))
        assert ids(some.train) == [e.id for e in whole.train if e.kind not in ("find", "count")]
        assert 0 < len(some.train) < len(whole.train)
        assert (ids(some.val), ids(some.test)) == (ids(whole.val), ids(whole.test))
        assert {"find", "count"} <= {e.kind for e in some.test}


def test_types_left_out_exist_and_leave_something():
    with pytest.raises(UserError, match="of type relations; types: .*relation"):
        load_splits(DataConfig(max_samples=60, relation=True, leave_out=("relations",)))
    kinds = tuple({e.kind for e in load_splits(DataConfig(max_samples=60)).train})
    with pytest.raises(UserError, match="no training question is left"):
        load_splits(DataConfig(max_samples=60, leave_out=kinds))
