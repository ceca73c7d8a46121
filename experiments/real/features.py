"""Computes the tower features of all scenes once: the tower is frozen, so the alignment only needs features.

python -m experiments.real.features --config experiments/real/gpu.yaml    # needs no language model
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evocomp.log import exit_code
from experiments.real.boards import draw
from experiments.real.efficientnet import CHANNELS, EfficientNetLiteConfig, EfficientNetLiteTower, package_weights
from experiments.real.model import normalised
from experiments.real.recipe import Recipe, read_recipe
from experiments.real.scenes import Scene, SceneSpec, in_processes
from experiments.real.smollm2 import cache_folder

CHUNK = 32
TRAIN, HELD_OUT, TEST = 1, 2, 3  # seeds of the scenes; HELD_OUT is evaluated during training, TEST only by the gate


@dataclass(frozen=True)
class EncodedScenes:
    """Scenes without their pixels.

    Attributes:
        raw: tower features [S, N, 472] in bfloat16.
        shown: index of the word for each token [S, N] int16; see `token_words`.
    """

    scenes: list[Scene]
    raw: Tensor
    shown: Tensor

    def to(self, device: str | torch.device) -> "EncodedScenes":
        return EncodedScenes(self.scenes, self.raw.to(device), self.shown.to(device))


def encode_scenes(
    tower: EfficientNetLiteTower, seed: int, count: int, spec: SceneSpec, folder: Path | None = None, processes: int = 0
) -> EncodedScenes:
    """Draw and encode scenes 0..count-1 of a seed; the result is on the CPU, whatever the device of the tower.

    Args:
        folder: cache folder of the features; a file with at least as many scenes of the same seed is reused.
        processes: number of additional processes that draw scenes.
    """
    side = tower.config.side
    path = folder / f"features-{seed}-{spec.size}-{side}-{_digest(spec)}.pt" if folder is not None else None
    stored = torch.load(path, weights_only=False, mmap=True) if path is not None and path.is_file() else None
    if stored is not None and len(stored.scenes) >= count:
        return EncodedScenes(stored.scenes[:count], stored.raw[:count], stored.shown[:count])
    raw = torch.empty(count, side * side, CHANNELS, dtype=torch.bfloat16)
    shown = torch.empty(count, side * side, dtype=torch.int16)
    scenes: list[Scene] = []
    for images, some, words in in_processes(partial(_draw, seed, spec, side), count, CHUNK, processes):
        part = slice(len(scenes), len(scenes) + len(some))
        raw[part], shown[part] = _encode(tower, images), words
        scenes += some
    encoded = EncodedScenes(scenes, raw, shown)
    if path is not None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(encoded, path)
    return encoded


def _digest(spec: SceneSpec) -> str:
    return hashlib.sha256(json.dumps(asdict(spec)).encode()).hexdigest()[:8]


def _draw(seed: int, spec: SceneSpec, side: int, start: int, stop: int) -> tuple[np.ndarray, list[Scene], Tensor]:
    """Images [n, size, size, 3], the scenes without images, and the words of the tokens [n, side^2]."""
    drawn, words = [draw(seed, index, spec) for index in range(start, stop)], scene_words(spec)
    bare = [Scene(None, s.items, s.color, s.style, s.questions) for s in drawn]
    shown = torch.stack([token_words(scene, words, spec.size, side) for scene in bare])
    return np.stack([scene.image for scene in drawn]), bare, shown.short()


@torch.inference_mode()
def _encode(tower: EfficientNetLiteTower, images: np.ndarray) -> Tensor:
    weight = next(tower.parameters())
    batch = normalised(torch.from_numpy(images).to(weight.device), weight.dtype)
    return tower.raw(batch.contiguous(memory_format=torch.channels_last)).bfloat16().cpu()


def encode_streams(tower: EfficientNetLiteTower, recipe: Recipe) -> Iterator[EncodedScenes]:
    """Encoded scenes for training, for evaluation during training, and for the gate."""
    tower = tower.to(memory_format=torch.channels_last).eval()
    streams = ((TRAIN, recipe.scenes, "train"), (HELD_OUT, recipe.held_out, "selection"), (TEST, recipe.test, "test"))
    for seed, count, split in streams:
        yield encode_scenes(tower, seed, count, recipe.spec(split), cache_folder(), recipe.processes)


def token_words(scene: Scene, words: list[str], size: int, side: int) -> Tensor:
    """The word for what each token shows, as an index into `words`: int64 [side^2].

    The name of a picture or the word of a sign if its box covers at least half of the token's patch; the colour of the
    background, if it has one, where no box overlaps the patch; -1 elsewhere.
    """
    cover = torch.zeros(side * side, len(scene.items))
    step = size / side
    edges = torch.arange(side) * step
    for number, item in enumerate(scene.items):
        left, top, right, bottom = item.box
        wide = (torch.clamp(edges + step, max=right) - torch.clamp(edges, min=left)).clamp(min=0) / step
        high = (torch.clamp(edges + step, max=bottom) - torch.clamp(edges, min=top)).clamp(min=0) / step
        cover[:, number] = (high[:, None] * wide[None]).flatten()
    ids = torch.tensor([words.index(item.text) for item in scene.items])
    share, best = cover.max(1)
    shown = torch.where(share >= 0.5, ids[best], -1)
    return torch.where(share == 0, words.index(scene.color), shown) if scene.color else shown


def scene_words(spec: SceneSpec) -> list[str]:
    """All words that a token can show: names, words of signs, colours of backgrounds."""
    return list(dict.fromkeys([*spec.names, *spec.words, *spec.ground]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=None, help="recipe of the alignment")
    recipe = read_recipe(parser.parse_args().config)
    torch.set_grad_enabled(False)
    tower = EfficientNetLiteTower(EfficientNetLiteConfig(image_size=recipe.size, side=recipe.side))
    tower.network.load_state_dict(package_weights())
    device = "cuda" if recipe.accelerator == "gpu" else "cpu"
    for encoded in encode_streams(tower.to(device, torch.bfloat16), recipe):
        print(f"{len(encoded.scenes)} scenes of {encoded.raw.shape[1]} tokens in {cache_folder()}", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main, "features"))
