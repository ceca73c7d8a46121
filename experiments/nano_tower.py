"""First stage of `nano_mllm.py`: the vision tower, trained with auxiliary heads for the content of each patch."""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nano_steps import State, muon_and_adamw, schedule, update
from torch import nn

from evocomp.data.scenes import COLORS, SHAPES, SIGN, SIGN_WORDS, Scene, SceneObject, SceneSpec

FORMS = (*SHAPES, SIGN)
GLYPHS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Heads(nn.Module):
    """Auxiliary heads, used only for training: content of each patch, and on the CLS token the content of the image."""

    def __init__(self, width: int, side: int, reads: bool):
        super().__init__()
        forms, glyphs = (len(FORMS), len(GLYPHS)) if reads else (len(SHAPES), 10)
        self.shape = nn.Linear(width, forms + 1)
        self.color = nn.Linear(width, len(COLORS) + 1)
        self.glyph = nn.Linear(width, glyphs)
        self.centre = nn.Linear(width, 1)
        self.place = nn.Linear(width, 2 * side)
        self.inside = nn.Linear(width, forms + len(COLORS) + glyphs)
        self.word = nn.Linear(width, len(SIGN_WORDS)) if reads else None


def marks(thing: SceneObject, spec: SceneSpec) -> list[tuple[int, int, str]]:
    """Patch row, patch column and glyph of all characters on an object."""
    row, column = int(thing.y // spec.patch), int(thing.x // spec.patch)
    if thing.word is None:
        return [(row, column, str(thing.digit))]
    return [(row, column + place - 1, letter) for place, letter in enumerate(thing.word)]


def patch_truth(scene: Scene, spec: SceneSpec) -> np.ndarray:
    """Labels of each patch, int8 [N, 5]: shape + 1, colour + 1, glyph, whether it has a glyph, word + 1.

    Background patches have zeros.
    """
    side = spec.tokens_per_side
    truth = np.zeros((side, side, 5), np.int8)
    centres = (np.arange(side) + 0.5) * spec.patch
    for thing in scene.objects:
        reach = thing.radius * 0.95 + spec.patch * 0.35
        covered = (centres[None, :] - thing.x) ** 2 + (centres[:, None] - thing.y) ** 2 < reach**2
        if thing.word is not None:
            covered[:] = False
        for row, column, _ in marks(thing, spec):
            covered[row, column] = True
        word = 0 if thing.word is None else SIGN_WORDS.index(thing.word) + 1
        truth[covered] = (FORMS.index(thing.shape) + 1, list(COLORS).index(thing.color) + 1, 0, 0, word)
        for row, column, glyph in marks(thing, spec):
            truth[row, column, 2:4] = (GLYPHS.index(glyph), 1)
    return truth.reshape(side * side, 5)


def pixels(scenes: list[Scene]) -> torch.Tensor:
    """Images normalised as by the processor: float [B, 3, height, width]."""
    batch = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    return batch.permute(0, 3, 1, 2).float().div_(255).sub_(0.45).div_(0.25)


def tower_loss(heads: Heads, hidden: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    cls, patches = hidden[:, 0], hidden[:, 1:]
    shape, color, glyph, centre, word = truth.long().unbind(-1)
    weight = torch.where(shape > 0, 1.0, 0.15)  # most patches are background

    def patch_loss(logits, target):
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(weight)
        return (losses * weight).sum() / weight.sum()

    side = heads.place.out_features // 2
    places = torch.arange(side * side)
    column, row = (places % side).expand_as(shape), (places // side).expand_as(shape)
    at = centre > 0
    inside = torch.zeros(len(truth), heads.inside.out_features)
    forms = heads.shape.out_features - 1
    for offset, value in ((0, shape), (forms, color)):
        example, patch = (value > 0).nonzero(as_tuple=True)
        inside[example, value[example, patch] - 1 + offset] = 1
    inside[at.nonzero(as_tuple=True)[0], glyph[at] + forms + len(COLORS)] = 1
    loss = (
        patch_loss(heads.shape(patches), shape)
        + patch_loss(heads.color(patches), color)
        + 1.5 * F.cross_entropy(heads.glyph(patches[at]), glyph[at])
        + 2 * F.binary_cross_entropy_with_logits(heads.centre(patches)[..., 0], at.float())
        + 0.5 * patch_loss(heads.place(patches)[..., :side], column)
        + 0.5 * patch_loss(heads.place(patches)[..., side:], row)
        + F.binary_cross_entropy_with_logits(heads.inside(cls), inside)
    )
    if heads.word is not None:
        loss = loss + 1.5 * F.cross_entropy(heads.word(patches[word > 0]), word[word > 0] - 1)
    return loss


def train_tower(tower, scenes, held_out, spec: SceneSpec, steps: int, batch: int, seed: int, state_file: Path) -> None:
    heads = Heads(tower.config.hidden_size, spec.tokens_per_side, spec.max_signs > 0)
    matrices = [p for n, p in tower.named_parameters() if p.ndim == 2 and "embed" not in n]
    optimizers = muon_and_adamw(matrices, [*tower.parameters(), *heads.parameters()], 3e-3)
    truth = torch.from_numpy(np.stack([patch_truth(scene, spec) for scene in scenes]))
    rng = np.random.default_rng([seed, 1])
    parts = {"tower": tower, "heads": heads, "muon": optimizers[0], "adamw": optimizers[1]}
    state = State(state_file, parts, rng, torch.Generator())
    started = time.process_time()
    for step in range(state.load(), steps):
        rows = rng.integers(0, len(scenes), batch)
        hidden = tower(pixel_values=pixels([scenes[i] for i in rows])).last_hidden_state
        loss = tower_loss(heads, hidden, truth[rows])
        update(optimizers, loss, 3e-3 * schedule(step, steps, flat=0.4))
        if (step + 1) % 100 == 0:
            state.save(step + 1)
            spent = time.process_time() - started
            scores = tower_accuracy(tower, heads, held_out, spec)
            print(f"tower {step + 1}/{steps}  loss {loss.item():.3f}  {scores}  {spent:.0f} CPU s", flush=True)


@torch.no_grad()
def tower_accuracy(tower, heads, held_out, spec) -> dict[str, float]:
    truth = torch.from_numpy(np.stack([patch_truth(scene, spec) for scene in held_out[:100]])).long()
    patches = tower(pixel_values=pixels(held_out[:100])).last_hidden_state[:, 1:]
    shown, at, signs = truth[..., 0] > 0, truth[..., 3] > 0, truth[..., 4] > 0

    def share(head, column: int, where, offset: int = 0) -> float:
        return round((head(patches[where]).argmax(-1) + offset == truth[where][:, column]).float().mean().item(), 3)

    scores = {"shape": share(heads.shape, 0, shown), "color": share(heads.color, 1, shown)}
    scores["glyph"] = share(heads.glyph, 2, at)
    return scores if heads.word is None else {**scores, "word": share(heads.word, 4, signs, 1)}
