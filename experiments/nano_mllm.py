"""Train a nano MLLM of `evocomp/assets/`: `nano` from random weights, `nano576` from the weights of `nano`.

    python experiments/nano_mllm.py --model nano --out runs/nano_mllm
    python experiments/nano_mllm.py --model nano576 --out runs/nano576_mllm

Result: accuracy of at least 0.93 on new scenes for all question types except `relation`, and far less with the image of
another scene. Expected cost: about 12 minutes of one CPU core each; 2 GB for nano, 3 GB for nano576 (192 x 192 pixels,
576 tokens, words to read). An interrupted command is resumed when it is started again: OUT/tower.safetensors contains
the trained tower, OUT/*.state the state of both stages. Recipe:

1. The vision tower is trained with auxiliary heads (shape, colour and position of each patch; digit, letter and word of
   the patches that have one; the content of the image on the CLS token), instead of CLIP's pre-training.
2. The tower is frozen and its features are cached. Projector and LLM are trained on packed questions: all questions of
   a scene share one image prefix, and each attends only to the prefix and to itself. The first phases use few of the
   visual tokens, including all that show a character; the last phase uses all tokens. The loss then falls much earlier.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nano_steps import State, muon_and_adamw, schedule, update
from nano_tower import marks, pixels, train_tower
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from evocomp.data.scenes import KINDS, SPECS, Scene, SceneSpec, draw_scene
from evocomp.log import exit_code
from evocomp.mllm.nano import ASSETS, READING_WORDS, WORDS, build_nano, nano_config, nano_processor

TRAIN, HELD_OUT = 11, 12  # seeds of the scenes; only seed 12 is evaluated during training
WORD = {word: i for i, word in enumerate(READING_WORDS)}  # the shorter vocabulary is a prefix of this one
IGNORE = -100


@dataclass(frozen=True)
class Phase:
    """A phase of the LLM's training: share of its steps, number of visual tokens (0 = all), scenes per step."""

    share: float
    tokens: int
    batch: int = 8


@dataclass(frozen=True)
class Recipe:
    """Settings of the training of one nano MLLM."""

    spec: SceneSpec
    words: tuple[str, ...]
    scenes: int
    tower_steps: int
    tower_batch: int
    llm_steps: int
    phases: tuple[Phase, ...]
    start: str = ""
    """Name of a smaller model from whose weights the training starts; empty: random weights."""


RECIPES = {
    "nano": Recipe(SPECS["small"], WORDS, 12000, 1100, 16, 5000, (Phase(0.45, 24), Phase(0.55, 0))),
    "nano576": Recipe(
        SPECS["large"],
        READING_WORDS,
        scenes=5000,
        tower_steps=550,
        tower_batch=8,
        llm_steps=3000,
        phases=(Phase(0.6, 32), Phase(0.25, 160), Phase(0.15, 0, batch=4)),
        start="nano",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RECIPES, default="nano")
    parser.add_argument("--out", type=Path, required=True)
    for name in ("scenes", "tower_steps", "llm_steps"):
        parser.add_argument(f"--{name}", type=int, help="default: the model's own setting")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in ("scenes", "tower_steps", "llm_steps")}
    recipe = replace(RECIPES[args.model], **{name: value for name, value in given.items() if value is not None})
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    started = time.time()
    scenes = [draw_scene(TRAIN, i, recipe.spec) for i in range(recipe.scenes)]
    held_out = [draw_scene(HELD_OUT, i, recipe.spec) for i in range(300)]
    print(f"{recipe.scenes} scenes drawn in {time.time() - started:.0f} s", flush=True)

    config = nano_config(recipe.spec.size, recipe.spec.patch, words=recipe.words)
    model = build_nano(config, torch.Generator().manual_seed(args.seed))
    if recipe.start:
        take_over(model, LlavaForConditionalGeneration.from_pretrained(ASSETS / recipe.start))
    tower_file = args.out / "tower.safetensors"
    tower = model.model.vision_tower
    if tower_file.exists():
        tower.load_state_dict(load_file(tower_file))
        print(f"tower loaded from {tower_file}", flush=True)
    else:
        how = (recipe.spec, recipe.tower_steps, recipe.tower_batch, args.seed)
        train_tower(tower, scenes, held_out, *how, args.out / "tower.state")
        save_file(tower.state_dict(), tower_file)
    accuracy = train_llm(model, scenes, held_out, recipe, args.seed, args.out / "llm.state")

    model.generation_config.max_new_tokens = 4
    model.eval().save_pretrained(args.out)
    nano_processor(model.config, recipe.words).save_pretrained(args.out)
    settings = {name: getattr(recipe, name) for name in given}
    written = {"model": args.model, **settings, "seed": args.seed, "held_out": accuracy}
    (args.out / "training.json").write_text(json.dumps(written, indent=1) + "\n")
    print(f"saved to {args.out}", flush=True)


