"""What GHM-C sees of a batch: how many tokens have which gradient norm, and what each of them then counts."""

import numpy as np
from matplotlib.figure import Figure

from evocomp.viz.style import ACCENT, COLORS, INK, new_figure, plain_axes


def gradient_density(norm: np.ndarray, bins: int = 10) -> Figure:
    """Share of the tokens (bars) and of the loss's total weight (line) by gradient norm g = |p - y| in [0, 1].

    A token's weight in GHM-C is 1 / GD(g), and GD is the number of tokens in its bin times the number of bins
    (arXiv 1811.05181, section 3): each bin that is not empty has the same total weight, however many easy tokens
    crowd the first one.

    Args:
        norm: gradient norms [n].
    """
    counts, edges = np.histogram(norm, bins=bins, range=(0, 1))
    weight = (counts > 0) / max(1, (counts > 0).sum())
    figure = new_figure(6.4, 3.8)
    ax = plain_axes(figure, "gradient norm g = |p - y|", "share")
    middle = (edges[:-1] + edges[1:]) / 2
    ax.bar(middle, counts / max(1, counts.sum()), width=0.9 / bins, color=COLORS[4], label="of the tokens")
    ax.plot(middle, weight, color=ACCENT, marker="o", linewidth=2.2, label="of GHM's weight")
    ax.set_xlim(0, 1)
    ax.legend(frameon=False, fontsize=12, labelcolor=INK)
    figure.subplots_adjust(left=0.13, right=0.98, top=0.96, bottom=0.19)
    return figure
