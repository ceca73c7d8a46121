"""Methods inside the LLM as published: tokens are dropped between the layers of the frozen LLM, not before it.

The table has two rows for each method. Under its own name it selects before the LLM, with scores of an LLM that has
processed all tokens (an upper bound). As `..._inside` it runs here, and all tokens enter the LLM. The number of kept
tokens is defined as by the authors: FastV and DART keep that many after their single drop, SparseVLM scales its
published lists, PyramidDrop averages over the layers. The last two are made for 32 layers. In an LLM that is too
shallow for their drop layers an average over layers means little, so there the number of kept tokens is the number
after the last drop. `kept_average` reports the number of tokens that the LLM has actually processed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evocomp.data.scoring import score_answer
from evocomp.evaluation.outcome import INSIDE_LLM, Outcome
from evocomp.evaluation.panel import Panel
from evocomp.evaluation.rivals.layers import LayerLoop, Running
from evocomp.log import UserError
from evocomp.selection import sparsevlm
from evocomp.selection.base import SelectionInputs, Selector
from evocomp.selection.dart import DART
from evocomp.selection.fastv import FastV
from evocomp.selection.pyramiddrop import EARLY_LAYERS, PyramidDrop, pyramiddrop_stages_for_average
from evocomp.selection.schedule import Stage, layer_average

PUBLISHED_DEPTH = 32


@dataclass(frozen=True)
class Plan:
    """The drops of a method for one number of kept tokens."""

    stages: tuple[Stage, ...]
    """Number of visual rows after each drop, including merged ones."""
    keep: tuple[int, ...]
    """Number of rows that the ranking of each stage keeps."""
    note: str = ""

    def before(self, layer: int) -> int | None:
        """Number of rows to keep before this layer; None = nothing is dropped there."""
        found = [k for stage, k in zip(self.stages, self.keep, strict=True) if stage.before_layer == layer]
        return found[0] if found else None


@dataclass(frozen=True)
class Staged:
    """A method inside the LLM. `plan`: (tokens, kept tokens, depth of the LLM) -> drops; `drop` does one of them."""

    label: str
    plan: Callable[[int, int, int], Plan]
    drop: Callable[[LayerLoop, Running, Running, int], Running]
    """(loop, prompt before the layer, prompt before layer 0, number of rows to keep) -> shorter prompt."""


# ------------------------------------------------------------ plans


def at_depth(layers: Sequence[int], depth: int) -> dict[int, int]:
    """Drop layers in an LLM of `depth` layers -> index of the stage that drops there.

    As published if the LLM is deep enough, otherwise scaled from 32 layers, to at least 1. If two stages fall on the
    same layer, the later one is used, which keeps fewer tokens.
    """
    if depth < 2:
        raise UserError("tokens cannot be dropped between the layers of an LLM with only one layer")
    if depth > layers[-1]:
        return {layer: stage for stage, layer in enumerate(layers)}
    return {min(max(1, round(layer * depth / PUBLISHED_DEPTH)), depth - 1): stage for stage, layer in enumerate(layers)}


def one_drop(n: int, kept: int, depth: int) -> Plan:
    """Plan of FastV and DART: one drop before layer 2."""
    (layer,) = at_depth((2,), depth)
    return Plan((Stage(layer, kept),), (kept,), f"all {n} tokens up to layer {layer} of {depth}, then {kept}")


def sparsevlm_plan(n: int, kept: int, depth: int) -> Plan:
    """The published list whose share of 576 tokens is nearest to kept / n, scaled to it."""
    budget = min(sparsevlm.KEPT, key=lambda b: abs(np.log(b / 576 * n / kept)))
    published = sparsevlm.KEPT[budget]
    before = [layer + 1 for layer in sparsevlm.LAYERS]
    meant = budget if depth > before[-1] else published[-1]
    lists = [max(1, round(count * kept / meant)) for count in published]
    layers = at_depth(before, depth)
    keep = tuple(min(lists[stage], n) for stage in layers.values())
    stages = sparsevlm.sparsevlm_stages(n, keep, tuple(layer - 1 for layer in layers))
    # the ranking keeps at least one row fewer than there are
    rows = [n, *(stage.visual for stage in stages)]
    keep = tuple(min(k, before - 1) for k, before in zip(keep, rows, strict=False))
    return Plan(stages, keep, f"published list for {budget} of 576, scaled; {_where(layers, stages, depth)}")


def pyramiddrop_plan(n: int, kept: int, depth: int) -> Plan:
    """Equal ratios with a layer average of `kept`; if no schedule has that average, `kept` rows after the last drop."""
    layers = tuple(at_depth(EARLY_LAYERS, depth))
    if depth > EARLY_LAYERS[-1] and layer_average(n, (Stage(layers[0], 1),), depth) <= kept:
        stages = pyramiddrop_stages_for_average(n, kept, depth, layers)
        note = f"layer average {kept}"
    else:
        share = (kept / n) ** (1 / len(layers))
        stages = tuple(Stage(layer, round(n * share ** (i + 1))) for i, layer in enumerate(layers))
        note = f"{kept} after the last drop"
    stages = tuple(Stage(stage.before_layer, max(1, stage.visual)) for stage in stages)
    note += "; equal ratios and drop layers are our choice, the authors give none for this number of tokens"
    return Plan(stages, tuple(stage.visual for stage in stages), f"{note}; {_where(layers, stages, depth)}")


def _where(layers: Sequence[int], stages: Sequence[Stage], depth: int) -> str:
    drops = ", ".join(f"{stage.visual} from layer {stage.before_layer}" for stage in stages)
    return f"{drops} of {depth}" + (f" (layers scaled from {PUBLISHED_DEPTH})" if depth <= 16 else "")


# ------------------------------------------------------------ drops


def _ranked(selector: Selector, running: Running, kept: int, **read: Tensor) -> Tensor:
    """Indices [kept] of the visual rows that a selector keeps, given values of the LLM's layers."""
    text = running.hidden[running.start + running.count :]
    inputs = SelectionInputs(tokens=running.visual, grid=(1, running.count), text=text, **read)
    return selector(inputs, kept).indices


