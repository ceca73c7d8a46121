"""Drawn scenes with known answers: an unlimited, seeded benchmark whose questions cannot be answered without the image.

A scene is a grid of coloured shapes, each with a digit at its centre, on a noisy background. Large scenes also have
signs: plates with a word of three letters, one letter per patch. Object centres fall on patch centres (to within
a pixel), so that a patch-8 vision tower of less than half a million parameters can learn to see them.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from evocomp.data.example import Example, stable_id
from evocomp.data.glyphs import dots
from evocomp.log import UserError

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
    "pink": (250, 140, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIGN = "sign"  # shape of objects with a word in place of a digit
SIGN_WORDS = tuple("ant bee box bus cat cup dog egg fox hat ice jam key map owl pen sky sun tea van".split())
# one-hop questions, and `relation`, which needs two hops and is reported separately; `read` needs signs
KINDS = ("color", "shape", "digit", "find", "exist", "count", "read", "relation")
PLACES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

_SUPERSAMPLE = 2
_DEMO = 404  # seed of the scenes of `draw_question`; the recipes use 101, 202 and 303
_INK = (15, 15, 15)


@dataclass(frozen=True)
class SceneSpec:
    """Parameters of scenes. Sizes are in pixels."""

    size: int = 96
    patch: int = 8
    grid: int = 3
    min_objects: int = 4
    max_objects: int = 8
    # maximum number of questions of each kind per scene
    color: int = 2
    shape: int = 2
    digit: int = 3
    find: int = 2
    exist: int = 2
    count: int = 2
    relation: int = 3
    # number of colours and of shapes that one scene may have
    palette: int = 6
    forms: int = 5
    min_signs: int = 0
    max_signs: int = 0
    read: int = 0

    def __str__(self) -> str:
        """Text from which ids are made. Newer fields appear only if not at their default, so older ids stay."""
        later = ("palette", "forms", "min_signs", "max_signs", "read")
        shown = [f.name for f in fields(self) if f.name not in later or getattr(self, f.name) != f.default]
        return f"SceneSpec({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def tokens_per_side(self) -> int:
        return self.size // self.patch


# by name: the scenes of the shipped nano model, and scenes of 576 patches with words to read
SPECS = {
    "small": SceneSpec(),
    "large": SceneSpec(
        size=192,
        grid=4,
        min_objects=8,
        max_objects=11,
        palette=8,
        forms=6,
        min_signs=2,
        max_signs=3,
        digit=4,
        find=3,
        exist=3,
        read=3,
    ),
}


@dataclass(frozen=True)
class SceneObject:
    """One object; `x`, `y`, `radius` in pixels, `row`, `column`: its cell. It has a digit or, if a sign, a word."""

    color: str
    shape: str
    digit: int | None
    row: int
    column: int
    x: float
    y: float
    radius: float
    word: str | None = None


@dataclass(frozen=True)
class Question:
    """A question with its answer; `target` is the index of the object that it is about, if there is one."""

    kind: str
    text: str
    answer: str
    target: int | None


@dataclass(frozen=True)
class Scene:
    """An image [size, size, 3] uint8 with its objects and questions."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    questions: tuple[Question, ...]


def draw_scene(seed: int, index: int, spec: SceneSpec = SceneSpec()) -> Scene:
    """Scene number `index` of the unlimited sequence of a seed.

    >>> scene = draw_scene(seed=1, index=0)
    >>> scene.image.shape, scene.questions[0].kind
    ((96, 96, 3), 'color')
    """
    rng = np.random.default_rng([seed, index])
    canvas, background = _background(rng, spec)
    objects = _place_objects(rng, spec)
    draw = ImageDraw.Draw(canvas)
    for thing in objects:
        _draw_object(draw, thing, rng)
    pixels = np.asarray(canvas.resize((spec.size, spec.size), Image.Resampling.BOX)).astype(np.int16)
    pixels = pixels + rng.integers(-12, 13, (spec.size, spec.size, 1))
    return Scene(np.clip(pixels, 0, 255).astype(np.uint8), objects, tuple(_ask(rng, objects, spec)))


def scene_examples(
    seed: int, start: int, count: int, spec: SceneSpec = SceneSpec(), relation: bool = False
) -> list[Example]:
    """All questions of `count` scenes, starting with scene `start`; `relation` questions only if requested."""
    examples = []
    for index in range(start, start + count):
        scene = draw_scene(seed, index, spec)
        name = f"scene-{seed}-{index:06d}"
        for number, question in enumerate(scene.questions):
            if question.kind == "relation" and not relation:
                continue
            examples.append(
                Example(
                    id=stable_id("scene", seed, index, number, spec),
                    image=scene.image,
                    image_id=name,
                    prompt=question.text,
                    answer=question.answer,
                    kind=question.kind,
                    extra={} if question.target is None else {"target": question.target},
                )
            )
    return examples


