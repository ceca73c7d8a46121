"""Questions for benchmarks of label search, with straightforward implementations of mask scoring as baselines."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evocomp.data.scenes import scene_examples
from evocomp.grouping.groups import Groups
from evocomp.grouping.vocabulary import vocabulary_groups
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.nano import build_nano, nano_config
from evocomp.scoring.sequences import continued


@dataclass
class Sample:
    """A question about an image, as features for the scorer and as inputs of transformers."""

    mllm: FrozenMLLM
    features: Features
    pixels: Tensor | None
    groups: Groups

    def removed(self, kept: np.ndarray) -> np.ndarray:
        """Losses by a careful baseline: features encoded once, dropped tokens removed, one forward pass per mask."""
        f, model, embeds = self.features, self.mllm.model, self._embeds()
        losses = []
        for row in torch.from_numpy(kept).long().to(f.visual.device):
            indices = torch.cat([f.text_at, f.visual_at[row]]).sort().values
            indices = torch.cat([indices, len(f.prompt_ids) + self._answer_indices()])
            positions = continued(f.positions, len(f.prompt_ids) + len(f.answer_ids))[..., None, indices]
            losses.append(self._loss(model, inputs_embeds=embeds[indices][None], position_ids=positions))
        return np.array(losses, dtype=np.float32)

    def masked(self, kept: np.ndarray) -> np.ndarray:
        """Losses by a naive baseline: image and prompt in each forward pass, dropped tokens masked."""
        f = self.features
        ids = torch.cat([f.prompt_ids, f.answer_ids])[None]
        losses = []
        for row in torch.from_numpy(kept).long().to(ids.device):
            seen = torch.ones_like(ids)
            seen[0, f.visual_at] = 0
            seen[0, f.visual_at[row]] = 1
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            losses.append(
                self._loss(
                    self.mllm.model,
                    input_ids=ids,
                    pixel_values=self.pixels,
                    attention_mask=seen,
                    position_ids=positions,
                )
            )
        return np.array(losses, dtype=np.float32)

    @torch.no_grad()
    def _loss(self, model: nn.Module, **inputs: Tensor) -> float:
        if "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["inputs_embeds"][..., 0], dtype=torch.long)
        logits = model(**inputs, use_cache=False).logits[0].float()
        answer = self.features.answer_ids
        return float(F.cross_entropy(logits[-len(answer) - 1 : -1], answer))

    def _answer_indices(self) -> Tensor:
        return torch.arange(len(self.features.answer_ids), device=self.features.visual.device)

    def _embeds(self) -> Tensor:
        f = self.features
        embeds = self.mllm.embed(torch.cat([f.prompt_ids.index_fill(0, f.visual_at, 0), f.answer_ids])).detach()
        embeds[f.visual_at] = f.visual.to(embeds.dtype)
        return embeds


def middle_sample(device: str = "cpu", groups: int = 120, answer: int = 5) -> Sample:
    """LLaVA with random weights: 4 layers of hidden size 256, vocabulary 32,000, 576 visual and 35 + 60 text tokens."""
    config = nano_config(image_size=336, patch=14, width=256, layers=4, heads=4)
    config.text_config.vocab_size = 32_000
    generator = torch.Generator().manual_seed(0)
    model = build_nano(config, generator).eval().to(device)
    mllm = FrozenMLLM(model, processor=None, name="random LLaMA")
    words = torch.randint(10, 32_000, (95,), generator=generator)
    image = torch.full((576,), config.image_token_index)
    ids = torch.cat([words[:35], image, words[35 : 95 - answer]])
    pixels = torch.randn(1, 3, 336, 336, generator=generator).to(device)
    with torch.no_grad():
        visual = model.base_model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
    features = Features(
        id=0,
        image_id="random",
        visual=visual,
        prompt_ids=ids.to(device),
        visual_at=torch.arange(35, 35 + 576, device=device),
        positions=torch.arange(len(ids), device=device),
        answer_ids=words[95 - answer :].to(device),
    )
    groups_of_tokens = np.random.default_rng(0).integers(0, groups, 576)
    return Sample(mllm, features, pixels, Groups.from_ids(groups_of_tokens))


def nano_samples(count: int, device: str = "cpu") -> list[Sample]:
    """Questions for the shipped MLLM, with the groups of the labelling."""
    mllm = FrozenMLLM.load("nano", device=device)
    examples = scene_examples(seed=515151, start=0, count=count)
    examples = list({example.image_id: example for example in examples}.values())[:count]
    return [
        Sample(mllm, features, None, vocabulary_groups(features.visual, mllm.vocabulary))
        for features in mllm.features(examples)
    ]
