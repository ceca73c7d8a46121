"""Photo boards: images with small framed photographs and coloured signs on a background cut from other photographs.

A board has 3 x 3 (or 2 x 2) cells. Photographs and backgrounds come from one split, so boards of different splits share
no photograph. No question asks about the classes of the backgrounds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from experiments.real.photos import BACKGROUNDS, Split, photo_files
from experiments.real.scenes import (
    COLORS,
    NUMBERS,
    Item,
    Question,
    Scene,
    SceneSpec,
    article,
    draw_scene,
    place_name,
    shaded,
)

ASKED = 4  # largest number of questions of each of the types naming, place and two-hop per board
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class BoardSpec(SceneSpec):
    """A specification of photo boards.

    `photos` is the digest of the set of photographs (`photos.photo_set`), `split` the part that is drawn from;
    `fewest` to `most` photographs and `fewest_signs` to `most_signs` signs stand on a board. `plain`: the background is
    a shaded colour, not cut from photographs.
    """

    photos: str = ""
    split: Split = "train"
    fewest: int = 3
    fewest_signs: int = 1
    most_signs: int = 2
    plain: bool = False

    @property
    def ground(self) -> tuple[str, ...]:
        return tuple(COLORS) if self.plain else ()


def draw(seed: int, index: int, spec: SceneSpec) -> Scene:
    """Scene or board `index` of `seed`."""
    return draw_board(seed, index, spec) if isinstance(spec, BoardSpec) else draw_scene(seed, index, spec)


def draw_board(seed: int, index: int, spec: BoardSpec) -> Scene:
    """Board `index` of `seed`; identical on all machines with the same version of Pillow."""
    rng = np.random.default_rng([seed, index])
    ground = str(rng.choice(spec.ground)) if spec.plain else ""
    canvas = Image.fromarray(shaded(ground, spec.size, rng) if spec.plain else _background(spec, rng))
    count = int(rng.integers(spec.fewest, spec.most + 1))
    signs = int(rng.integers(spec.fewest_signs, spec.most_signs + 1))
    cells = rng.permutation(spec.cells**2)[: count + signs]
    texts = [*rng.choice(spec.names, count, replace=False), *rng.choice(spec.words, signs, replace=False)]
    cell_size, items = spec.size / spec.cells, []
    for number, (cell, text) in enumerate(zip(cells, map(str, texts), strict=False)):
        color, is_word = str(rng.choice(list(COLORS))), number >= count
        side = cell_size * rng.uniform(spec.smallest, spec.largest)
        picture = _sign(text, color) if is_word else _photo(text, spec.split, rng)
        ratio = side / max(picture.size)
        picture = picture.resize([max(1, round(length * ratio)) for length in picture.size], Image.Resampling.BILINEAR)
        if not is_word:
            picture = _framed(picture, color)
        left = int(cell % spec.cells * cell_size + rng.uniform(0, cell_size - picture.width))
        top = int(cell // spec.cells * cell_size + rng.uniform(0, cell_size - picture.height))
        canvas.paste(picture, (left, top))
        box = (left, top, left + picture.width, top + picture.height)
        items.append(Item(text, is_word, int(cell), box, color))
    return Scene(np.asarray(canvas), tuple(items), ground, "photo", tuple(_questions(items, spec, rng)))


# ---------------------------------------------------------------- pictures


def _photo(name: str, split: Split, rng: np.random.Generator) -> Image.Image:
    """A random photograph of a class, at most 160 pixels wide and high; in training mirrored with probability 1/2."""
    files = photo_files(split)[name]
    with Image.open(files[int(rng.integers(len(files)))]) as stored:
        picture = stored.convert("RGB")
    return ImageOps.mirror(picture) if split == "train" and rng.random() < 0.5 else picture


def _framed(picture: Image.Image, color: str) -> Image.Image:
    """The photograph, shrunk to make room for a frame, with the frame around it."""
    width = max(2, round(0.06 * max(picture.size)))
    inner = picture.resize([max(1, length - 2 * width) for length in picture.size], Image.Resampling.BILINEAR)
    return ImageOps.expand(inner, width, COLORS[color])


def _sign(word: str, color: str) -> Image.Image:
    font = ImageFont.load_default(40)
    left, top, right, bottom = font.getbbox(word)
    sign = Image.new("RGB", (right - left + 24, bottom - top + 24), COLORS[color])
    ink = (0, 0, 0) if sum(COLORS[color]) > 384 else (255, 255, 255)
    ImageDraw.Draw(sign).text((12 - left, 12 - top), word, font=font, fill=ink)
    return sign


def _background(spec: BoardSpec, rng: np.random.Generator) -> np.ndarray:
    """Mean of two planes [size, size, 3], because many photographs have empty parts."""
    first, second = (_plane(spec, rng) for _ in range(2))
    return ((first.astype(np.uint16) + second) // 2).astype(np.uint8)


def _plane(spec: BoardSpec, rng: np.random.Generator) -> np.ndarray:
    """A crop [size, size, 3] of the plane that a photograph and its mirror images tile without seams."""
    picture = _photo(str(rng.choice(BACKGROUNDS)), spec.split, rng)
    ratio = spec.size * rng.uniform(0.4, 0.8) / min(picture.size)
    tile = np.asarray(picture.resize([round(length * ratio) for length in picture.size], Image.Resampling.BILINEAR))
    tile = np.concatenate([tile, tile[:, ::-1]], axis=1)
    tile = np.concatenate([tile, tile[::-1]], axis=0)
    starts = [int(rng.integers(length)) for length in tile.shape[:2]]
    rows, columns = ((np.arange(spec.size) + start) % length for start, length in zip(starts, tile.shape, strict=False))
    return tile[rows[:, None], columns]


# ---------------------------------------------------------------- questions


def _called(item: Item) -> str:
    return f"{item.text} sign" if item.is_word else item.text


def _questions(items: list[Item], spec: BoardSpec, rng: np.random.Generator) -> Iterator[Question]:
    """Questions with the indices of the items that they are about; as many answers "yes" as "no"."""
    photos = [number for number, item in enumerate(items) if not item.is_word]
    signs = [number for number, item in enumerate(items) if item.is_word]
    places = [place_name(item.cell, spec.cells) for item in items]

    def some(numbers: list[int], count: int) -> list[int]:
        return [int(number) for number in rng.permutation(numbers)[:count]]

    for number in some(photos, ASKED):
        yield Question("naming", f"what is at the {places[number]}?", items[number].text, (number,))
    for number in some(photos + signs, ASKED):
        yield Question("place", f"where is the {_called(items[number])}?", places[number], (number,))
    absent = rng.permutation([name for name in spec.names if name not in {item.text for item in items}])
    for number, other in zip(some(photos, 3), map(str, absent), strict=False):
        name = items[number].text
        yield Question("yes-no", f"is there {article(name)} {name}?", "yes", (number,))
        yield Question("yes-no", f"is there {article(other)} {other}?", "no")
    yield Question("count", "how many pictures are there?", NUMBERS[len(photos)])
    yield Question("count", "how many signs are there?", NUMBERS[len(signs)])
    for number in signs:
        yield Question("reading", f"what does the sign at the {places[number]} say?", items[number].text, (number,))
    for number in some(photos, 2) + some(signs, 1):
        item = items[number]
        text = f"what color is the {_called(item) if item.is_word else 'frame of the ' + item.text}?"
        yield Question("color", text, item.color, (number,))
    pairs = _neighbours(items, spec.cells)
    for place in rng.permutation(len(pairs))[:ASKED]:
        first, side, second = pairs[place]
        yield Question("two-hop", f"what is {side} the {_called(items[first])}?", items[second].text, (first, second))


def _neighbours(items: list[Item], cells: int) -> list[tuple[int, str, int]]:
    """(index of an item, side, index of the photograph in the adjacent cell on that side)."""
    at = {divmod(item.cell, cells): number for number, item in enumerate(items)}
    found = []
    for (row, column), first in at.items():
        for side, (down, right) in SIDES.items():
            second = at.get((row + down, column + right))
            if second is not None and not items[second].is_word:
                found.append((first, side, second))
    return found