class DrawnQuestion(NamedTuple):
    """A drawn scene and one question about it."""

    image: Image.Image
    question: str
    answer: str


def draw_question(number: int = 0, kind: str | None = None) -> DrawnQuestion:
    """A scene with a question and its answer, for trying a model. No recipe trains or tests on these scenes.

    Args:
        number: index of the scene.
        kind: one of `KINDS` except "read"; None: the first question of the scene.

    Raises:
        UserError: a negative number, or the scene has no question of this kind.

    >>> draw_question(2).image.size
    (96, 96)
    """
    if number < 0:
        raise UserError(f"number={number}: scenes are numbered from 0")
    scene = draw_scene(_DEMO, number)
    asked = [question for question in scene.questions if kind in (None, question.kind)]
    if not asked:
        kinds = ", ".join(sorted({question.kind for question in scene.questions}))
        raise UserError(f"scene {number} has no question of kind {kind!r}; it has {kinds}")
    return DrawnQuestion(Image.fromarray(scene.image), asked[0].text, asked[0].answer)


def _background(rng: np.random.Generator, spec: SceneSpec) -> tuple[Image.Image, np.ndarray]:
    side = spec.size * _SUPERSAMPLE
    tone = rng.integers(60, 200, 3)
    blotches = np.clip(rng.integers(-25, 26, (6, 6, 3)) + tone, 0, 255).astype(np.uint8)
    canvas = Image.fromarray(blotches).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(3, 8)):
        x, y = rng.integers(0, side, 2)
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.5) * side
        shade = tuple(int(value) for value in np.clip(tone + rng.integers(-60, 61, 3), 0, 255))
        end = (x + length * np.cos(angle), y + length * np.sin(angle))
        draw.line((int(x), int(y), *end), fill=shade, width=int(rng.integers(1, 4)))
    return canvas, tone


def _place_objects(rng: np.random.Generator, spec: SceneSpec) -> tuple[SceneObject, ...]:
    count = int(rng.integers(spec.min_objects, spec.max_objects + 1))
    signs = int(rng.integers(spec.min_signs, spec.max_signs + 1)) if spec.max_signs else 0
    cells = rng.permutation(spec.grid**2)[: count + signs]
    palette = rng.permutation(list(COLORS))[: spec.palette]
    shapes = rng.permutation(list(SHAPES))[: spec.forms]
    words = rng.permutation(SIGN_WORDS)[:signs] if signs else ()
    patches = spec.size // spec.grid // spec.patch  # patches per side of a cell
    taken: set[tuple[str, str]] = set()
    objects = []
    for number, cell in enumerate(cells):
        sign = number >= count
        while True:
            color = str(palette[rng.integers(spec.palette)])
            pair = (color, SIGN if sign else str(shapes[rng.integers(spec.forms)]))
            if pair not in taken:
                break
        taken.add(pair)
        row, column = divmod(int(cell), spec.grid)
        radius = rng.uniform(1.0, 1.4) * spec.patch
        # only inner patches of the cell, so that neighbours never touch; one pixel of jitter
        px = column * patches + int(rng.integers(1, patches - 1))
        py = row * patches + int(rng.integers(1, patches - 1))
        jitter = spec.patch / 8
        x = (px + 0.5) * spec.patch + rng.uniform(-jitter, jitter)
        y = (py + 0.5) * spec.patch + rng.uniform(-jitter, jitter)
        if sign:
            radius, mark = 1.5 * spec.patch, (None, str(words[number - count]))  # half the length of its plate
        else:
            mark = (int(rng.integers(10)), None)
        objects.append(SceneObject(*pair, mark[0], row, column, x, y, radius, mark[1]))
    return tuple(objects)


def _draw_object(draw: ImageDraw.ImageDraw, thing: SceneObject, rng: np.random.Generator) -> None:
    x, y, r = thing.x * _SUPERSAMPLE, thing.y * _SUPERSAMPLE, thing.radius * _SUPERSAMPLE
    fill = tuple(int(np.clip(v + rng.integers(-22, 23), 0, 255)) for v in COLORS[thing.color])
    match thing.shape:
        case "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        case "square":
            draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
        case "triangle":
            angles = np.arange(3) * 2 * np.pi / 3 - np.pi / 2
            corners = [(x + 1.15 * r * np.cos(a), y + r * 0.15 + 1.15 * r * np.sin(a)) for a in angles]
            draw.polygon(corners, fill=fill)
        case "diamond":
            draw.polygon([(x, y - 1.1 * r), (x + 0.8 * r, y), (x, y + 1.1 * r), (x - 0.8 * r, y)], fill=fill)
        case "cross":
            w = 0.42 * r
            draw.rectangle((x - r, y - w, x + r, y + w), fill=fill)
            draw.rectangle((x - w, y - r, x + w, y + r), fill=fill)
        case "ring":
            w = 0.72 * r
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            draw.ellipse((x - w, y - w, x + w, y + w), fill=(235, 235, 235))
        case "sign":
            draw.rectangle((x - r, y - 0.46 * r, x + r, y + 0.46 * r), fill=fill)
    if thing.word is None:
        _draw_glyph(draw, str(thing.digit), x, y + (0.12 * r if thing.shape == "triangle" else 0.0))
    else:
        for index, letter in enumerate(thing.word):
            _draw_glyph(draw, letter, x + 2 * r * (index - 1) / 3, y)  # one letter per patch


