"""The interface of selectors: their inputs, their result and their base class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from evocomp.log import UserError

PerLayer = Tensor | Mapping[int, Tensor] | Callable[[int], Tensor]
"""A tensor per LLM layer (0-based): a mapping, a function, or a single tensor if only one layer is used."""


class NotApplicable(UserError):
    """The selector needs an input that this model does not provide; tables print "not applicable"."""

    def __init__(self, method: str, missing: str):
        super().__init__(
            f"{method} is not applicable: it needs `{missing}`, which this model or prompt does not provide; "
            f"pass SelectionInputs({missing}=...) or choose another selector."
        )
        self.method, self.missing = method, missing


@dataclass(frozen=True, eq=False)
class SelectionInputs:
    """The inputs of selectors for ONE image and prompt; None where the model does not provide them.

    L is the length of the LLM's sequence: a prefix, N visual tokens, T text tokens. H is the number of heads, C the
    width of the CLIP tower, E the width of CLIP's joint space, M the number of text segments.
    """

    tokens: Tensor
    """Projected visual tokens [N, D], row-major over `grid`."""
    grid: tuple[int, int]
    """(rows, columns) of the N tokens; LLaVA-NeXT partitions are stacked, so that rows is their sum."""
    text: Tensor | None = None
    """Input embeddings of the text tokens after the image [T, D]."""
    clip_hidden: Tensor | None = None
    """Output of the CLIP layer that the projector uses [N+1, C]; row 0 is the class token (CLS)."""
    cls_attention: Tensor | None = None
    """Attention of CLS in that layer [H, N]: softmax over all N+1 keys, then the CLS column is dropped."""
    cls_attention_first: Tensor | None = None
    """Attention of CLS in layer 0, in the same form."""
    clip_keys: Tensor | None = None
    """Key projections in that layer, heads concatenated [N+1, C]."""
    clip_queries: Tensor | None = None
    """Query projections in that layer, heads concatenated, unscaled [N+1, C]."""
    clip_next_keys: Tensor | None = None
    """Key projections of the next CLIP layer (its input is `clip_hidden`) [N+1, C]; for PruMerge."""
    clip_next_queries: Tensor | None = None
    """Query projections of the next CLIP layer [N+1, C]; for PruMerge."""
    clip_image_embeds: Tensor | None = None
    """Patch embeddings in CLIP's joint image-text space [N, E]; no MLLM provides them, see `CDPruner`."""
    clip_text_embeds: Tensor | None = None
    """Embeddings of the question's segments in that space [M, E]."""
    llm_attention: PerLayer | None = None
    """Attention probabilities of the last q queries in an LLM layer on the full sequence: [H, q, L]."""
    llm_keys: PerLayer | None = None
    """Keys of an LLM layer after RoPE, heads concatenated [L, heads * head_dim]."""
    llm_hidden: PerLayer | None = None
    """Output of an LLM layer after the LLM's final norm [L, D]."""
    project: Callable[[Tensor], Tensor] | None = None
    """The projector: CLIP features [K, C] -> visual tokens [K, D]."""
    generator: torch.Generator | None = None
    """Random number generator; seed it per sample."""

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True, eq=False)
class Selection:
    """Result of a selector: R output tokens."""

    positions: Tensor
    """Index of each output token's position among the N tokens, int64 [R]; ascending unless the selector documents
    another order."""
    indices: Tensor | None = None
    """Indices of the kept tokens, int64 [R], if the selector does not merge."""
    tokens: Tensor | None = None
    """The output tokens [R, D], if the selector merges."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Additional results of the selector."""

    @classmethod
    def of(cls, indices: Tensor, **extra: Any) -> "Selection":
        """A result without merging: the tokens at `indices`, at their original positions."""
        return cls(positions=indices, indices=indices, extra=extra)


@dataclass(frozen=True)
class Selector:
    """A selector with its settings; call it with one sample's inputs and the number of tokens to keep."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Optional fields of SelectionInputs that this selector requires."""
    text_aware: ClassVar[bool] = False
    """Whether the selection depends on the question."""
    needs_llm: ClassVar[bool] = False
    """Whether the LLM must first run on all N tokens."""
    merges: ClassVar[bool] = False
    """Whether its rows are new tokens, made of several of the image's own."""
    source: ClassVar[str] = ""
    """Paper and code."""

    def __call__(self, inputs: SelectionInputs, keep: int) -> Selection:
        """Reduce N tokens to `keep`, 1 <= keep <= N.

        Raises NotApplicable if an input is missing, UserError if `keep` is out of range.
        """
        if not 1 <= keep <= len(inputs):
            raise UserError(f"keep={keep}: {self.name} can keep 1 to {len(inputs)} of this image's tokens.")
        for name in sorted(self.missing(inputs)):
            raise NotApplicable(self.name, name)
        return self.select(inputs, keep)

    def missing(self, inputs: SelectionInputs) -> set[str]:
        """Names of the required inputs that are None."""
        return {name for name in self.needs if getattr(inputs, name) is None}

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        """Select the tokens; `__call__` has checked inputs and budget."""
        raise NotImplementedError