@torch.no_grad()
def take_over(model: LlavaForConditionalGeneration, smaller: LlavaForConditionalGeneration) -> None:
    """Copy all weights except position embeddings from a model with smaller images and fewer words."""
    own = model.state_dict()
    for name, weight in smaller.state_dict().items():
        if "position_embedding" not in name:
            own[name][: len(weight)] = weight


def pack(scene: Scene, length: int) -> np.ndarray:
    """All questions and answers of a scene in one row, int16 [4, length]: id, index of the question, offset, target."""
    row = np.empty((4, length), np.int16)
    row[:] = np.array([WORD["<pad>"], -1, 0, IGNORE])[:, None]
    at = 0
    for number, question in enumerate(scene.questions):
        words = [WORD[word] for word in question.text.split()] + [WORD[question.answer]]
        end = at + len(words)
        row[0, at:end], row[1, at:end], row[2, at:end] = words, number, np.arange(len(words))
        # the last word of the question predicts the answer, and the answer predicts <eos>
        row[3, end - 2 : end] = words[-1], WORD["<eos>"]
        at = end
    return row


def packed_logits(model, visual: torch.Tensor, positions: torch.Tensor, packed: torch.Tensor, tokens: int):
    """Logits [B, length, V] of the packed questions; each question attends only to the image and to itself."""
    ids, number, offset = packed[:, 0], packed[:, 1], packed[:, 2]
    llm, count = model.model.language_model, visual.shape[1]
    bos = torch.full((len(ids), 1), WORD["<bos>"])
    embeds = torch.cat([llm.embed_tokens(bos), visual, llm.embed_tokens(ids)], dim=1)
    prefix, total = 1 + count, embeds.shape[1]
    mask = torch.ones(len(ids), 1, total, total, dtype=torch.bool).tril()
    own = (number[:, :, None] == number[:, None, :]) & (offset[:, None, :] <= offset[:, :, None])
    mask[:, 0, prefix:, prefix:] = own
    position_ids = torch.cat([torch.zeros_like(bos), positions, offset + tokens + 1], dim=1)
    hidden = llm(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False)
    return model.lm_head(hidden.last_hidden_state[:, prefix:])


