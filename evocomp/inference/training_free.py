"""The selectors of `evocomp.selection` inside `compress`: their inputs are recorded during the user's forward pass.

Hooks on the vision tower record its hidden states, keys and queries. Selectors that rank by the decoder's attention
get it from an additional forward pass over the full prompt that stops after the layer that they read (FastV: two
layers).
"""

import hashlib

import torch
from torch import Tensor, nn

from evocomp.inference.pick import LLMInput, Pick, name_of, nothing
from evocomp.log import UserError
from evocomp.mllm import attention, families
from evocomp.mllm.features import square_grid
from evocomp.mllm.observe import (
    DECODER_FIELDS,
    TOWER_FIELDS,
    ClipTower,
    DecoderReading,
    TowerObserver,
    decoder_fields,
    is_readable,
    selector_order,
)
from evocomp.selection import SELECTORS, selector_for_depth
from evocomp.selection.base import SelectionInputs

_ALWAYS = frozenset({"tokens", "grid", "text", "generator"})
_CLIP_TEXT = frozenset({"clip_image_embeds", "clip_text_embeds"})


class WatchedTower:
    """Attention, keys and hidden states of the vision tower, recorded while the model runs.

    Args:
        model: the multimodal LLM.
        reader: name of the selector that reads them, for error messages.

    Raises:
        UserError: the tower has no class token, or its features are not used as in LLaVA.
    """

    def __init__(self, model: nn.Module, reader: str):
        clip = ClipTower.of(model)
        if clip is None:
            raise UserError(
                f"{reader} needs a CLIP vision tower with a class token and one row per image, as in LLaVA-1.5; "
                "for a compressor set hedge_by to divprune or uniform_stride"
            )
        self.clip, self.reader = clip, reader
        self._observer: TowerObserver | None = None

    def watch(self) -> list[TowerObserver]:
        """Start to record; call `remove()` on the returned observer to stop."""
        self._observer = TowerObserver(self.clip)
        return [self._observer]

    def fields(self, image: int, visual: Tensor) -> dict:
        """`TOWER_FIELDS` of the image with these visual tokens [N, D]; `image` is the index that is compared first."""
        record = self._observer.record if self._observer else None
        found = None if record is None else record.find(visual, image)
        # not found: the record is from another call, or the tower ran without its hooks
        if found is None:
            raise UserError(
                f"{self.reader} reads the vision tower, which has not run on these images since compress() (or runs "
                "compiled); give pixel_values, or encode the images after compress() and right before this call"
            )
        return record.fields(found)


class SelectionPicker:
    """Calls a selector of `evocomp.selection`, or one with the same interface, once per image.

    Raises UserError if the model does not provide the inputs that the selector needs.
    """

    reads_llm_input = True

    def __init__(self, selector, model: nn.Module):
        if lacking := _lacking(selector, model):
            raise UserError(
                f"{name_of(selector)} needs {lacking}; selectors for {type(families.unwrap(model)).__name__}: "
                f"{', '.join(usable(model))}"
            )
        self.selector, self.name = selector, name_of(selector)
        self.merges = bool(getattr(selector, "merges", False))
        self._needs = set(selector.needs)
        self._model = families.unwrap(model)
        self._tower = WatchedTower(model, self.name) if self._needs & TOWER_FIELDS else None

    def watch(self) -> list[TowerObserver]:
        """Start to record the vision tower, if the selector reads it; `remove()` of the returned observer stops it."""
        return [] if self._tower is None else self._tower.watch()

    def pick(
        self, visual: list[Tensor], text: list[Tensor], keep: list[int], llm_input: LLMInput | None = None
    ) -> list[Pick]:
        """See `Picker`; text: the text of the full prompt of each image."""
        reading = self._reading(llm_input) if self._needs & DECODER_FIELDS else None
        picks = []
        for image, (v, t, r) in enumerate(zip(visual, text, keep, strict=True)):
            if r == 0:
                picks.append(nothing(v))
                continue
            known = {"text": t, "generator": _generator(t, image, llm_input)}
            if "text" in self._needs and llm_input is not None:
                known["text"] = llm_input.embeds[llm_input.rows[image], _text_after(llm_input, image)]
            if self._needs & TOWER_FIELDS:
                known |= self._tower.fields(image, v)
            if reading is not None:
                known |= self._decoder_fields(reading, image, llm_input)
            inputs = SelectionInputs(tokens=v, grid=square_grid(len(v)), **known)
            picks.append(self._one(self.selector(inputs, r), v))
        return picks

    def _one(self, selection, visual: Tensor) -> Pick:
        if selection.indices is not None:
            return Pick(selection.indices.to(visual.device).sort().values)
        tokens, positions = getattr(selection, "tokens", None), getattr(selection, "positions", None)
        if tokens is None or positions is None:
            raise UserError(f"{self.name} merges tokens but returns no `tokens` and `positions`; return both")
        if not self.merges:
            raise UserError(f"{self.name} returns new tokens; set `merges = True` on its class")
        origin, order = positions.to(visual.device).sort(stable=True)
        return Pick(distinct(origin, len(visual)), tokens=tokens.to(visual)[order], origin=origin)

    def _reading(self, given: LLMInput) -> DecoderReading:
        decoder = families.decoder(self._model)
        window, length = getattr(decoder.config, "sliding_window", None), given.embeds.shape[1]
        windowed = "sliding_attention" in attention.layer_types(decoder.config)
        if windowed and window < length:
            raise UserError(
                f"{self.name} reads the attention over the full prompt, and this decoder's sliding window of {window} "
                f"is shorter than the prompt of {length} tokens; use one of {', '.join(usable(self._model, llm=False))}"
            )

        def run() -> None:
            # `forward`, because calling the module would run the hooks of this compression
            decoder.forward(
                inputs_embeds=given.embeds,
                attention_mask=(given.text | given.visual).long(),
                position_ids=given.positions,
                use_cache=False,
            )

        return DecoderReading(decoder, run, stop=True)

    def _decoder_fields(self, reading: DecoderReading, image: int, given: LLMInput) -> dict:
        row, after = given.rows[image], _text_after(given, image)
        if not len(after):
            raise UserError(f"{self.name} ranks by the text after the image; put the question there")
        everything = (given.text[row] | given.visual[row]).nonzero().squeeze(1)
        return decoder_fields(reading, row, selector_order(everything, given.indices[image], after), after)


