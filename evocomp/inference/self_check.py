"""Whether compression is exact on a model whose policy was derived: found out on the first prompt with images.

Three runs of the decoder over that prompt: without compression, with all tokens kept, and with every other visual token
dropped. The second must give what the first gives. The third must give what the decoder gives, without compression, on
the embeddings of the kept tokens at their positions (only before layer 0, where such a call exists).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evocomp.inference.calls import Calls
from evocomp.inference.choose import take
from evocomp.inference.state import Prompt, Shortened
from evocomp.log import UserError
from evocomp.mllm.agreement import same_states

_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class Compressing(Protocol):
    """What is asked of the handle of `compress`."""

    model: nn.Module
    layer: int
    restore_length: bool
    _base: nn.Module
    _decoder: nn.Module
    _calls: Calls


def check_exact(handle: Compressing, prompt: Prompt, inputs: Mapping[str, Any]) -> None:
    """Raise UserError unless compression is exact on this prompt.

    Args:
        handle: of `compress`.
        prompt: the prompt.
        inputs: keywords of the multimodal base for it.
    """
    prompt = replace(prompt, labels=None)
    whole = {"past_key_values": None, "use_cache": False, "attention_mask": prompt.real.long()}
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "logits_to_keep")} | whole
    try:
        with torch.no_grad(), _evaluating(handle.model), _short_outputs(handle):
            reason = _difference(handle, prompt, inputs)
    except _ERRORS as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    if reason:
        raise UserError(
            f"compress() is not exact for {type(handle.model).__name__} at layer {handle.layer} ({reason}); use "
            "another layer or another model"
        )


def _difference(handle: Compressing, prompt: Prompt, inputs: dict) -> str:
    """What is not exact, in words; empty if nothing."""
    plain = _run(handle, None, None, inputs)
    whole = _run(handle, prompt, prompt.visual, inputs)
    state = Shortened.make(prompt, prompt.visual)
    if not _same(whole["output"], take(plain["output"], state.index), state.valid):
        return "with all tokens kept its outputs differ from the model's own"
    kept = prompt.visual & (prompt.visual.flatten().cumsum(0).view_as(prompt.visual) % 2 == 1)
    pruned = _run(handle, prompt, kept, inputs)
    state = Shortened.make(prompt, kept)
    if not bool(pruned["output"][state.valid.to(pruned["output"].device)].isfinite().all()):
        return "with tokens dropped its outputs are not finite"
    by_hand = _shortened_inputs(plain, state) if handle.layer == 0 and prompt.blocks is None else None
    if by_hand is not None:
        with torch.no_grad():
            expected = handle._decoder.forward(**by_hand).last_hidden_state
        if not _same(pruned["output"], expected, state.valid):
            return "with tokens dropped its outputs differ from those of the decoder on the kept tokens alone"
    return ""


def _run(handle: Compressing, prompt: Prompt | None, kept: Tensor | None, inputs: dict) -> dict[str, Any]:
    """The decoder's keywords and, as "output", its last hidden states; compressed if there is a prompt."""
    seen: dict[str, Any] = {}

    def record(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        seen.update(kwargs, output=output.last_hidden_state)

    hook = handle._decoder.register_forward_hook(record, with_kwargs=True)
    encoded = inputs.get("mm_encoder_outputs")
    calls = handle._calls
    calls.pending, calls.forced = prompt, kept
    try:
        # not the module itself: its hooks are those of the call that is being checked
        handle._base.forward(**inputs | ({"mm_encoder_outputs": dict(encoded)} if encoded else {}))
    finally:
        calls.pending = calls.forced = None
        hook.remove()
    return seen


def _shortened_inputs(seen: dict[str, Any], state: Shortened) -> dict[str, Any] | None:
    """The decoder's keywords for the kept tokens alone; None if it reads more than can be shortened here."""
    embeds, positions = seen["inputs_embeds"], seen.get("position_ids")
    shape, index = embeds.shape[:2], state.index.to(embeds.device)
    short = {"inputs_embeds": take(embeds, index), "attention_mask": state.valid.long(), "use_cache": False}
    if positions is None:
        positions = torch.arange(shape[1], device=embeds.device)[None]
    short["position_ids"] = take(positions[..., None], index)[..., 0]
    if len(short["position_ids"]) == 4 and positions.ndim == 3:
        # the text row tells masks where packed sequences start: no gaps
        short["position_ids"][0] = (state.valid.cumsum(1) - 1).clamp(min=0)
    for name, value in seen.items():
        if name in {*short, "output", "past_key_values"} or value is None or isinstance(value, bool | int):
            continue
        if not isinstance(value, Tensor) or value.shape[:2] != shape:
            return None
        gather = index.view(*index.shape, *[1] * (value.ndim - 2)).expand(-1, -1, *value.shape[2:])
        short[name] = value.gather(1, gather)
    return short


def _same(ours: Tensor, expected: Tensor, valid: Tensor) -> bool:
    valid = valid.to(ours.device)
    return same_states(ours[valid], expected.to(ours.device)[valid], ours.dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _short_outputs(handle: Compressing) -> Iterator[None]:
    """With the decoder's outputs as short as they are."""
    restore, handle.restore_length = handle.restore_length, False
    try:
        yield
    finally:
        handle.restore_length = restore
