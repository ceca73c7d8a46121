"""`compress_inputs`: compression before layer 0 without hooks. It returns shorter inputs for the unmodified model.

Use it for labelling, training, export and compiled decoding, where hooks are not possible, and `compress` for
everything else. Both give the same answers.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evocomp.inference.choose import Compression, Newline, Positions, Settings, choose, short_index
from evocomp.inference.pick import Picker, name_of
from evocomp.inference.selectors import picker_for, watched
from evocomp.inference.state import Prompt
from evocomp.log import UserError
from evocomp.mllm import families


class ShortInputs(dict):
    """Inputs for `generate` or `forward`; `compression` is the record of what was kept."""

    compression: Compression | None = None


def compress_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    selector,
    keep: int | float | None = None,
    positions: Positions | None = None,
    newline: Newline = "keep",
) -> ShortInputs:
    """Encode the images of a prompt, choose the kept tokens, and return inputs without the dropped ones.

        inputs = processor(images=image, text=prompt, return_tensors="pt")
        short = compress_inputs(model, inputs, compressor, keep=192)
        new_tokens = model.generate(**short)[:, short["input_ids"].shape[1]:]

    Args:
        model, selector, keep, positions, newline: as in `evocomp.compress`, with the same defaults.
        inputs: output of the processor, [B,S] tensors and pixels; `labels` are shortened too, and tokens with a
            label other than -100 (the answer) are hidden from the selector.

    Returns:
        The rows, left-padded to the longest [B,L], with `attention_mask`, `position_ids` and sliced
        `mm_encoder_outputs` in place of pixels. Positions are those of `generate`; PaliGemma's `forward`
        counts from 1 (`families.policy(model).forward_offset`). Inputs without images are returned unchanged.

    Without a cache, call `forward`, not `generate(use_cache=False)`, which drops a mask without padding: without the
    mask, transformers reads gaps in the positions as borders of packed sequences.
    For beam search with families whose encoder returns one tensor (InternVL, Gemma3, PaliGemma), all images must keep
    equally many tokens, because `generate` cannot repeat unequal ones; otherwise use `compress`.

    Raises:
        UserError: as `evocomp.compress`; also for context tokens, whose attention weights cannot be part of the inputs.
    """
    families.check_supported(model)
    picker = picker_for(selector, model)
    settings = Settings.of(model, picker, keep, 0, positions, newline)
    if getattr(picker, "merges", False):
        raise UserError(f"{name_of(picker)} merges tokens, which compress_inputs cannot do; use evocomp.compress")
    watching = watched(picker)
    try:
        return _shortened(model, inputs, picker, settings)
    finally:
        for hook in watching:
            hook.remove()


def _shortened(model: nn.Module, inputs: Mapping[str, Any], picker: Picker, settings: Settings) -> ShortInputs:
    ids, encoded = inputs["input_ids"], families.encode(model, inputs)
    if not encoded:
        return ShortInputs(inputs)
    visual = families.visual_mask(model, ids)
    real = inputs.get("attention_mask")
    real = torch.ones_like(visual) if real is None else real.bool()
    numbers = families.image_numbers(model, ids, encoded)
    prompt = Prompt(ids, numbers, real, inputs.get("labels"), cached=False)
    positions = families.position_ids(model, inputs, forward=True)
    tokens = _merged(model, inputs, positions, encoded)
    kept, owner, compression = choose(
        model, picker, settings.keep, settings.newline, tokens, numbers, prompt.text, positions
    )
    if owner is not None:
        raise UserError(
            "this compressor has context tokens, whose attention weights cannot be part of the inputs; use "
            "evocomp.compress, or set compressor.config.sharp = 0"
        )
    index, valid = short_index(real & (kept | ~visual))
    short = ShortInputs(_shorten_tensors(model, inputs, index, valid))
    short.compression = compression
    short["attention_mask"] = valid.long()
    short["position_ids"] = _positions(model, inputs, index, valid, dense=settings.positions == "dense")
    short["mm_encoder_outputs"] = {
        kind: _slice(output, kept[own], numbers[own & kept])
        for kind, output in encoded.items()
        for own in [ids == families.token_ids(model)[kind]]
    }
    return short


class _Reached(Exception):
    """The decoder was called."""

    def __init__(self, embeds: Tensor):
        self.embeds = embeds


def _merged(model: nn.Module, inputs: Mapping[str, Any], positions: Tensor, encoded: Mapping) -> Tensor:
    """Input embeddings with the visual tokens in their places, as the model itself makes them [B,S,D]."""

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Reached(kwargs["inputs_embeds"])

    pixels = {name for names in families.PIXELS.values() for name in names}
    given = {name: value for name, value in inputs.items() if name not in {*pixels, "labels", "logits_to_keep"}}
    hook = families.decoder(model).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        # not the module itself: hooks of a compressed model are for calls of its user
        families.base(model).forward(**given | {"position_ids": positions, "mm_encoder_outputs": dict(encoded)})
    except _Reached as reached:
        return reached.embeds
    finally:
        hook.remove()
    raise UserError("the decoder ran without its hooks; use evocomp.compress")


def _shorten_tensors(model: nn.Module, inputs: Mapping[str, Any], index: Tensor, valid: Tensor) -> dict[str, Any]:
    """[B,S] tensors at the kept tokens; inputs of the vision tower are removed, all others unchanged."""
    padding = {"input_ids": _pad_id(model), "labels": -100}
    base, shape = families.base(model), inputs["input_ids"].shape
    consumed = {"position_ids", "attention_mask"}
    for kind in ("image", "video"):
        if (function := getattr(base, f"get_{kind}_features", None)) is not None:
            consumed |= set(inspect.signature(function).parameters)
    short = {}
    for name, value in inputs.items():
        if name in consumed:
            continue
        same = isinstance(value, Tensor) and value.shape == shape
        short[name] = value.gather(1, index).masked_fill(~valid, padding.get(name, 0)) if same else value
    return short


def _pad_id(model: nn.Module) -> int:
    """An id for padding that is no placeholder."""
    pad = getattr(families.decoder(model).config, "pad_token_id", None)
    placeholders = families.token_ids(model).values()
    return next(i for i in (pad, 0, 1, 2) if i is not None and i not in placeholders)


def _positions(model: nn.Module, inputs: Mapping[str, Any], index: Tensor, valid: Tensor, dense: bool) -> Tensor:
    """Position ids of the kept tokens: [B,L], or [4,B,L] with M-RoPE."""
    rank = (valid.cumsum(1) - 1).clamp(min=0)
    if dense:
        return rank
    positions = families.position_ids(model, inputs)
    if positions.ndim == 2:
        return positions.gather(1, index).masked_fill(~valid, 0)
    short = positions.gather(2, index.expand(len(positions), -1, -1)).masked_fill(~valid, 0)
    # transformers detects packed sequences by gaps in the text row, so it must have none
    short[0] = rank
    return short


def _slice(output, kept: Tensor, numbers: Tensor):
    """A copy of an encoder's output with the kept visual tokens only.

    kept bool [total]: mask of its tokens, entry after entry; numbers [kept tokens]: index of each one's image.
    """
    entries = families.entries(output)
    masks = kept.split([len(entry) for entry in entries])
    short = copy.copy(output)
    rows = [entry[mask] for entry, mask in zip(entries, masks, strict=True)]
    if isinstance(output.pooler_output, Tensor):
        # a tensor must stay a tensor: stacked by image if all keep equally many tokens, else one row of all tokens
        sizes = numbers.unique(return_counts=True)[1].tolist()
        images = len(sizes) if sizes and min(sizes) == max(sizes) else 1
        short.pooler_output = torch.cat(rows).unflatten(0, (images, -1)) if sizes else torch.cat(rows)[None]
    else:
        short.pooler_output = rows
    if getattr(output, "deepstack_features", None) is not None:
        short.deepstack_features = [
            [entry[mask] for entry, mask in zip(layer, masks, strict=True)] for layer in output.deepstack_features
        ]
    return short