def _draw_glyph(draw: ImageDraw.ImageDraw, glyph: str, x: float, y: float) -> None:
    dot = _SUPERSAMPLE  # one pixel of the final image; neighbouring dots overlap slightly, which makes the glyph bold
    left, top = round(x - 2.5 * dot), round(y - 3.5 * dot)
    for i, j in dots(glyph):
        draw.rectangle((left + i * dot, top + j * dot, left + (i + 1) * dot, top + (j + 1) * dot - 1), fill=_INK)


def _ask(rng: np.random.Generator, objects: tuple[SceneObject, ...], spec: SceneSpec) -> list[Question]:
    number = {id(thing): i for i, thing in enumerate(objects)}
    by_color = _grouped(objects, "color")
    by_shape = _grouped(objects, "shape")
    by_digit = _grouped([thing for thing in objects if thing.word is None], "digit")
    signs = [thing for thing in objects if thing.word is not None]

    def pick(items, count):
        items = list(items)
        return [items[i] for i in rng.permutation(len(items))[:count]]

    questions = []
    for thing in pick([v[0] for v in by_shape.values() if len(v) == 1], spec.color):
        questions.append(Question("color", f"color of {thing.shape}", thing.color, number[id(thing)]))
    for thing in pick([v[0] for v in by_color.values() if len(v) == 1], spec.shape):
        questions.append(Question("shape", f"shape of {thing.color}", thing.shape, number[id(thing)]))
    for thing in pick([thing for thing in objects if thing.word is None], spec.digit):
        text = f"digit on {thing.color} {thing.shape}"
        questions.append(Question("digit", text, str(thing.digit), number[id(thing)]))
    for thing in pick([v[0] for v in by_digit.values() if len(v) == 1] + signs, spec.find):
        what = ("color", "shape")[rng.integers(2)] if thing.word is None else "color"
        text = f"{what} with {thing.word or thing.digit}"
        questions.append(Question("find", text, getattr(thing, what), number[id(thing)]))
    if signs:
        for thing in pick(signs, spec.read):
            questions.append(Question("read", f"word on {thing.color} {SIGN}", thing.word, number[id(thing)]))
    for _ in range(spec.exist):
        questions.extend(_ask_existence(rng, objects, number))
    for _ in range(spec.count):
        questions.append(_ask_count(rng, by_color, by_shape))
    for place, thing, neighbour in pick(_neighbours(objects), spec.relation):
        what = ("color", "shape")[rng.integers(2)] if neighbour.word is None else "word"
        text = f"{what} {place} {thing.color} {thing.shape}"
        questions.append(Question("relation", text, getattr(neighbour, what), number[id(neighbour)]))
    return questions


def _grouped(objects, attribute: str) -> dict:
    groups: dict = {}
    for thing in objects:
        groups.setdefault(getattr(thing, attribute), []).append(thing)
    return groups


def _ask_existence(rng, objects, number) -> list[Question]:
    if rng.random() < 0.5:
        thing = objects[rng.integers(len(objects))]
        return [Question("exist", f"any {thing.color} {thing.shape}", "yes", number[id(thing)])]
    present = {(thing.color, thing.shape) for thing in objects}
    for _ in range(20):
        # hard negatives: four of five colours and shapes occur in the scene, but not together
        color = objects[rng.integers(len(objects))].color if rng.random() < 0.8 else list(COLORS)[rng.integers(8)]
        shape = objects[rng.integers(len(objects))].shape if rng.random() < 0.8 else SHAPES[rng.integers(6)]
        if (color, shape) not in present:
            return [Question("exist", f"any {color} {shape}", "no", None)]
    return []


def _ask_count(rng, by_color: dict, by_shape: dict) -> Question:
    wanted = int(rng.integers(0, 5))
    counts = [(word, len(by_color.get(word, []))) for word in COLORS]
    counts += [(word, len(by_shape.get(word, []))) for word in SHAPES]
    fitting = [item for item in counts if item[1] == wanted] or [item for item in counts if item[1] > 0]
    word, count = fitting[rng.integers(len(fitting))]
    return Question("count", f"how many {word}", str(count), None)


def _neighbours(objects) -> list[tuple[str, SceneObject, SceneObject]]:
    cells = {(thing.row, thing.column): thing for thing in objects}
    found = []
    for thing in objects:
        for place, (down, right) in PLACES.items():
            other = cells.get((thing.row + down, thing.column + right))
            if other is not None:
                found.append((place, thing, other))
    return found
