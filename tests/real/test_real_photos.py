"""Photo boards, the oracle and the gate's verdict, on a small set of drawn photographs."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evocomp.log import UserError
from experiments.real import photos
from experiments.real.boards import BoardSpec, draw
from experiments.real.features import _digest, scene_words, token_words
from experiments.real.gate import asked_boxes, oracle_tokens, verdict
from experiments.real.recipe import Recipe
from experiments.real.scenes import COLORS, NUMBERS, place_name


@pytest.fixture
def photo_root(tmp_path, monkeypatch):
    """The layout of Caltech-101 with 12 small photographs per class, each of a different grey level."""
    source, back = tmp_path / "101_ObjectCategories", {name: folder for folder, name in photos.RENAMED.items()}
    for name in (*photos.NAMES, *photos.BACKGROUNDS):
        folder = source / back.get(name, name.replace(" ", "_"))
        folder.mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (240, 180), (20 * number,) * 3).save(folder / f"image_{number + 1:04d}.jpg")
    monkeypatch.setenv("EVOCOMP_REAL_PHOTOS", str(tmp_path / "photos"))
    _forget()
    yield source
    _forget()


def _forget():
    photos.photo_files.cache_clear()
    photos.photo_set.cache_clear()


@pytest.fixture
def spec(photo_root):
    photos.convert(photo_root, photos.photo_folder())
    return Recipe(names="photos", size=192, side=12, cells=3, smallest=0.45, largest=0.7, most=7).spec


def test_splits_share_no_photograph(spec):
    files = {split: {f for fs in photos.photo_files(split).values() for f in fs} for split in photos.SPLITS}
    assert {split: len(found) for split, found in files.items()} == {"train": 488, "selection": 61, "test": 183}
    assert len(set.union(*files.values())) == 12 * 61


def test_conversion_makes_small_copies_and_overwrites_nothing(photo_root):
    out = photos.photo_folder()
    assert photos.convert(photo_root, out) == 12 * 61
    with Image.open(next(out.rglob("*.jpg"))) as photo:
        assert photo.size == (160, 120)
    with pytest.raises(UserError, match="exists"):
        photos.convert(photo_root, out)


def test_a_missing_class_is_named(photo_root, tmp_path):
    (photo_root / "panda").rename(photo_root / "bear")
    with pytest.raises(UserError, match="no photos of panda"):
        photos.convert(photo_root, tmp_path / "other")
    with pytest.raises(UserError, match="experiments.real.photos"):
        photos.photo_files("train")


def test_caches_of_other_photographs_and_splits_have_other_names(spec):
    names = {_digest(spec(split)) for split in photos.SPLITS}
    before = photos.photo_set()
    next(photos.photo_folder().rglob("*.jpg")).unlink()
    _forget()
    assert photos.photo_set() != before
    assert len(names | {_digest(spec("train"))}) == 4


def test_boards_are_the_same_every_time_and_differ_between_splits(spec):
    first, again, other = draw(7, 3, spec("train")), draw(7, 3, spec("train")), draw(7, 3, spec("test"))
    assert np.array_equal(first.image, again.image) and first.questions == again.questions
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("cells", [2, 3])
def test_questions_agree_with_what_was_drawn(spec, cells):
    answers, kinds = Counter(), Counter()
    for index in range(60):
        board = draw(7, index, replace(spec("test"), cells=cells, most=7 if cells == 3 else 3, fewest=2))
        called = {f"{item.text} sign" if item.is_word else item.text: item for item in board.items}
        at = {item.cell: item for item in board.items}
        places = {place_name(cell, cells): item for cell, item in at.items()}
        for kind, text, answer, about in board.questions:
            kinds[kind] += 1
            text = text.rstrip("?")
            match kind:
                case "naming":
                    assert places[text.removeprefix("what is at the ")].text == answer
                case "place":
                    assert places[answer] is called[text.removeprefix("where is the ")]
                case "yes-no":
                    assert (text.split(" ", 3)[3] in called) == (answer == "yes")
                    answers[answer] += 1
                case "count":
                    assert NUMBERS[sum(item.is_word == ("signs" in text) for item in board.items)] == answer
                case "reading":
                    item = places[text.removeprefix("what does the sign at the ").removesuffix(" say")]
                    assert item.is_word and item.text == answer
                case "color":
                    name = text.removeprefix("what color is the ").removeprefix("frame of the ")
                    assert called[name].color == answer
                case "two-hop":
                    first, second = (board.items[number] for number in about)
                    side = text.removeprefix("what is ").split(" the ")[0]
                    step = {"left of": -1, "right of": 1, "above": -cells, "below": cells}[side]
                    assert called[text.split(" the ")[1]] is first and second.text == answer
                    assert first.cell + step == second.cell and not second.is_word
                    assert "left" not in side and "right" not in side or first.cell // cells == second.cell // cells
            named = [item for item in asked_boxes(board.items, about)]
            assert len(named) == (len(about) or len(board.items))
    assert answers["yes"] == answers["no"] > 50 and min(kinds.values()) > 20


def test_frames_and_signs_stand_in_their_boxes_in_their_cells(spec):
    for index in range(20):
        board = draw(7, index, spec("train"))
        for item in board.items:
            left, top, right, bottom = item.box
            assert left // 64 + 3 * (top // 64) == item.cell == (right - 1) // 64 + 3 * ((bottom - 1) // 64)
            edge = board.image[top, left:right]
            assert (edge == COLORS[item.color]).all()


def test_plain_boards_stand_on_a_shaded_colour(photo_root):
    photos.convert(photo_root, photos.photo_folder())
    counts = {"most": 3, "fewest": 2, "fewest_signs": 0, "most_signs": 1}
    recipe = Recipe(names="photos", size=96, side=12, cells=2, smallest=0.6, largest=0.8, plain=True, **counts)
    grounds, signs = set(), Counter()
    for index in range(40):
        board = draw(7, index, recipe.spec("test"))
        free = np.ones(board.image.shape[:2], dtype=bool)
        for left, top, right, bottom in (item.box for item in board.items):
            free[top:bottom, left:right] = False
        assert np.abs(board.image[free].mean(0) - COLORS[board.color]).max() < 20
        grounds.add(board.color)
        signs[sum(item.is_word for item in board.items)] += 1
        assert 2 <= sum(not item.is_word for item in board.items) <= 3
        shown = token_words(board, scene_words(recipe.spec()), 96, 12)
        assert (shown == scene_words(recipe.spec()).index(board.color)).any()
    assert len(grounds) > 5 and set(signs) == {0, 1}


def test_emoji_scenes_keep_their_own_specification():
    assert not isinstance(Recipe().spec("test"), BoardSpec)


def test_oracle_takes_tokens_of_the_boxes_in_turn():
    """Two boxes of 2 x 2 tokens of 16 pixels on a 6 x 6 grid."""
    boxes = [(0, 0, 32, 32), (64, 64, 96, 96)]
    first, second = {0, 1, 6, 7}, {28, 29, 34, 35}
    for count in range(1, 9):
        chosen = set(oracle_tokens(boxes, 96, 6, count).tolist())
        assert len(chosen) == count and chosen <= first | second
        assert len(chosen & first) - len(chosen & second) in (0, 1)
    assert len(oracle_tokens(boxes, 96, 6, 36)) == 36
    assert oracle_tokens([(0, 0, 8, 8)], 96, 6, 1).tolist() == [0]


def test_verdict_asks_for_every_condition():
    sees = {"gap": 3.0, "accuracy": 0.8, "by_kind": {"yes-no": {"accuracy": 0.9}}}
    blind = {"accuracy": 0.3, "by_kind": {"yes-no": {"accuracy": 0.5}}}
    gains = {"64": {"gain": 0.0}, "16": {"gain": 0.1}, "8": {"gain": 0.2}}
    assert all(verdict(sees, blind, gains).values())
    worse = [
        (sees | {"gap": 0.9}, blind, gains),
        (sees | {"by_kind": {"yes-no": {"accuracy": 0.79}}}, blind, gains),
        (sees, blind | {"by_kind": {"yes-no": {"accuracy": 0.71}}}, gains),
        (sees, blind | {"accuracy": 0.61}, gains),
        (sees, blind, gains | {"16": {"gain": 0.09}}),
    ]
    for number, case in enumerate(worse):
        assert [i for i, met in enumerate(verdict(*case).values()) if not met] == [number]
