"""Charts of distributions: gradient norms in the bins of GHM-C, and losses of the masks of a search."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from evocomp.viz.style import ACCENT, COLORS, INK, SOFT, new_figure, plain_axes


def gradient_density(norm: np.ndarray, bins: int = 10) -> Figure:
    """Fraction of the tokens (bars) and of the total weight in the loss (line) per gradient norm g = |p - y| in [0, 1].

    A token's weight in GHM-C is 1 / GD(g), and GD is the number of tokens in its bin times the number of bins
    (arXiv 1811.05181, section 3): all bins that are not empty have the same total weight, although most tokens are
    easy and lie in the first one.

    Args:
        norm: gradient norms [n].
    """
    counts, edges = np.histogram(norm, bins=bins, range=(0, 1))
    weight = (counts > 0) / max(1, (counts > 0).sum())
    figure = new_figure(6.4, 3.8)
    ax = plain_axes(figure, "gradient norm g = |p - y|", "fraction")
    middle = (edges[:-1] + edges[1:]) / 2
    ax.bar(middle, counts / max(1, counts.sum()), width=0.9 / bins, color=COLORS[4], label="of the tokens")
    ax.plot(middle, weight, color=ACCENT, marker="o", linewidth=2.2, label="of GHM's weight")
    ax.set_xlim(0, 1)
    ax.legend(frameon=False, fontsize=12, labelcolor=INK)
    figure.subplots_adjust(left=0.13, right=0.98, top=0.96, bottom=0.19)
    return figure


def fitness_spread(losses: Sequence[np.ndarray]) -> Figure:
    """Fraction of the scored masks whose loss is within a given distance of the best loss of their sample.

    One line per sample, and their median. A steep rise at the left edge means that many masks are about as good as
    the label.

    Args:
        losses: losses of all scored masks [nats], one array per sample.
    """
    distances = [np.sort(one - one.min()) for one in losses]
    x = np.linspace(0, max(float(one[-1]) for one in distances), 200)
    shares = np.stack([np.searchsorted(one, x, side="right") / len(one) for one in distances])
    figure = new_figure(6.4, 4.0)
    ax = plain_axes(figure, "loss above the sample's best [nats]", "fraction of masks below")
    ax.plot(x, shares.T, color=SOFT, linewidth=0.9, alpha=0.6)
    ax.plot(x, np.median(shares, axis=0), color=ACCENT, linewidth=2.8, label="median sample")
    ax.set_xlim(0, x[-1])
    ax.set_ylim(0, 1.02)
    ax.legend(frameon=False, fontsize=12, labelcolor=INK, loc="lower right")
    figure.subplots_adjust(left=0.13, right=0.98, top=0.96, bottom=0.17)
    return figure
