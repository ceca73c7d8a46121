"""The state of the model call in progress, and where its prompt ends."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.inference.choose import Compression
from evocomp.inference.state import Choice, Pass, Prompt
from evocomp.log import UserError

PromptLength = int | Sequence[int] | Tensor


@dataclass
class Generation:
    """One call of `generate`.

    length: number of columns of its `input_ids`, which are the prompt; None for a call with embeddings
    pictured: whether they contain image placeholders
    choice: the kept tokens, which later steps of a generation without a cache reuse
    """

    length: int | None
    pictured: bool
    choice: Choice | None = None


class Calls(threading.local):
    """The state of the call in progress, separate for each thread.

    labels, logits_to_keep, prompt_length: what the multimodal model was given
    pending: from the hook of the base model to the hook of the decoder
    generation: the call of `generate` around it, None for a direct call
    forced: visual tokens that are kept whatever the selector says [B, S], while a model is checked
    known, last: whether this thread has called the model, and what its last prefill kept
    """

    labels: Tensor | None = None
    logits_to_keep: int | Tensor | None = None
    prompt_length: PromptLength | None = None
    pending: Prompt | Pass | None = None
    generation: Generation | None = None
    forced: Tensor | None = None
    known: bool = False
    last: Compression | None = None

    def forget(self) -> None:
        """Reset the arguments after a call of the multimodal model."""
        self.labels = self.logits_to_keep = self.prompt_length = self.pending = None

    def __deepcopy__(self, memo) -> "Calls":
        return type(self)()

    def __reduce__(self):
        return type(self), ()


def prompt_lengths(calls: Calls, given: PromptLength | None, ids: Tensor, training: bool) -> Tensor | None:
    """Number of columns of ids [B,S] that are the prompt, per row [B]; None: all, or all that `labels` do not cover.

    The first of these that is given decides: `prompt_length` of the call or of the handle (`given`), the input of
    `generate`, `labels`, `logits_to_keep` (k rows of logits start at the last token of the prompt).

    Raises UserError if none is given in training mode, or if a prompt length does not fit.
    """
    batch, length = ids.shape
    given = given if calls.prompt_length is None else calls.prompt_length
    if given is not None:
        return _checked(given, batch, length).to(ids.device)
    if calls.generation is not None and calls.generation.length is not None:
        return torch.full((batch,), min(calls.generation.length, length), device=ids.device)
    if calls.labels is not None:
        return None
    keep = calls.logits_to_keep
    if isinstance(keep, int) and keep > 1:
        return torch.full((batch,), max(length - keep + 1, 0), device=ids.device)
    if training:
        raise UserError(
            "compress() cannot tell the prompt from the answer, and the selector must not read the answer; give the "
            "model labels, logits_to_keep or prompt_length=, or set handle.prompt_length"
        )
    return None


def _checked(given: PromptLength, batch: int, length: int) -> Tensor:
    try:
        lengths = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        lengths = torch.empty(0)  # a shape that is refused below
    fits = lengths.dtype in (torch.int32, torch.int64) and lengths.shape in ((), (batch,))
    if not fits or bool((lengths < 1).any()) or bool((lengths > length).any()):
        raise UserError(
            f"prompt_length={given!r} does not fit input_ids of shape {[batch, length]}; give the number of columns "
            "before the answer, one for all rows or one for each"
        )
    return lengths.expand(batch)


def check_whole(generation: Generation | None, length: int) -> None:
    """Raise UserError if `generate` passes only the first `length` tokens of a prompt with images."""
    if generation is not None and generation.pictured and length < generation.length:
        raise UserError(
            f"prefill_chunk_size={length} splits a prompt of {generation.length} tokens, and the selector must read "
            "all of it; leave out prefill_chunk_size"
        )
