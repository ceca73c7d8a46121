"""Scenes of named pictures and rendered words with questions about them.

A scene is a grid of 2 x 2 (or 3 x 3) cells on a coloured, shaded background. A cell contains a picture in one of three
styles, a word, or nothing. Pictures: Fluent Emoji 3D (npm `@lobehub/fluent-emoji-3d`, MIT); names:
`unicode-emoji-json` (MIT). Both are read from the two archives that `npm pack` writes to $EVOCOMP_REAL_PICTURES.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from evocomp.data.example import Example, stable_id
from evocomp.log import UserError

# few enough to learn them in an hour of one CPU core; the last names have two words
NAMES = tuple(
    "fox,cat,lion,tiger,horse,zebra,cow,pig,elephant,panda,penguin,owl,frog,turtle,snake,whale,crab,octopus,"
    "butterfly,spider,sunflower,rose,cactus,mushroom,grapes,watermelon,lemon,banana,pineapple,strawberry,tomato,"
    "carrot,broccoli,bread,hamburger,pizza,egg,cookie,teapot,house,castle,train,bus,bicycle,airplane,rocket,"
    "umbrella,snowman,balloon,trophy,crown,bell,guitar,soccer ball,teddy bear,hot dog,fire engine,alarm clock,"
    "birthday cake,police car".split(",")
)
WORDS = tuple("open,exit,stop,sale,cafe,hotel,school,bank,news,push,free,museum".split(","))
COLORS = {
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "gray": (128, 128, 128),
    "red": (190, 40, 40),
    "green": (40, 140, 60),
    "blue": (40, 80, 190),
    "yellow": (235, 210, 60),
    "pink": (240, 160, 190),
}
STYLES = ("color", "gray", "flat")
KINDS = ("naming", "place", "count", "yes-no", "reading", "color", "two-hop")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "center", "right")}
T = TypeVar("T")
_WORDLESS = ("People & Body", "Flags", "Symbols", "Smileys & Emotion")


class Item(NamedTuple):
    """Content of a cell: `text` is the name of a picture or a sign's word; `box` in pixels (left, top, right, bottom).

    `color` is the colour of a photograph's frame or of a sign; used only on photo boards.
    """

    text: str
    is_word: bool
    cell: int
    box: tuple[int, int, int, int]
    color: str = ""


class Question(NamedTuple):
    """`about`: indices of the items that are needed for the answer; only on photo boards."""

    kind: str
    text: str
    answer: str
    about: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scene:
    """`image` [size, size, 3] uint8, its items and questions; `color`: colour of the background, "" if it has none."""

    image: np.ndarray
    items: tuple[Item, ...]
    color: str
    style: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class SceneSpec:
    """Size in pixels, cells per side (2 or 3), names of the pictures, range of a picture's share of its cell's side."""

    size: int = 224
    cells: int = 2
    names: tuple[str, ...] = NAMES
    most: int = 4
    words: tuple[str, ...] = WORDS
    smallest: float = 0.78
    largest: float = 0.98

    @property
    def ground(self) -> tuple[str, ...]:
        """Words for tokens of the background."""
        return tuple(COLORS)


# ---------------------------------------------------------------- pictures


def pictures_folder() -> Path:
    return Path(os.environ.get("EVOCOMP_REAL_PICTURES", Path.home() / ".cache" / "evocomp" / "real"))


def pictures_installed() -> bool:
    """Whether both archives exist."""
    names = ("lobehub-fluent-emoji-3d", "unicode-emoji-json")
    return all(any(pictures_folder().glob(f"{name}-*.tgz")) for name in names)


def _archive(name: str) -> Path:
    found = sorted(pictures_folder().glob(f"{name}-*.tgz"))
    if not found:
        raise UserError(
            f"no {name}-*.tgz in {pictures_folder()}; run `npm pack @lobehub/fluent-emoji-3d@1.1.0 "
            "unicode-emoji-json@0.9.0` there, or set EVOCOMP_REAL_PICTURES to its folder"
        )
    return found[-1]


@cache
def _files() -> dict[str, bytes]:
    """Group and file of each picture by name, without skin tones."""
    with tarfile.open(_archive("unicode-emoji-json")) as archive:
        table = json.load(archive.extractfile("package/data-by-emoji.json"))
    with tarfile.open(_archive("lobehub-fluent-emoji-3d")) as archive:
        stored = {
            Path(member.name).stem: archive.extractfile(member).read()
            for member in archive
            if member.name.endswith(".webp")
        }
    files = {}
    for emoji, row in table.items():
        codes = "-".join(f"{ord(letter):04x}" for letter in emoji)
        for stem in (codes, codes.replace("-fe0f", ""), codes + "-fe0f"):
            if stem in stored:
                files.setdefault(row["name"], (row["group"], stored[stem]))
    return files


def all_names() -> tuple[str, ...]:
    """Names of all pictures of objects: no people, faces, flags or symbols."""
    return tuple(name for name, (group, _) in _files().items() if group not in _WORDLESS)


@cache
def sprite(name: str) -> Image.Image:
    """A picture cropped to its visible part: RGBA, at most 160 pixels wide and high."""
    picture = Image.open(io.BytesIO(_files()[name][1])).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    picture.thumbnail((160, 160), Image.Resampling.LANCZOS)
    return picture


def _styled(picture: Image.Image, style: str) -> Image.Image:
    if style == "color":
        return picture
    alpha, plain = picture.getchannel("A"), picture.convert("RGB")
    plain = ImageOps.grayscale(plain).convert("RGB") if style == "gray" else ImageOps.posterize(plain, 2)
    plain.putalpha(alpha)
    return plain


def _word_sprite(word: str, rng: np.random.Generator) -> Image.Image:
    font = ImageFont.load_default(40)
    left, top, right, bottom = font.getbbox(word)
    sign = Image.new("RGBA", (right - left + 24, bottom - top + 20), (250, 250, 250, 255))
    ink = tuple(int(v) for v in rng.integers(0, 90, 3))
    ImageDraw.Draw(sign).text((12 - left, 10 - top), word, font=font, fill=(*ink, 255))
    return sign


# ---------------------------------------------------------------- scenes


def shaded(color: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A shaded plane of the colour with noise: never quite even."""
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    slope = rng.uniform(-30, 30, 2)
    plane = slope[0] * y + slope[1] * x
    noise = rng.normal(0, 6, (size, size))
    return np.clip(np.array(COLORS[color]) + (plane + noise)[..., None], 0, 255).astype(np.uint8)