def usable(model: nn.Module, llm: bool = True) -> list[str]:
    """Names of the selectors that `compress` can use with a model; llm: those that read its decoder too."""
    found = {name: selector_for_depth(name, len(families.decoder(model).layers)) for name in SELECTORS}
    return [name for name, one in found.items() if not _lacking(one, model) and (llm or not one.needs_llm)]


def _lacking(selector, model: nn.Module) -> str:
    """Description of the selector's inputs that the model does not provide; empty if it provides all."""
    if name_of(selector) == "hired_next":
        return "the tiles of a LLaVA-NeXT image one by one, which compress() does not provide"
    needs = set(selector.needs)
    known = (TOWER_FIELDS, "a CLIP vision tower with a class token and one row per image, as in LLaVA-1.5")
    known_llm = (DECODER_FIELDS, "a causal decoder whose queries and keys can be read")
    known_text = (_CLIP_TEXT, "CLIP's text tower, which a multimodal LLM does not carry")
    have = set(_ALWAYS)
    if needs & TOWER_FIELDS and ClipTower.of(model) is not None:
        have |= TOWER_FIELDS
    if needs & DECODER_FIELDS and is_readable(model):
        have |= DECODER_FIELDS
    if not (missing := needs - have):
        return ""
    reasons = [text for fields, text in (known, known_llm, known_text) if fields & missing]
    listed = ", ".join(sorted(missing))
    return f"{' and '.join(reasons)} (for {listed})" if reasons else f"{listed}, which compress() does not provide"


def _text_after(given: LLMInput, image: int) -> Tensor:
    """Indices [T] of the text after an image in its row."""
    own = given.indices[image]
    text = given.text[given.rows[image]].nonzero().squeeze(1)
    return text[text > own[-1]]


def _generator(text: Tensor, image: int, given: LLMInput | None) -> torch.Generator:
    """Generator seeded by the prompt's text and the image's index in it, so that results do not depend on the batch."""
    number = 0 if given is None else given.rows[:image].count(given.rows[image])
    digest = hashlib.sha256(text.detach().float().cpu().numpy().tobytes() + bytes([number % 256])).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def distinct(positions: Tensor, total: int) -> Tensor:
    """Map ascending positions [r] to distinct ones in 0..total-1, each as near as possible to its own.

    >>> distinct(torch.tensor([0, 0, 3, 5, 5]), 6).tolist()
    [0, 1, 3, 4, 5]
    """
    step = torch.arange(len(positions), device=positions.device)
    return torch.minimum((positions - step).cummax(0).values + step, total - len(positions) + step)
