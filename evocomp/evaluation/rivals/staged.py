"""In-LLM methods as published: tokens drop out between the layers of the frozen LLM, not before it.

In the table a method stands twice: under its own name it selects before the LLM, with scores of an LLM that
has read all tokens (an upper reference); as `..._inside` it runs here, and all tokens enter the LLM.
Budgets are met as the authors meet them: FastV and DART keep that many after their one drop; SparseVLM takes
its published lists, PyramidDrop a layer average. Both of these are made for 32 layers: in an LLM too shallow
for their drop layers a layer average means little, and the budget is what the last drop keeps. What the LLM
has really processed stands in `kept_average`.
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
    """Where a method drops for one budget."""

    stages: tuple[Stage, ...]
    """Visual rows from each drop on, merged ones counted."""
    keep: tuple[int, ...]
    """Rows that the ranking of each stage keeps."""
    note: str = ""

    def before(self, layer: int) -> int | None:
        """What to keep before this layer; None = nothing drops there."""
        found = [k for stage, k in zip(self.stages, self.keep, strict=True) if stage.before_layer == layer]
        return found[0] if found else None


@dataclass(frozen=True)
class Staged:
    """An in-LLM method: where it drops, given (tokens, budget, depth of the LLM), and how."""

    label: str
    plan: Callable[[int, int, int], Plan]
    drop: Callable[[LayerLoop, Running, Running, int], Running]
    """(loop, prompt before the layer, prompt at the LLM's door, how many to keep) -> shorter prompt."""


# ------------------------------------------------------------ where


def at_depth(layers: Sequence[int], depth: int) -> dict[int, int]:
    """Drop layers in an LLM of `depth` layers -> number of the stage that drops there.

    As published where the LLM is deep enough; else moved in proportion to 32 layers, to 1 at least. Where two
    stages meet, the later one, which keeps fewer, stands.
    """
    if depth < 2:
        raise UserError("an LLM of one layer has no place between layers to drop tokens at")
    if depth > layers[-1]:
        return {layer: stage for stage, layer in enumerate(layers)}
    return {
        min(max(1, round(layer * depth / PUBLISHED_DEPTH)), depth - 1): stage
        for stage, layer in enumerate(layers)
    }


def one_drop(n: int, kept: int, depth: int) -> Plan:
    """FastV's and DART's: before layer 2."""
    (layer,) = at_depth((2,), depth)
    return Plan((Stage(layer, kept),), (kept,), f"all {n} tokens up to layer {layer} of {depth}, then {kept}")


def sparsevlm_plan(n: int, kept: int, depth: int) -> Plan:
    """The published list whose share of 576 is nearest to the wanted share, scaled to it."""
    budget = min(sparsevlm.KEPT, key=lambda b: abs(np.log(b / 576 * n / kept)))
    published = sparsevlm.KEPT[budget]
    before = [layer + 1 for layer in sparsevlm.LAYERS]
    meant = budget if depth > before[-1] else published[-1]
    lists = [max(1, round(count * kept / meant)) for count in published]
    layers = at_depth(before, depth)
    keep = tuple(min(lists[stage], n) for stage in layers.values())
    stages = sparsevlm.sparsevlm_stages(n, keep, tuple(layer - 1 for layer in layers))
    # the ranking keeps one row fewer than there are at most
    rows = [n, *(stage.visual for stage in stages)]
    keep = tuple(min(k, before - 1) for k, before in zip(keep, rows, strict=False))
    return Plan(stages, keep, f"published list for {budget} of 576, scaled; {_where(layers, stages, depth)}")


def pyramiddrop_plan(n: int, kept: int, depth: int) -> Plan:
    """Equal ratios that average `kept`, or leave `kept` at last where no schedule averages that."""
    layers = tuple(at_depth(EARLY_LAYERS, depth))
    if depth > EARLY_LAYERS[-1] and layer_average(n, (Stage(layers[0], 1),), depth) <= kept:
        stages = pyramiddrop_stages_for_average(n, kept, depth, layers)
        note = f"layer average {kept}"
    else:
        share = (kept / n) ** (1 / len(layers))
        stages = tuple(Stage(layer, round(n * share ** (i + 1))) for i, layer in enumerate(layers))
        note = f"{kept} after the last drop"
    stages = tuple(Stage(stage.before_layer, max(1, stage.visual)) for stage in stages)
    note += "; equal ratios and drop layers are ours, the authors give none for this budget"
    return Plan(stages, tuple(stage.visual for stage in stages), f"{note}; {_where(layers, stages, depth)}")


def _where(layers: Sequence[int], stages: Sequence[Stage], depth: int) -> str:
    drops = ", ".join(f"{stage.visual} from layer {stage.before_layer}" for stage in stages)
    return f"{drops} of {depth}" + (f" (places scaled from {PUBLISHED_DEPTH})" if depth <= 16 else "")


# ------------------------------------------------------------ how


def _ranked(selector: Selector, running: Running, kept: int, **read: Tensor) -> Tensor:
    """The visual rows [kept] that a selector keeps, given what the LLM's layers say."""
    text = running.hidden[running.start + running.count :]
    inputs = SelectionInputs(tokens=running.visual, grid=(1, running.count), text=text, **read)
    return selector(inputs, kept).indices


def fastv_drop(loop: LayerLoop, running: Running, door: Running, kept: int) -> Running:
    """By the last query's attention in the layer just executed; positions stay."""
    attention = loop.attention(running.previous, 1)
    return running.keep(_ranked(FastV(), running, kept, llm_attention=attention), renumber=False)


def pyramiddrop_drop(loop: LayerLoop, running: Running, door: Running, kept: int) -> Running:
    """By the last query's attention in the layer that comes next; positions from 0."""
    attention = loop.attention(running, 1)
    return running.keep(_ranked(PyramidDrop(), running, kept, llm_attention=attention), renumber=True)


def dart_drop(loop: LayerLoop, running: Running, door: Running, kept: int) -> Running:
    """By keys and output of the layer just executed; positions stay."""
    _, keys = loop.queries_and_keys(running.previous)
    read = {"llm_keys": keys.transpose(0, 1).flatten(1), "llm_hidden": loop.normed(running)}
    return running.keep(_ranked(DART(), running, kept, **read), renumber=False)


def sparsevlm_drop(loop: LayerLoop, running: Running, door: Running, kept: int) -> Running:
    """By the raters' attention in the layer just executed; part of the dropped comes back merged; positions
    from 0."""
    text = door.hidden[door.start + door.count :]
    attention = loop.attention(running.previous, len(text))
    columns = attention[..., running.start : running.start + running.count]
    scores = sparsevlm.sparsevlm_scores(columns, sparsevlm.text_raters(door.visual, text))
    rows, merged = sparsevlm.sparsevlm_stage(running.visual, scores, kept)
    return running.with_visual(torch.cat([running.visual[rows], merged]))


STAGED = (
    Staged("fastv_inside", one_drop, fastv_drop),
    Staged("sparsevlm_inside", sparsevlm_plan, sparsevlm_drop),
    Staged("pyramiddrop_inside", pyramiddrop_plan, pyramiddrop_drop),
    Staged("dart_inside", one_drop, dart_drop),
)


# ------------------------------------------------------------ the rows


def run_staged(loop: LayerLoop, method: Staged, path: Sequence[Running], kept: int) -> Running:
    """A prompt through the LLM with the method's drops; `path` is `loop.path`, shared by methods and
    budgets."""
    plan = method.plan(path[0].count, min(kept, path[0].count), loop.depth)

    def drop(running: Running) -> Running:
        wanted = plan.before(running.layer)
        if wanted is None or wanted >= running.count:
            return running
        return method.drop(loop, running, path[0], wanted)

    return loop.finish(path[plan.stages[0].before_layer], drop)


@torch.inference_mode()
def staged_outcomes(panel: Panel, kept: Sequence[int], methods: Sequence[Staged] = STAGED) -> list[Outcome]:
    """Every method at every budget; rows that say why where the model has no layer loop."""
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
        np.array(
            [score_answer(asked.example, text) for asked, text in zip(panel.asked, answers, strict=True)]
        ),
        answers,
        kept_average=layer_average(n, plan.stages, depth),
        needs_llm=True,
        group=INSIDE_LLM,
        note=plan.note,
    )
