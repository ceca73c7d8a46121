"""What a selector reads and what it returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from evocomp.log import UserError

PerLayer = Tensor | Mapping[int, Tensor] | Callable[[int], Tensor]
"""A tensor per LLM layer (0-based): a mapping, a function, or the one tensor when only one layer is asked."""


class NotApplicable(UserError):
    """The method needs something that this model does not have; a table prints "not applicable"."""

    def __init__(self, method: str, missing: str):
        super().__init__(
            f"{method} is not applicable: it needs `{missing}`, which this model or prompt does not give; "
            f"pass SelectionInputs({missing}=...) or leave {method} out."
        )
        self.method, self.missing = method, missing


@dataclass(frozen=True, eq=False)
class SelectionInputs:
    """Everything that is known of ONE image and prompt; None where the model has no such thing.

    L is the length of the LLM's sequence, laid out as prefix, N visual tokens, T text tokens. H counts heads,
    C is the width of the CLIP tower, E that of CLIP's joint space, M the number of text segments.
    """

    tokens: Tensor
    """Projected visual tokens [N, D], row-major over `grid`."""
    grid: tuple[int, int]
    """(rows, columns) of the N tokens; LLaVA-NeXT partitions are stacked, so rows counts all of them."""
    text: Tensor | None = None
    """Input embeddings of the text tokens after the image [T, D]."""
    clip_hidden: Tensor | None = None
    """Output of the CLIP layer that the projector reads [N+1, C]; row 0 is CLS."""
    cls_attention: Tensor | None = None
    """Attention of CLS in that layer [H, N]: softmax over all N+1 keys, then the CLS column dropped."""
    cls_attention_first: Tensor | None = None
    """The same of layer 0."""
    clip_keys: Tensor | None = None
    """Key projections in that layer, heads concatenated [N+1, C]."""
    clip_queries: Tensor | None = None
    """Query projections in that layer, heads concatenated, unscaled [N+1, C]."""
    clip_next_keys: Tensor | None = None
    """Key projections of the CLIP layer that follows (its input is `clip_hidden`) [N+1, C]; PruMerge's."""
    clip_next_queries: Tensor | None = None
    """Query projections of the CLIP layer that follows [N+1, C]; PruMerge's."""
    clip_image_embeds: Tensor | None = None
    """Patches in CLIP's joint image-text space [N, E]; no MLLM has them, see `CDPruner`."""
    clip_text_embeds: Tensor | None = None
    """Segments of the question in that space [M, E]."""
    llm_attention: PerLayer | None = None
    """Attention probabilities of an LLM layer over the unpruned sequence, last q queries: [H, q, L]."""
    llm_keys: PerLayer | None = None
    """Keys of an LLM layer after rotation, heads concatenated [L, heads * head_dim]."""
    llm_hidden: PerLayer | None = None
    """Output of an LLM layer after the LLM's final norm [L, D]."""
    project: Callable[[Tensor], Tensor] | None = None
    """The projector: CLIP features [K, C] -> visual tokens [K, D]."""
    generator: torch.Generator | None = None
    """Source of chance; seed it per sample."""

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True, eq=False)
class Selection:
    """R output rows."""

    positions: Tensor
    """Place of each row in the original sequence of N, int64 [R]; ascending unless the method says so."""
    indices: Tensor | None = None
    """The rows kept, int64 [R], when nothing was merged."""
    tokens: Tensor | None = None
    """The rows themselves [R, D], when some were merged."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the method has to tell besides."""

    @classmethod
    def of(cls, indices: Tensor, **extra: Any) -> "Selection":
        """A pure selection: rows stay where they were."""
        return cls(positions=indices, indices=indices, extra=extra)


@dataclass(frozen=True)
class Selector:
    """A method with its settings; call it with one sample's inputs and the number of rows to keep."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Optional fields of SelectionInputs that must be there."""
    text_aware: ClassVar[bool] = False
    """Whether the question changes the selection."""
    needs_llm: ClassVar[bool] = False
    """Whether the LLM must have run on all N tokens first."""
    merges: ClassVar[bool] = False
    """Whether its rows are new tokens, made of several of the image's own."""
    source: ClassVar[str] = ""
    """Paper and code."""

    def __call__(self, inputs: SelectionInputs, keep: int) -> Selection:
        """Keep `keep` of N tokens, 1 <= keep <= N.

        Raises NotApplicable when an input is missing, UserError for a budget that cannot be.
        """
        if not 1 <= keep <= len(inputs):
            raise UserError(f"keep={keep}: {self.name} can keep 1 to {len(inputs)} of this image's tokens.")
        for name in sorted(self.missing(inputs)):
            raise NotApplicable(self.name, name)
        return self.select(inputs, keep)

    def missing(self, inputs: SelectionInputs) -> set[str]:
        """Names of the needed inputs that are None."""
        return {name for name in self.needs if getattr(inputs, name) is None}

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        """The method itself; inputs and budget have been checked."""
        raise NotImplementedError