def draw_scene(seed: int, index: int, spec: SceneSpec = SceneSpec()) -> Scene:
    """Scene `index` of `seed`; identical on all machines with the same version of Pillow."""
    rng = np.random.default_rng([seed, index])
    color, style = str(rng.choice(list(COLORS))), str(rng.choice(STYLES))
    canvas = Image.fromarray(shaded(color, spec.size, rng))
    count = int(rng.integers(1, spec.most + 1))
    has_word = rng.random() < 0.4 and count < spec.cells**2
    cells = rng.permutation(spec.cells**2)[: count + has_word]
    texts = [str(name) for name in rng.choice(spec.names, count, replace=False)]
    texts += [str(rng.choice(spec.words))] if has_word else []
    cell_size, items = spec.size / spec.cells, []
    for number, (cell, text) in enumerate(zip(cells, texts, strict=True)):
        is_word = number >= count
        picture = _word_sprite(text, rng) if is_word else _styled(sprite(text), style)
        picture = picture.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR, expand=True)
        side = cell_size * rng.uniform(spec.smallest, spec.largest)
        ratio = side / max(picture.size)
        wide, high = (max(1, int(length * ratio)) for length in picture.size)
        picture = picture.resize((wide, high), Image.Resampling.BILINEAR)
        left = int(cell % spec.cells * cell_size + rng.uniform(0, cell_size - wide))
        top = int(cell // spec.cells * cell_size + rng.uniform(0, cell_size - high))
        canvas.paste(picture, (left, top), picture)
        items.append(Item(text, is_word, int(cell), (left, top, left + wide, top + high)))
    questions = tuple(_questions(items, color, spec, rng))
    return Scene(np.asarray(canvas), tuple(items), color, style, questions)


def place_name(cell: int, cells: int) -> str:
    """ "top left", "bottom right", ..."""
    return f"{ROWS[cells][cell // cells]} {COLUMNS[cells][cell % cells]}"


def article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _questions(items: list[Item], color: str, spec: SceneSpec, rng: np.random.Generator) -> Iterator[Question]:
    shown = [item for item in items if not item.is_word]
    absent = [str(name) for name in rng.permutation([n for n in spec.names if n not in {i.text for i in shown}])]
    for item in shown:
        place = place_name(item.cell, spec.cells)
        yield Question("naming", f"what is at the {place}?", item.text)
        yield Question("place", f"where is the {item.text}?", place)
    for item, other in list(zip(shown, absent, strict=False))[:2]:  # as many answers "yes" as "no"
        yield Question("yes-no", f"is there {article(item.text)} {item.text}?", "yes")
        yield Question("yes-no", f"is there {article(other)} {other}?", "no")
    yield Question("count", "how many pictures are there?", NUMBERS[len(shown)])
    for item in items:
        if item.is_word:
            yield Question("reading", "what does the sign say?", item.text)
    yield Question("color", "what color is the background?", color)


def scene_examples(seed: int, start: int, stop: int, spec: SceneSpec = SceneSpec()) -> Iterator[Example]:
    """All questions of the scenes as `Example`s."""
    for index in range(start, stop):
        scene = draw_scene(seed, index, spec)
        image_id = f"{seed}-{index}"
        for number, question in enumerate(scene.questions):
            yield Example(
                id=stable_id("real", seed, index, number),
                image=scene.image,
                image_id=image_id,
                prompt=question.text,
                answer=question.answer,
                kind=question.kind,
            )


def in_processes(work: Callable[[int, int], T], count: int, chunk: int, processes: int) -> Iterator[T]:
    """Results of work(start, stop) for chunks of 0..count, in order, computed by `processes` others; 0 = in this one.

    `work` must be picklable. The processes are spawned, because CUDA does not work in forked ones.
    """
    parts = [(start, min(count, start + chunk)) for start in range(0, count, chunk)]
    if processes == 0:
        yield from (work(*part) for part in parts)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, *zip(*parts, strict=True))
