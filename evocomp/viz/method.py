"""The method in one picture: above how labels are found, below what runs when a question comes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from evocomp.data.scenes import Scene, draw_scene
from evocomp.viz.style import ACCENT, COLORS, INK, PAPER, SOFT, new_figure
from evocomp.viz.tokens import borders, patch_of_pixel, wash_groups

_WIDE, _HIGH = 120.0, 73.0  # the canvas, in units of a tenth of an inch
_WARM, _COOL = "#fdf4ec", "#eef5fb"
_PATCH, _SIDE = 8, 12


@dataclass(frozen=True)
class _Story:
    """One scene and what a search and a compressor could make of it; read off the scene, not off a model."""

    image: np.ndarray
    question: str
    answer: str
    groups: np.ndarray
    masks: list[np.ndarray]
    scores: np.ndarray

    @property
    def label(self) -> np.ndarray:
        return self.masks[-1]


def method_figure(seed: int = 11, index: int = 231, kept: int = 16) -> Figure:
    """The method's schematic, 12 x 7.3 inches, on scene `index` of the endless sequence `seed`.

    Groups, masks, losses and scores are illustrations made from what the scene is known to hold.
    """
    story = _tell(draw_scene(seed, index))
    figure = new_figure(_WIDE / 10, _HIGH / 10)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, _WIDE)
    ax.set_ylim(0, _HIGH)
    ax.set_axis_off()
    _labels_lane(ax, story)
    _compressor_lane(ax, story, kept)
    _links(ax)
    return figure


def _tell(scene: Scene) -> _Story:
    rng = np.random.default_rng(3)
    question = next(q for q in scene.questions if q.kind == "digit")
    y, x = ((np.indices((_SIDE, _SIDE)) + 0.5) * _PATCH).reshape(2, -1)
    reach = np.stack([np.hypot(x - thing.x, y - thing.y) / thing.radius for thing in scene.objects])
    tone = scene.image.reshape(_SIDE, _PATCH, _SIDE, _PATCH, 3).mean((1, 3)).reshape(-1, 3)
    background = len(scene.objects) + (tone[:, 0] > np.median(tone[:, 0]))
    groups = np.where(reach.min(0) < 1.05, reach.argmin(0), background)
    masks = [np.array([rng.choice(np.flatnonzero(groups == g)) for g in np.unique(groups)]) for _ in range(2)]
    centres = [int(row.argmin()) for row in reach]
    masks.append(np.array(centres + [rng.choice(np.flatnonzero(groups == g)) for g in set(background.tolist())]))
    asked = np.array([2.2 if i == question.target else 1.0 for i in range(len(scene.objects))])
    scores = (asked[:, None] * np.exp(-0.9 * reach**2)).max(0) + 0.04 * rng.random(_SIDE**2)
    return _Story(scene.image, question.text, question.answer, groups, masks, scores)


def _labels_lane(ax: Axes, story: _Story) -> None:
    _lane(ax, 39, 33, _WARM, "Labels", "searched with the frozen MLLM")
    middle = 54.0
    _picture(ax, story.image, 4, middle - 7.5, 15, np.arange(_SIDE**2))
    _under(ax, 11.5, middle - 8.5, "picture:\nN visual tokens")
    _picture(ax, wash_groups(story.image, story.groups, (_SIDE, _SIDE)), 26, middle - 7.5, 15, story.groups)
    _under(ax, 33.5, middle - 8.5, "grouped by nearest\nword of the LLM")
    for i, (mask, loss) in enumerate(zip(story.masks, (7.5, 10.5, 1.6), strict=True)):
        y = middle + 3.9 - 6.9 * i
        _picture(ax, _faded(story.image, mask), 48, y, 6.2, _lit(mask), INK, 0.7)
        best = i == len(story.masks) - 1
        _arrow(ax, (55, y + 3.1), (59, y + 3.1))
        _arrow(ax, (75, y + 3.1), (79, y + 3.1))
        ax.add_patch(Rectangle((80, y + 1.9), loss, 2.4, color=ACCENT if best else "#c3c8d4", linewidth=0))
    _under(ax, 51.1, middle - 11, "candidates")
    _box(ax, 60, middle - 10.2, 14, 20.6, "frozen\nMLLM", "\u2744", "kept tokens\n+ question")
    _under(ax, 85.5, middle - 11, "answer loss")
    _picture(ax, _faded(story.image, story.label), 101, middle - 7.5, 15, _lit(story.label), INK)
    _under(ax, 108.5, middle - 8.5, "label: what a good\nmask keeps")
    _arrow(ax, (20, middle), (25, middle))
    _arrow(ax, (42, middle), (47, middle))
    _arrow(ax, (93, middle), (100, middle))
    _arrow(ax, (85, middle + 11.4), (51, middle + 11.4), bend=0.17, color=ACCENT)
    ax.text(68, middle + 15.6, "keep the best, cross, mutate", ha="center", va="center", fontsize=12, color=ACCENT)


def _compressor_lane(ax: Axes, story: _Story, kept: int) -> None:
    _lane(ax, 1, 29, _COOL, "Compressor", "all that runs before the frozen LLM")
    middle = 13.5
    _picture(ax, story.image, 5, middle - 5.5, 13, np.arange(_SIDE**2))
    _chip(ax, 11.5, middle - 8.6, f"{story.question}?")
    ax.plot([20, 33.5, 33.5], [middle - 8.6, middle - 8.6, middle - 8], color=INK, linewidth=1.8)
    _arrow(ax, (33.5, middle - 8.6), (33.5, middle - 6.7))
    _box(
        ax,
        24,
        middle - 6.5,
        19,
        15,
        "Compressor",
        None,
        "one decoder layer,\nbidirectional,\n+ skip + linear head",
    )
    _picture(ax, _heat(story), 50, middle - 5.5, 13)
    _under(ax, 56.5, middle - 6.3, "a score for every token")
    top = np.argsort(-story.scores)[:kept]
    _picture(ax, _faded(story.image, top), 70, middle - 5.5, 13, _lit(top), INK)
    _under(ax, 76.5, middle - 6.3, f"keep the top r = {kept}")
    _box(ax, 90, middle - 6.5, 14, 15, "frozen\nMLLM", "\u2744")
    _chip(ax, 113, middle + 1, f"{story.answer}", size=17)
    _under(ax, 113, middle - 2.2, "answer")
    for start, stop in ((19, 23), (44, 49), (64, 69), (84, 89), (105, 109.5)):
        _arrow(ax, (start, middle + 1), (stop, middle + 1))


def _links(ax: Axes) -> None:
    """What joins the lanes: labels train the scores, the compressor proposes the next masks."""
    ax.plot([112, 112, 58.5], [40.5, 34.5, 34.5], color=COLORS[0], linewidth=2.2, solid_joinstyle="round")
    _arrow(ax, (58.5, 34.5), (58.5, 21.6), color=COLORS[0])
    ax.plot([33.5, 33.5, 51], [22.6, 36.2, 36.2], color=ACCENT, linewidth=2.2, linestyle=(0, (3, 2)))
    _arrow(ax, (51, 36.2), (51, 40.6), color=ACCENT)
    ax.text(32, 34.5, "proposes the next masks", ha="right", va="center", fontsize=12, color=ACCENT)
    ax.text(85, 35.6, "labels train the scores", ha="center", va="bottom", fontsize=12, color=COLORS[0])


def _lane(ax: Axes, bottom: float, height: float, color: str, title: str, rest: str) -> None:
    style = "round,pad=0,rounding_size=1.6"
    ax.add_patch(FancyBboxPatch((1, bottom), _WIDE - 2, height, boxstyle=style, color=color, linewidth=0))
    ax.text(3.6, bottom + height - 2.6, title, va="center", fontsize=15, weight="bold", color=INK)
    ax.text(_WIDE - 3.6, bottom + height - 2.6, rest, ha="right", va="center", fontsize=12, color=SOFT)


def _picture(ax: Axes, pixels, x: float, y: float, side: float, cells=None, color=PAPER, line: float = 1.0) -> None:
    """A picture with lines between tokens whose `cells` [N] differ."""
    # the noise of a scene is most of the file: steps of eight are not seen and make it a sixth smaller
    pixels = np.minimum(255, (pixels.astype(int) + 4) // 8 * 8).astype(np.uint8)
    ax.imshow(pixels, extent=(x, x + side, y, y + side), interpolation="nearest", aspect="auto", zorder=3)
    if cells is not None:
        lines = borders(cells.reshape(_SIDE, _SIDE), (side, side)) * (1, -1) + (x, y + side)
        ax.add_collection(LineCollection(lines, colors=color, linewidths=line, zorder=4))


def _faded(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The picture with all but the kept tokens faded into the paper: uint8."""
    lit = _lit(kept)[patch_of_pixel(image.shape, (_SIDE, _SIDE))][:, :, None].astype(bool)
    return np.where(lit, image, np.rint(0.22 * image + 0.78 * 246).astype(np.uint8))


def _lit(kept: Sequence[int]) -> np.ndarray:
    cells = np.zeros(_SIDE**2, dtype=int)
    cells[kept] = 1
    return cells


def _heat(story: _Story) -> np.ndarray:
    """The grey picture under a wash of the scores: uint8."""
    share = np.clip(story.scores / story.scores.max(), 0, 1) ** 0.7
    wash = 255 * colormaps["YlOrRd"](share)[:, :3][patch_of_pixel(story.image.shape, (_SIDE, _SIDE))]
    grey = story.image.mean(axis=2, keepdims=True)
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


def _arrow(ax: Axes, start, stop, color: str = INK, bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>,head_length=6,head_width=3.4", "shrinkA": 0, "shrinkB": 0, "lw": 1.8}
    ax.add_patch(FancyArrowPatch(start, stop, connectionstyle=f"arc3,rad={bend}", color=color, zorder=2, **style))
