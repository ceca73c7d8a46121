"""Tower features of many scenes, computed once: the tower is frozen, so alignment never needs pixels again."""

from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.real.efficientnet import CHANNELS, EfficientNetLiteTower
from experiments.real.model import pixels
from experiments.real.scenes import COLORS, Scene, SceneSpec, draw_scene

CHUNK = 32


@dataclass(frozen=True)
class EncodedScenes:
    """Scenes without their pixels, and raw tower features [S, N, 472] in bfloat16."""

    scenes: list[Scene]
    raw: torch.Tensor


def encode_scenes(
    tower: EfficientNetLiteTower, seed: int, count: int, spec: SceneSpec, folder: Path | None = None
) -> EncodedScenes:
    """Draw and encode scenes 0..count-1 of a stream.

    Args:
        folder: where to keep the features; a file of a longer run of the same stream is used as it is.
    """
    side = tower.config.side
    name = f"features-{seed}-{spec.size}-{side}-{len(spec.names)}-{spec.cells}.pt"
    path = folder / name if folder is not None else None
    stored = torch.load(path, weights_only=False) if path is not None and path.is_file() else None
    if stored is not None and len(stored.scenes) >= count:
        return EncodedScenes(stored.scenes[:count], stored.raw[:count])
    tower = tower.to(memory_format=torch.channels_last).eval()
    dtype = next(tower.parameters()).dtype
    raw = torch.empty(count, side * side, CHANNELS, dtype=torch.bfloat16)
    scenes = []
    for start in range(0, count, CHUNK):
        drawn = [draw_scene(seed, i, spec) for i in range(start, min(count, start + CHUNK))]
        batch = pixels([scene.image for scene in drawn], dtype).to(tower.device, memory_format=torch.channels_last)
        with torch.inference_mode():
            raw[start : start + len(drawn)] = tower.raw(batch).bfloat16().cpu()
        scenes += [Scene(None, s.items, s.color, s.style, s.questions) for s in drawn]
    encoded = EncodedScenes(scenes, raw)
    if path is not None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(encoded, path)
    return encoded


def token_words(scene: Scene, words: list[str], size: int, side: int) -> torch.Tensor:
    """What each token shows, as an index into `words`: int64 [side^2].

    A name or a sign's word where the item's box covers half of the token's square, the background's colour where
    no box touches it, -1 in between.
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
    return torch.where(share == 0, words.index(scene.color), shown)


def scene_words(spec: SceneSpec) -> list[str]:
    """Every word that a token may stand for: names, signs, colours."""
    return list(dict.fromkeys([*spec.names, *spec.words, *COLORS]))
