"""Inputs of selectors in addition to the visual tokens: keys, queries and attention of CLIP and of the LLM."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch

from evocomp.data.example import Example
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
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
from evocomp.mllm.reader import PictureKey, picture_key


class Probes:
    """Computes the inputs that selectors declare in `needs`. Inputs that a model does not provide are left out."""

    def __init__(self, mllm: FrozenMLLM):
        self.mllm = mllm
        self._vision: tuple[PictureKey, dict[str, Any]] = ("", {})
        self._llm: tuple[int, dict[str, Any]] = (-1, {})

    @torch.no_grad()
    def gather(self, example: Example, features: Features, needs: Collection[str]) -> dict[str, Any]:
        """The fields of `SelectionInputs` named in `needs`, as far as the model provides them."""
        found: dict[str, Any] = {}
        if "text" in needs:
            after = features.prompt_ids[features.picture_end :]
            found["text"] = self.mllm.embed(after)
        if TOWER_FIELDS & set(needs):
            key = picture_key(example)
            if self._vision[0] != key:
                self._vision = (key, self._look(example))
            found |= self._vision[1]
        if DECODER_FIELDS & set(needs):
            if self._llm[0] != features.id:
                self._llm = (features.id, self._read(features))
            found |= self._llm[1]
        return {name: value for name, value in found.items() if name in needs}

    def _look(self, example: Example) -> dict[str, Any]:
        """Fields of the vision tower if it is CLIP-like, with a class token and LLaVA's projector; else {}.

        Also {} for several images.
        """
        clip = None if example.further_images else ClipTower.of(self.mllm.model)
        if clip is None:
            return {}
        with TowerObserver(clip) as observer:
            self.mllm.encode_resized(example, None)
            return observer.record.fields(0)

    def _read(self, features: Features) -> dict[str, Any]:
        """Fields of the LLM's layers, from a forward pass over all tokens; {} for decoders without plain q and k."""
        if not is_readable(self.mllm.model):
            return {}
        everything = torch.arange(len(features.visual), device=features.visual.device)
        embeds, positions = self.mllm.assemble(features, features.visual[None], everything[None])
        run = partial(
            self.mllm.decoder,
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            position_ids=positions,
            use_cache=False,
        )
        everywhere = torch.arange(embeds.shape[1], device=embeds.device)
        order = selector_order(everywhere, features.visual_at, everywhere[features.picture_end :])
        # run all layers: the hooks of a sharded decoder do not support a forward pass that ends early
        reading = DecoderReading(self.mllm.decoder, run, stop=False)
        return decoder_fields(reading, 0, order, everywhere[features.picture_end :])
