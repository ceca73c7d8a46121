"""Images for TensorBoard, drawn without matplotlib for speed: eight of them after every measured epoch."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evocomp.viz.tokens import light_up, patch_of_pixel

# TensorBoard scales images to a width of about 350 pixels without interpolation: text must be large and bold
PANEL = 352  # pixels along a panel's longer side
GAP, LINE, FONT = 12, 44, 32
_INK, _PAPER = (31, 36, 48), (255, 255, 255)


def heat(image: np.ndarray, scores: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The image in dark grey, tinted by the rank of each token's score [N] from dark blue to orange: uint8.

    Ranks are shown because the selection depends on ranks only, and logits have no common scale.
    """
    rank = np.argsort(np.argsort(scores, kind="stable"), kind="stable") / max(1, len(scores) - 1)
    cold, hot = np.array([12.0, 44.0, 92.0]), np.array([255.0, 176.0, 64.0])
    wash = (cold + (hot - cold) * rank[:, None] ** 2)[patch_of_pixel(image.shape, grid)]
    grey = np.asarray(image, dtype=float).mean(axis=2, keepdims=True)
    return np.rint(0.35 * grey + 0.65 * wash).astype(np.uint8)


def four_panels(
    image: np.ndarray,
    grid: tuple[int, int],
    label: Sequence[int],
    scores: np.ndarray,
    kept: Sequence[int],
    headline: str,
    captions: tuple[str, str, str, str],
    context: Sequence[int] = (),
) -> np.ndarray:
    """Image and label above prediction and kept tokens, with captions: uint8 [height, width, 3].

    Args:
        image: [height, width, 3] uint8.
        grid: (rows, columns) of the N tokens.
        label: tokens that the label keeps.
        scores: [N] predicted scores.
        kept: tokens that the compressor selects.
        headline: the question.
        captions: one short line below each panel.
        context: tokens at the centres of context clusters.
    """
    panels = [
        image,
        light_up(image, label, grid),
        heat(image, scores, grid),
        light_up(image, kept, grid, context=context),
    ]
    scale = PANEL / max(image.shape[:2])
    width, height = (max(1, round(side * scale)) for side in (image.shape[1], image.shape[0]))
    sheet = Image.new("RGB", (2 * width + 3 * GAP, 2 * (height + LINE) + LINE + 2 * GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=FONT)
    draw.text((GAP, 1), _fit(headline, font, 2 * width), fill=_INK, font=font, stroke_width=1)
    for number, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = GAP + number % 2 * (width + GAP)
        top = LINE + GAP + number // 2 * (height + LINE)
        sheet.paste(Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + height + 1), _fit(caption, font, width), fill=_INK, font=font, stroke_width=1)
    return np.asarray(sheet)


def _fit(text: str, font, width: int) -> str:
    """The text, truncated to the width of a panel."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
