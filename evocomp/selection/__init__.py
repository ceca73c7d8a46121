"""Training-free selectors: they reduce N visual tokens to R by selection or merging, without learned weights.

Every file implements one selector: pure functions on the tensors of one image, and a `Selector` that takes these
tensors from `SelectionInputs`. `SELECTORS` lists them all; a file is imported when its selector is first built.
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
    """The selector `name` with its published settings, which `options` override.

    Raises UserError for a name that is not in `SELECTORS`.
    """
    if name not in SELECTORS:
        near = difflib.get_close_matches(name, SELECTORS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(SELECTORS)}."
        raise UserError(f"{name!r} is not a selector; {hint}")
    return SELECTORS[name](**options)


def selector_for_depth(name: str, layers: int) -> "Selector":
    """The selector `name` for an LLM of `layers` layers: a layer setting beyond the LLM's depth becomes its last layer.

    Raises UserError for a name that is not in `SELECTORS`.
    """
    found = selector(name)
    return selector(name, layer=layers - 1) if getattr(found, "layer", 0) >= layers else found
