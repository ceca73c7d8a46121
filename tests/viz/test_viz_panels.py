import numpy as np
import torch
from PIL import Image

from evocomp.losses import build_loss
from evocomp.viz import fitness_spread, four_panels, gradient_density, heat, kept_row
from evocomp.viz.panels import FONT, GAP, LINE, PANEL

IMAGE = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)
SCORES = np.random.default_rng(1).normal(size=144)


def test_heat_depends_on_ranks_only():
    assert np.array_equal(heat(IMAGE, SCORES, (12, 12)), heat(IMAGE, np.exp(3 * SCORES), (12, 12)))
    assert not np.array_equal(heat(IMAGE, SCORES, (12, 12)), heat(IMAGE, -SCORES, (12, 12)))


def test_the_highest_token_is_the_warmest():
    picture = heat(IMAGE, SCORES, (12, 12)).astype(float)
    warmth = (picture[..., 0] - picture[..., 2]).reshape(12, 8, 12, 8).mean((1, 3)).ravel()
    assert warmth.argmax() == SCORES.argmax()


def test_four_panels_show_the_original_image_and_the_kept_tokens():
    captions = ("a", "b", "c", "d" * 200)
    sheet = four_panels(IMAGE, (12, 12), [0], SCORES, [143], "question", captions)
    assert sheet.dtype == np.uint8 and sheet.shape == (2 * (PANEL + LINE) + LINE + 2 * GAP, 2 * PANEL + 3 * GAP, 3)
    top, bottom, left, right = LINE + GAP, LINE + GAP + PANEL + LINE, GAP, 2 * GAP + PANEL
    doubled = np.asarray(Image.fromarray(IMAGE).resize((PANEL, PANEL), Image.Resampling.NEAREST))
    assert np.array_equal(sheet[top : top + PANEL, left : left + PANEL], doubled)
    label = sheet[top : top + PANEL, right : right + PANEL]
    side = PANEL // 12
    assert np.array_equal(label[:side, :side], doubled[:side, :side])
    assert label[side + 1 :].mean() < 0.3 * doubled[side + 1 :].mean()
    kept = sheet[bottom : bottom + PANEL, right : right + PANEL]
    assert np.array_equal(kept[-side:, -side:], doubled[-side:, -side:])
    assert FONT < LINE and (sheet[:, -GAP:] == 255).all(), "words stay within their panel"


def test_density_shows_the_weights_that_the_loss_uses():
    torch.manual_seed(0)
    logits = torch.randn(1, 500, dtype=torch.float64).mul(3).requires_grad_()
    targets = (torch.rand(1, 500) < 0.2).double()
    parts = build_loss("ghm")(logits, None, targets)
    parts["loss"].backward()
    difference = torch.sigmoid(logits) - targets
    # the gradient of GHM-C is weight x (p - y)
    weight = (logits.grad / difference).detach().numpy().ravel()
    norm = difference.abs().detach().numpy().ravel()
    figure = gradient_density(norm, bins=10)
    (line,) = figure.axes[0].lines
    by_bin, _ = np.histogram(norm, bins=10, range=(0, 1), weights=weight)
    np.testing.assert_allclose(line.get_ydata(), by_bin / by_bin.sum(), atol=1e-6)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(heights, np.histogram(norm, bins=10, range=(0, 1))[0] / 500)


def test_fitness_spread_counts_masks_near_the_best():
    figure = fitness_spread([np.array([1.0, 1.0, 2.0, 3.0]), np.array([5.0, 6.0, 6.5, 7.0])])
    first, second, middle = (line.get_ydata() for line in figure.axes[0].lines)
    assert first[0] == 0.5 and second[0] == 0.25 and first[-1] == second[-1] == 1
    assert np.all(np.diff(middle) >= 0)


def test_a_row_of_images_shows_all_of_them():
    figure = kept_row([IMAGE] * 6, list("abcdef"), columns=4)
    assert [ax.get_title() for ax in figure.axes] == list("abcdef")
