"""PyramidDrop: halve the visual tokens stage by stage (arXiv 2410.17247; code Cooperx521/PyramidDrop)."""

from dataclasses import dataclass

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.fastv import fastv
from evocomp.selection.llm_attention import visual_columns
from evocomp.selection.schedule import Stage, layer_average

LAYERS = (8, 16, 24)
RATIOS = (0.5, 0.25, 0.125)
# The authors give no lists for averages of 192, 128, 64, and two of these cannot be had when the first
# layers are full up to layer 8; these drop layers are ours.
EARLY_LAYERS = (2, 8, 16)


def pyramiddrop_stages(
    n: int, layers: tuple[int, ...] = LAYERS, ratios: tuple[float, ...] = RATIOS
) -> tuple[Stage, ...]:
    """The schedule: before each of `layers`, int(n * ratio) of the ORIGINAL n stay. Published: 270 of 576.

    In a stage the layer's own query of the last prompt token ranks the visual tokens still there
    (`llm_attention.last_query_attention` on the layer's normed input, then `fastv.fastv`), and position
    ids are renumbered from 0.
    """
    return tuple(Stage(layer, int(n * ratio)) for layer, ratio in zip(layers, ratios, strict=True))


def pyramiddrop_stages_for_average(
    n: int, average: float, depth: int = 32, layers: tuple[int, ...] = EARLY_LAYERS
) -> tuple[Stage, ...]:
    """Our schedule for a wanted layer average: ratios p, p^2, p^3.. at `layers`, p found by bisection.

    The average of an LLM of `depth` layers comes out at or just below `average`. Raises ValueError when the
    layers before the first drop alone process more.
    """
    def stages(p: float) -> tuple[Stage, ...]:
        return pyramiddrop_stages(n, layers, tuple(p ** (i + 1) for i in range(len(layers))))

    low, high = 0.0, 1.0
    if layer_average(n, stages(low), depth) > average:
        raise ValueError(f"{n} tokens up to layer {layers[0]} of {depth} already average more than {average}")
    for _ in range(50):
        middle = (low + high) / 2
        if layer_average(n, stages(middle), depth) <= average:
            low = middle
        else:
            high = middle
    return stages(low)


@dataclass(frozen=True)
class PyramidDrop(Selector):
    """The ranking of PyramidDrop's first stage, in one drop; exactly `keep`.

    The published method drops in stages inside the LLM: see `pyramiddrop_stages`.
    """

    name = "pyramiddrop"
    needs = frozenset({"llm_attention", "text"})
    text_aware = True
    needs_llm = True
    source = "arXiv 2410.17247, github.com/Cooperx521/PyramidDrop"

    layer: int = LAYERS[0]
    """LLM layer whose last query ranks the tokens."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        return Selection.of(fastv(visual_columns(inputs, self.layer, 1)[:, -1], keep))
