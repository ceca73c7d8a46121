"""Figures: each function returns a matplotlib Figure or writes a file; no window, no global setting."""

from evocomp.viz.curves import retention_curve, search_trace
from evocomp.viz.density import fitness_spread, gradient_density
from evocomp.viz.names import display_name
from evocomp.viz.panels import four_panels, heat
from evocomp.viz.sheet import SheetItem, kept_sheet
from evocomp.viz.style import save_png, to_svg
from evocomp.viz.tokens import groups_over_image, kept_row, kept_tokens, light_up

__all__ = [
    "SheetItem",
    "display_name",
    "fitness_spread",
    "four_panels",
    "gradient_density",
    "groups_over_image",
    "heat",
    "kept_row",
    "kept_sheet",
    "kept_tokens",
    "light_up",
    "retention_curve",
    "save_png",
    "search_trace",
    "to_svg",
]
