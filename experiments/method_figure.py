"""Draw notebooks/method.png: labels and training in both recipes, and inference.

python -m experiments.method_figure notebooks/method.png
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from evocomp.data.scenes import Scene, draw_scene
from evocomp.viz.style import ACCENT, COLORS, INK, PAPER, SOFT, new_figure, save_png
from evocomp.viz.tokens import borders, patch_of_pixel, wash_groups

_WIDE, _HIGH = 120.0, 87.0  # size of the canvas in tenths of an inch
_WARM, _COOL, _GREY = "#fdf4ec", "#eef5fb", "#f4f5f8"
_PATCH, _SIDE = 8, 12
_BLUE = COLORS[0]


@dataclass(frozen=True)
class _Example:
    """One scene with masks, losses and scores for illustration; they are computed from the scene, not by a model."""

    image: np.ndarray
    question: str
    answer: str
    groups: np.ndarray
    random: list[np.ndarray]
    proposed: list[np.ndarray]
    candidates: list[np.ndarray]
    credits: np.ndarray
    scores: np.ndarray


def method_figure(seed: int = 11, index: int = 231, kept: int = 16, context: int = 5) -> Figure:
    """The figure, 12 x 8.7 inches, with scene `index` of `seed`; of the `kept` tokens, `context` are context tokens."""
    example = _example(draw_scene(seed, index))
    figure = new_figure(_WIDE / 10, _HIGH / 10)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, _WIDE)
    ax.set_ylim(0, _HIGH)
    ax.set_axis_off()
    _lane(ax, (1, 29, 78, 57), _WARM, "Training, recipe plus")
    _lane(ax, (81, 29, 38, 57), _GREY, "Published search")
    _lane(ax, (1, 1, 118, 26.5), _COOL, "Inference")
    _credits(ax, example)
    _on_policy(ax, example)
    _published(ax, example)
    _inference(ax, example, kept, context)
    return figure


def _example(scene: Scene) -> _Example:
    rng = np.random.default_rng(3)
    question = next(q for q in scene.questions if q.kind == "digit")
    y, x = ((np.indices((_SIDE, _SIDE)) + 0.5) * _PATCH).reshape(2, -1)
    reach = np.stack([np.hypot(x - thing.x, y - thing.y) / thing.radius for thing in scene.objects])
    tone = scene.image.reshape(_SIDE, _PATCH, _SIDE, _PATCH, 3).mean((1, 3)).reshape(-1, 3)
    background = len(scene.objects) + (tone[:, 0] > np.median(tone[:, 0]))
    groups = np.where(reach.min(0) < 1.05, reach.argmin(0), background)
    asked = np.array([2.2 if i == question.target else 1.0 for i in range(len(scene.objects))])
    scores = (asked[:, None] * np.exp(-0.9 * reach**2)).max(0) + 0.04 * rng.random(_SIDE**2)
    random = [rng.permutation(_SIDE**2)[:12] for _ in range(3)]
    likely = scores**1.5 / (scores**1.5).sum()
    proposed = [rng.choice(_SIDE**2, 12, replace=False, p=likely) for _ in range(3)]
    one_of_each = [np.array([rng.choice(np.flatnonzero(groups == g)) for g in np.unique(groups)]) for _ in range(2)]
    centres = [int(row.argmin()) for row in reach]
    rest = [rng.choice(np.flatnonzero(groups == g)) for g in sorted(set(background.tolist()))]
    return _Example(
        image=scene.image,
        question=question.text,
        answer=question.answer,
        groups=groups,
        random=random,
        proposed=proposed,
        candidates=[*one_of_each, np.array(centres + rest)],
        credits=scores + 0.35 * rng.random(_SIDE**2),
        scores=scores,
    )


def _credits(ax: Axes, example: _Example) -> None:
    """Upper row of `plus`: random masks -> answer losses -> credit of each token."""
    middle = 70.8
    _picture(ax, example.image, 4, middle - 6, 12, np.arange(_SIDE**2))
    _under(ax, 10, middle - 6.8, "image:\nN visual tokens")
    _masks(ax, example.image, example.random, 22, middle)
    _under(ax, 25, middle - 10.6, "random masks")
    _mllm(ax, 33, middle)
    _losses(ax, (8.0, 4.0, 10.0), 52, middle, best=None)
    _under(ax, 57.5, middle - 10.6, "answer losses")
    _picture(ax, _heat(example.image, example.credits), 64.5, middle - 6, 12)
    _under(ax, 70.5, middle - 6.8, "credit of each\ntoken")
    for start, stop in ((16.8, 21.2), (62, 64)):
        _arrow(ax, (start, middle), (stop, middle))


def _on_policy(ax: Axes, example: _Example) -> None:
    """Lower row of `plus`, from right to left: the compressor, the masks that it proposes, their losses, the update."""
    middle = 43.6
    _arrow(ax, (70.5, 59.6), (70.5, 51.4), color=_BLUE)
    ax.text(71.7, 55.8, "1", va="center", fontsize=13, weight="bold", color=_BLUE)
    ax.text(69, 55.8, "listwise loss", ha="right", va="center", fontsize=12, color=_BLUE)
    _box(ax, 62, middle - 7, 16, 14, "Compressor", None, "one decoder layer,\nbidirectional,\n+ linear head")
    _masks(ax, example.image, example.proposed, 49, middle)
    _under(ax, 52, middle - 10.4, "proposed masks")
    _mllm(ax, 31, middle, leftward=True)
    _losses(ax, (6.0, 2.5, 8.5), 15, middle, best=1)
    _under(ax, 20, middle - 10.4, "answer losses")
    _arrow(ax, (61.6, middle), (56, middle), color=ACCENT)
    ax.text(6, 55.8, "2", va="center", fontsize=13, weight="bold", color=ACCENT)
    ax.text(8, 55.8, "on-policy rounds: policy loss", va="center", fontsize=12, color=ACCENT)
    ax.plot([13, 6.8, 6.8, 75, 75], [middle, middle, 30.2, 30.2, 31.5], color=ACCENT, lw=1.8, solid_joinstyle="round")
    _arrow(ax, (75, 30.2), (75, 36.1), color=ACCENT)


def _published(ax: Axes, example: _Example) -> None:
    """Labels of the published recipe: the best mask of an evolutionary search over groups of tokens."""
    middle = 67.4
    _picture(ax, wash_groups(example.image, example.groups, (_SIDE, _SIDE)), 83, middle - 5.5, 11, example.groups)
    _under(ax, 88.5, middle - 6.3, "groups: tokens\nnearest to the\nsame word")
    _arrow(ax, (94.6, middle), (97.6, middle))
    _masks(ax, example.image, example.candidates, 98.4, middle)
    _under(ax, 101.4, middle - 10.6, "candidates")
    _losses(ax, (6.5, 9.0, 1.6), 109, middle, best=2, start=105)
    _under(ax, 112.5, middle - 10.6, "answer\nlosses")
    _arrow(ax, (113, middle + 8.6), (102, middle + 9.9), bend=0.2, color=INK)
    ax.text(117.5, 79.6, "select, cross over, mutate", ha="right", va="center", fontsize=11, color=INK)
    _picture(ax, _faded(example.image, example.candidates[-1]), 87, 36, 11, _lit(example.candidates[-1]), INK)
    _arrow(ax, (101.4, 53.8), (97, 48))
    ax.text(100, 43.6, "label: the best\nmask", va="center", fontsize=12, color=INK)
    _arrow(ax, (86.4, 42), (78.6, 42), color=_BLUE, dashed=True)
    ax.text(87, 33.6, "GHM-C + cosine separation loss", va="center", fontsize=11.5, color=_BLUE)


def _inference(ax: Axes, example: _Example, kept: int, context: int) -> None:
    middle = 13
    _picture(ax, example.image, 4, middle - 4.5, 12, np.arange(_SIDE**2))
    _chip(ax, 11.6, middle - 7.8, f"{example.question}?")
    ax.plot([20, 31.5], [middle - 7.8, middle - 7.8], color=INK, linewidth=1.8)
    _arrow(ax, (31.5, middle - 7.9), (31.5, middle - 4.8))
    _box(ax, 23, middle - 4.5, 17, 12, "Compressor", None, "\nruns once per image\nand question")
    _picture(ax, _heat(example.image, example.scores), 46, middle - 4.5, 12)
    _under(ax, 52, middle - 5.3, "a score for\neach token")
    order = np.argsort(-example.scores)
    selected = order[: kept - context]
    others = order[kept - context :]
    merged = others[np.linspace(0, len(others) - 1, context + 2).astype(int)[1:-1]]
    pixels = _faded(example.image, selected)
    _picture(ax, pixels, 65, middle - 4.5, 12, _lit(selected), INK)
    lines = borders(_lit(merged).reshape(_SIDE, _SIDE), (12, 12)) * (1, -1) + (65, middle + 7.5)
    ax.add_collection(LineCollection(lines, colors=_BLUE, linewidths=1.8, zorder=5))
    _under(ax, 71, middle - 5.3, f"R = {kept}: {kept - context} top scores")
    _under(ax, 72, middle - 7.6, f"+ {context} context tokens")
    ax.add_patch(Rectangle((61.9, middle - 9.4), 1.1, 1.1, fc="none", ec=_BLUE, lw=1.8))
    _box(ax, 89, middle - 4.5, 13, 12, "frozen\nMLLM", "\u2744")
    _chip(ax, 112, middle + 1.5, f"{example.answer}", size=17)
    _under(ax, 112, middle - 1.7, "answer")
    for start, stop in ((16.8, 22.3), (40.6, 45.3), (58.8, 64.3), (77.8, 88.3), (102.6, 108.5)):
        _arrow(ax, (start, middle + 1.5), (stop, middle + 1.5))


def _masks(ax: Axes, image: np.ndarray, masks: Sequence[np.ndarray], x: float, middle: float) -> None:
    """Three masks in a column."""
    for i, mask in enumerate(masks):
        _picture(ax, _faded(image, mask), x, middle + 3.6 - 6.7 * i, 6, _lit(mask), INK, 0.7)


def _mllm(ax: Axes, x: float, middle: float, leftward: bool = False) -> None:
    """The frozen MLLM between three masks and their losses."""
    _box(ax, x, middle - 9.6, 13, 19.2, "frozen\nMLLM", "\u2744", "kept tokens\n+ question")
    for i in range(3):
        y = middle + 6.6 - 6.7 * i
        outer, inner = (x + 17.4, x + 13.7) if leftward else (x - 4.4, x - 0.7)
        _arrow(ax, (outer, y), (inner, y))
        outer, inner = (x - 0.7, x - 4.4) if leftward else (x + 13.7, x + 18)
        _arrow(ax, (outer, y), (inner, y))


def _losses(
    ax: Axes, values: Sequence[float], x: float, middle: float, best: int | None, start: float | None = None
) -> None:
    """A bar for the loss of each of three masks; with `start`, arrows from there to the bars."""
    for i, value in enumerate(values):
        y = middle + 6.6 - 6.7 * i
        color = ACCENT if i == best else "#c3c8d4"
        ax.add_patch(Rectangle((x, y - 1.2), value, 2.4, color=color, linewidth=0, zorder=3))
        if start is not None:
            _arrow(ax, (start, y), (x - 0.7, y))


def _lane(ax: Axes, box: tuple[float, float, float, float], color: str, title: str) -> None:
    left, bottom, width, height = box
    style = "round,pad=0,rounding_size=1.6"
    ax.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=style, color=color, linewidth=0))
    ax.text(left + 2.4, bottom + height - 2.7, title, va="center", fontsize=15, weight="bold", color=INK)


def _picture(ax: Axes, pixels, x: float, y: float, side: float, cells=None, color=PAPER, line: float = 1.0) -> None:
    """An image with lines between tokens whose `cells` [N] differ."""
    # most of the file size comes from the noise of the scene: steps of sixteen are nearly invisible and halve it
    pixels = np.minimum(255, (pixels.astype(int) + 8) // 16 * 16).astype(np.uint8)
    ax.imshow(pixels, extent=(x, x + side, y, y + side), interpolation="nearest", aspect="auto", zorder=3)
    if cells is not None:
        lines = borders(cells.reshape(_SIDE, _SIDE), (side, side)) * (1, -1) + (x, y + side)
        ax.add_collection(LineCollection(lines, colors=color, linewidths=line, zorder=4))


def _faded(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The image with all but the kept tokens faded to near white: uint8."""
    lit = _lit(kept)[patch_of_pixel(image.shape, (_SIDE, _SIDE))][:, :, None].astype(bool)
    return np.where(lit, image, np.rint(0.22 * image + 0.78 * 246).astype(np.uint8))


