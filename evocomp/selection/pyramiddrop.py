"""PyramidDrop: halves the visual tokens at several LLM layers (arXiv 2410.17247; code Cooperx521/PyramidDrop)."""

from dataclasses import dataclass

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.fastv import fastv
from evocomp.selection.llm_attention import visual_columns
from evocomp.selection.schedule import Stage, layer_average

LAYERS = (8, 16, 24)
RATIOS = (0.5, 0.25, 0.125)
# The authors give no schedules for averages of 192, 128 and 64 tokens. Two of these averages are impossible if all
# tokens are kept up to layer 8, so these earlier drop layers are our choice.
EARLY_LAYERS = (2, 8, 16)


def pyramiddrop_stages(
    n: int, layers: tuple[int, ...] = LAYERS, ratios: tuple[float, ...] = RATIOS
) -> tuple[Stage, ...]:
    """The schedule: from each of `layers` on, int(n * ratio) of the ORIGINAL n tokens remain.

    The published defaults have a layer average of 270 of 576 tokens. Each stage ranks the remaining visual tokens by
    the attention of the last prompt token's query in that layer (`llm_attention.last_query_attention` on the layer's
    normed input, then `fastv.fastv`). Position ids are renumbered from 0.
    """
    return tuple(Stage(layer, int(n * ratio)) for layer, ratio in zip(layers, ratios, strict=True))


def pyramiddrop_stages_for_average(
    n: int, average: float, depth: int = 32, layers: tuple[int, ...] = EARLY_LAYERS
) -> tuple[Stage, ...]:
    """A schedule for a given layer average (ours): ratios p, p^2, p^3, ... at `layers`, with p found by bisection.

    The average over an LLM of `depth` layers is at or just below `average`. Raises ValueError if the layers before the
    first drop alone exceed it.
    """

    def stages(p: float) -> tuple[Stage, ...]:
        return pyramiddrop_stages(n, layers, tuple(p ** (i + 1) for i in range(len(layers))))

    low, high = 0.0, 1.0
    if layer_average(n, stages(low), depth) > average:
        raise ValueError(f"{n} tokens up to layer {layers[0]} of {depth} already exceed an average of {average}")
    for _ in range(50):
        middle = (low + high) / 2
        if layer_average(n, stages(middle), depth) <= average:
            low = middle
        else:
            high = middle
    return stages(low)


@dataclass(frozen=True)
class PyramidDrop(Selector):
    """The ranking of PyramidDrop's first stage, applied once; keeps exactly `keep` tokens.

    The published method drops tokens in stages inside the LLM: see `pyramiddrop_stages`.
    """

    name = "pyramiddrop"
    needs = frozenset({"llm_attention", "text"})
    text_aware = True
    needs_llm = True
    source = "arXiv 2410.17247, github.com/Cooperx521/PyramidDrop"

    layer: int = LAYERS[0]
    """LLM layer in which the last query's attention ranks the tokens."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        return Selection.of(fastv(visual_columns(inputs, self.layer, 1)[:, -1], keep))