def fastv_drop(loop: LayerLoop, running: Running, initial: Running, kept: int) -> Running:
    """Rank by the attention of the last query in the previous layer; position ids stay."""
    attention = loop.attention(running.previous, 1)
    return running.keep(_ranked(FastV(), running, kept, llm_attention=attention), renumber=False)


def pyramiddrop_drop(loop: LayerLoop, running: Running, initial: Running, kept: int) -> Running:
    """Rank by the attention of the last query in the next layer; position ids become 0..L-1."""
    attention = loop.attention(running, 1)
    return running.keep(_ranked(PyramidDrop(), running, kept, llm_attention=attention), renumber=True)


def dart_drop(loop: LayerLoop, running: Running, initial: Running, kept: int) -> Running:
    """Select by keys and output of the previous layer; position ids stay."""
    _, keys = loop.queries_and_keys(running.previous)
    read = {"llm_keys": keys.transpose(0, 1).flatten(1), "llm_hidden": loop.normed(running)}
    return running.keep(_ranked(DART(), running, kept, **read), renumber=False)


def sparsevlm_drop(loop: LayerLoop, running: Running, initial: Running, kept: int) -> Running:
    """Rank by the attention of the rater tokens in the previous layer; position ids become 0..L-1.

    Part of the dropped tokens is merged and appended to the kept ones.
    """
    text = initial.hidden[initial.start + initial.count :]
    attention = loop.attention(running.previous, len(text))
    columns = attention[..., running.start : running.start + running.count]
    scores = sparsevlm.sparsevlm_scores(columns, sparsevlm.text_raters(initial.visual, text))
    rows, merged = sparsevlm.sparsevlm_stage(running.visual, scores, kept)
    return running.with_visual(torch.cat([running.visual[rows], merged]))


STAGED = (
    Staged("fastv_inside", one_drop, fastv_drop),
    Staged("sparsevlm_inside", sparsevlm_plan, sparsevlm_drop),
    Staged("pyramiddrop_inside", pyramiddrop_plan, pyramiddrop_drop),
    Staged("dart_inside", one_drop, dart_drop),
)


# ------------------------------------------------------------ rows of the panel


def run_staged(loop: LayerLoop, method: Staged, path: Sequence[Running], kept: int) -> Running:
    """Run a prompt through the LLM with the drops of a method; `path` is `loop.path`, shared by all methods."""
    plan = method.plan(path[0].count, min(kept, path[0].count), loop.depth)

    def drop(running: Running) -> Running:
        wanted = plan.before(running.layer)
        if wanted is None or wanted >= running.count:
            return running
        return method.drop(loop, running, path[0], wanted)

    return loop.finish(path[plan.stages[0].before_layer], drop)


@torch.inference_mode()
def staged_outcomes(panel: Panel, kept: Sequence[int], methods: Sequence[Staged] = STAGED) -> list[Outcome]:
    """Outcomes of all methods at all numbers of kept tokens; not applicable without support by `LayerLoop`."""
    try:
        loop = LayerLoop(panel.mllm)
        at_depth((2,), loop.depth)
    except UserError as error:
        return [
            Outcome(method.label, count, np.zeros(0), not_applicable=str(error), group=INSIDE_LLM)
            for method in methods
            for count in kept
        ]
    panel.report(f"running {len(methods)} methods inside the LLM")
    answers: dict[tuple[str, int], list[str]] = {(m.label, count): [] for m in methods for count in kept}
    for asked in panel.asked:
        path = loop.path(asked.features)
        for method in methods:
            for count in kept:
                text, _ = loop.answer(run_staged(loop, method, path, count), panel.max_new_tokens)
                answers[method.label, count].append(text)
    n = max(len(asked.features.visual) for asked in panel.asked)
    return [
        _outcome(panel, method, count, answers[method.label, count], n, loop.depth)
        for method in methods
        for count in kept
    ]


def _outcome(panel: Panel, method: Staged, kept: int, answers: list[str], n: int, depth: int) -> Outcome:
    plan = method.plan(n, min(kept, n), depth)
    return Outcome(
        method.label,
        kept,
        np.array([score_answer(asked.example, text) for asked, text in zip(panel.asked, answers, strict=True)]),
        answers,
        kept_average=layer_average(n, plan.stages, depth),
        needs_llm=True,
        group=INSIDE_LLM,
        note=plan.note,
    )
