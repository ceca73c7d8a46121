"""Training-free rivals: ways to choose or merge R of N visual tokens without learning anything.

Every file holds one method: pure functions on the tensors of one image, and a `Selector` that reads them
from `SelectionInputs`. `SELECTORS` names them all; a file is imported when its selector is first built.
"""

import difflib
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from evocomp.log import UserError

if TYPE_CHECKING:
    from evocomp.selection.base import Selector


def _factory(module: str, attribute: str) -> Callable[..., "Selector"]:
    def build(**options: Any) -> "Selector":
        return getattr(importlib.import_module(f"evocomp.selection.{module}"), attribute)(**options)

    build.__name__ = build.__qualname__ = attribute
    return build


SELECTORS: dict[str, Callable[..., "Selector"]] = {
    "random_tokens": _factory("random_tokens", "RandomTokens"),
    "uniform_stride": _factory("uniform_stride", "UniformStride"),
    "average_pool": _factory("average_pool", "AveragePool"),
    "cls_attention": _factory("cls_attention", "ClsAttention"),
    "tome": _factory("tome", "ToMe"),
    "prumerge": _factory("prumerge", "PruMerge"),
    "prumerge_plus": _factory("prumerge", "PruMergePlus"),
    "hired": _factory("hired", "HiRED"),
    "hired_next": _factory("hired", "HiREDNext"),
    "visionzip": _factory("visionzip", "VisionZip"),
    "vispruner": _factory("vispruner", "VisPruner"),
    "divprune": _factory("divprune", "DivPrune"),
    "cdpruner": _factory("cdpruner", "CDPruner"),
    "fastv": _factory("fastv", "FastV"),
    "sparsevlm": _factory("sparsevlm", "SparseVLM"),
    "pyramiddrop": _factory("pyramiddrop", "PyramidDrop"),
    "dart": _factory("dart", "DART"),
}


def selector(name: str, **options: Any) -> "Selector":
    """The selector called `name` with its published settings, or with `options` instead.

    Raises UserError for a name that is not in `SELECTORS`.
    """
    if name not in SELECTORS:
        near = difflib.get_close_matches(name, SELECTORS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(SELECTORS)}."
        raise UserError(f"No selector is called {name!r}; {hint}")
    return SELECTORS[name](**options)


def selector_for_depth(name: str, layers: int) -> "Selector":
    """The selector called `name` for an LLM of so many layers: one that reads a layer beyond them reads the last.

    Raises UserError for a name that is not in `SELECTORS`.
    """
    found = selector(name)
    return selector(name, layer=layers - 1) if getattr(found, "layer", 0) >= layers else found