def train_llm(model, scenes, held_out, recipe: Recipe, seed: int, state_file: Path) -> dict[str, float]:
    length = max(sum(len(q.text.split()) + 1 for q in s.questions) for s in [*scenes, *held_out])
    packed = torch.from_numpy(np.stack([pack(scene, length) for scene in scenes]))
    features, written = encode(model, scenes, recipe.spec)
    projector, llm = model.model.multi_modal_projector, model.model.language_model
    matrices = [p for n, p in llm.named_parameters() if p.ndim == 2 and "embed" not in n]
    matrices += [p for p in projector.parameters() if p.ndim == 2]
    everything = [*llm.parameters(), *model.lm_head.parameters(), *projector.parameters()]
    optimizers = muon_and_adamw(matrices, everything, 2.5e-3)
    rng = np.random.default_rng([seed, 2])
    draw = torch.Generator().manual_seed(seed)
    parts = {"llm": llm, "head": model.lm_head, "projector": projector, "muon": optimizers[0], "adamw": optimizers[1]}
    state = State(state_file, parts, rng, draw)
    steps, begun = recipe.llm_steps, state.load()
    started = time.process_time()
    for step in range(begun, steps):
        phase = phase_of(recipe, step)
        rows = torch.from_numpy(rng.integers(0, len(scenes), phase.batch))
        part = packed[rows].long()
        part = part[:, :, : int((part[:, 1] >= 0).sum(1).max())]
        visual, positions = some_tokens(features[rows], written[rows], phase.tokens, draw)
        logits = packed_logits(model, projector(visual.float()), positions, part, features.shape[1])
        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 3].flatten(), ignore_index=IGNORE)
        update(optimizers, loss, 2.5e-3 * schedule(step, steps, flat=0.4))
        if (step + 1) % 500 == 0:
            state.save(step + 1)
            spent = time.process_time() - started
            scores = accuracy_by_kind(model, held_out[:100], length, recipe.spec)
            print(f"llm {step + 1}/{steps}  loss {loss.item():.3f}  {scores}  {spent:.0f} CPU s", flush=True)
    return accuracy_by_kind(model, held_out, length, recipe.spec)


def phase_of(recipe: Recipe, step: int) -> Phase:
    end = 0.0
    for phase in recipe.phases:
        end += phase.share
        if step < end * recipe.llm_steps:
            return phase
    return recipe.phases[-1]


def some_tokens(features, written, count: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` tokens of each image and their position ids: all in `written` and random others; count 0: all tokens."""
    batch, tokens = features.shape[:2]
    if not count:
        return features, torch.arange(1, tokens + 1).expand(batch, -1)
    chance = torch.rand(batch, tokens, generator=draw)
    chance[torch.arange(batch)[:, None], written] += 2
    kept = chance.topk(count, dim=1).indices.sort(dim=1).values
    return features.gather(1, kept[..., None].expand(-1, -1, features.shape[2])), kept + 1


@torch.no_grad()
def encode(model, scenes, spec: SceneSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Tower features [S, N, width] in bfloat16, and indices [S, M] of the patches that show a character.

    Rows with fewer patches are filled by repeating the first index.
    """
    tower = model.model.vision_tower
    parts = [
        tower(pixel_values=pixels(scenes[start : start + 50])).last_hidden_state[:, 1:].bfloat16()
        for start in range(0, len(scenes), 50)
    ]
    own = [
        [row * spec.tokens_per_side + column for thing in scene.objects for row, column, _ in marks(thing, spec)]
        for scene in scenes
    ]
    most = max(map(len, own))
    return torch.cat(parts), torch.tensor([patches + patches[:1] * (most - len(patches)) for patches in own])


@torch.no_grad()
def accuracy_by_kind(model, scenes, length: int, spec: SceneSpec) -> dict[str, float]:
    features, _ = encode(model, scenes, spec)
    packed = torch.from_numpy(np.stack([pack(scene, length) for scene in scenes])).long()
    right = {kind: [] for kind in KINDS}
    for start in range(0, len(scenes), 50):
        part = packed[start : start + 50]
        visual = model.model.multi_modal_projector(features[start : start + 50].float())
        positions = torch.arange(1, visual.shape[1] + 1).expand(len(visual), -1)
        guess = packed_logits(model, visual, positions, part, visual.shape[1]).argmax(-1)
        for row, scene in enumerate(scenes[start : start + 50]):
            for number, question in enumerate(scene.questions):
                last = ((part[row, 1] == number) & (part[row, 3] != IGNORE)).nonzero()[0, 0]
                right[question.kind].append(bool(guess[row, last] == part[row, 3, last]))
    scores = {kind: round(float(np.mean(hits)), 3) for kind, hits in right.items() if hits}
    plain = [hit for kind, hits in right.items() if kind != "relation" for hit in hits]
    return {"without relation": round(float(np.mean(plain)), 4), **scores}


if __name__ == "__main__":
    sys.exit(exit_code(main, "nano_mllm"))