def _lit(kept: Sequence[int]) -> np.ndarray:
    cells = np.zeros(_SIDE**2, dtype=int)
    cells[kept] = 1
    return cells


def _heat(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The image in grey, tinted by the value of each token: uint8."""
    share = np.clip(values / values.max(), 0, 1) ** 0.7
    wash = 255 * colormaps["YlOrRd"](share)[:, :3][patch_of_pixel(image.shape, (_SIDE, _SIDE))]
    grey = image.mean(axis=2, keepdims=True)
    return np.rint(0.3 * grey + 0.7 * wash).astype(np.uint8)


def _box(ax: Axes, x: float, y: float, wide: float, high: float, name: str, sign=None, rest: str = "") -> None:
    style = "round,pad=0,rounding_size=1.2"
    color = COLORS[0] if sign else ACCENT
    ax.add_patch(FancyBboxPatch((x, y), wide, high, boxstyle=style, fc=PAPER, ec=color, lw=1.8, zorder=3))
    centre, lift = y + high / 2, -1.4 if sign else 2.6
    if sign:
        ax.text(x + wide / 2, centre + 3.6, sign, ha="center", va="center", fontsize=20, color=color, zorder=4)
    ax.text(x + wide / 2, centre + lift, name, ha="center", va="center", fontsize=14, weight="bold", zorder=4)
    ax.text(
        x + wide / 2,
        centre - (6.6 if sign else 2.6),
        rest,
        ha="center",
        va="center",
        fontsize=11,
        color=SOFT,
        zorder=4,
    )


def _chip(ax: Axes, x: float, y: float, text: str, size: float = 12) -> None:
    frame = {"boxstyle": "round,pad=0.4", "fc": PAPER, "ec": SOFT, "lw": 1.2}
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=INK, bbox=frame, zorder=5)


def _under(ax: Axes, x: float, y: float, text: str) -> None:
    ax.text(x, y, text, ha="center", va="top", fontsize=12, color=INK, linespacing=1.15)


def _arrow(ax: Axes, start, stop, color: str = INK, bend: float = 0.0, dashed: bool = False) -> None:
    style = {"arrowstyle": "-|>,head_length=6,head_width=3.4", "shrinkA": 0, "shrinkB": 0, "lw": 1.8}
    ax.add_patch(
        FancyArrowPatch(
            start,
            stop,
            connectionstyle=f"arc3,rad={bend}",
            color=color,
            zorder=2,
            linestyle=(0, (3, 2)) if dashed else "-",
            **style,
        )
    )


def write(path: str | Path) -> Path:
    """Save the figure as a PNG with 256 colours, which are enough and reduce its size to a third."""
    path = save_png(method_figure(), path)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


if __name__ == "__main__":
    write(sys.argv[1])
