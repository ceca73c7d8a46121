"""Train the nano MLLM of `evocomp/assets/nano/` from nothing.

    python experiments/nano_mllm.py --out runs/nano_mllm

Shows: six question types at >= 0.93 on fresh scenes, about 0.4 with another scene's picture.
Expect: about 12 minutes of one CPU core, 2 GB. The tower is kept in OUT/tower.safetensors: started again, the
command goes on with the LLM. Recipe:

1. tower with throw-away heads (per-patch shape, colour, centre, place; the digit at the centre; what is in the
   picture on the CLS token), in place of CLIP's pre-training;
2. tower frozen, features cached; projector + LLM from nothing on packed questions: all questions of a scene
   share one picture prefix and see the prefix and themselves only. First 45 % of the steps with 24 of the 144
   tokens (every object's centre is among them), then all: learning takes off much earlier.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from evocomp.data.scenes import COLORS, KINDS, SHAPES, Scene, SceneSpec, draw_scene
from evocomp.mllm.nano import WORDS, build_nano, nano_config, nano_processor

TRAIN, HELD_OUT = 11, 12  # seeds of the scenes; 12 is looked at while training, no other seed is
WORD = {word: i for i, word in enumerate(WORDS)}
IGNORE = -100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=12000)
    parser.add_argument("--tower_steps", type=int, default=1100)
    parser.add_argument("--llm_steps", type=int, default=5000)
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    spec = SceneSpec(size=args.image_size)
    started = time.time()
    scenes = [draw_scene(TRAIN, i, spec) for i in range(args.scenes)]
    held_out = [draw_scene(HELD_OUT, i, spec) for i in range(300)]
    print(f"{args.scenes} scenes drawn in {time.time() - started:.0f} s", flush=True)

    model = build_nano(nano_config(args.image_size, spec.patch), torch.Generator().manual_seed(args.seed))
    tower_file = args.out / "tower.safetensors"
    tower = model.model.vision_tower
    if tower_file.exists():
        tower.load_state_dict(load_file(tower_file))
        print(f"tower taken from {tower_file}", flush=True)
    else:
        train_tower(tower, scenes, held_out, spec, args.tower_steps, args.seed)
        save_file(tower.state_dict(), tower_file)
    accuracy = train_llm(model, scenes, held_out, args.llm_steps, args.seed)

    model.generation_config.max_new_tokens = 4
    model.eval().save_pretrained(args.out)
    nano_processor(model.config).save_pretrained(args.out)
    (args.out / "training.json").write_text(
        json.dumps({**vars(args), "out": args.out.name, "held_out": accuracy}, indent=1) + "\n"
    )
    print(f"saved to {args.out}", flush=True)


# ---------------------------------------------------------------- tower


class Heads(nn.Module):
    """Throw-away heads: what each patch shows, and on the CLS token what the picture holds."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.shape = nn.Linear(width, len(SHAPES) + 1)
        self.color = nn.Linear(width, len(COLORS) + 1)
        self.digit = nn.Linear(width, 10)
        self.centre = nn.Linear(width, 1)
        self.place = nn.Linear(width, 2 * side)
        self.inside = nn.Linear(width, len(SHAPES) + len(COLORS) + 10)


def patch_truth(scene: Scene, spec: SceneSpec) -> np.ndarray:
    """Shape + 1, colour + 1, digit, centre? of each patch: int8 [N, 4]; 0 where there is background."""
    side = spec.tokens_per_side
    truth = np.zeros((side, side, 4), np.int8)
    centres = (np.arange(side) + 0.5) * spec.patch
    for thing in scene.objects:
        reach = thing.radius * 0.95 + spec.patch * 0.35
        covered = (centres[None, :] - thing.x) ** 2 + (centres[:, None] - thing.y) ** 2 < reach**2
        row, column = int(thing.y // spec.patch), int(thing.x // spec.patch)
        covered[row, column] = True
        truth[covered] = (SHAPES.index(thing.shape) + 1, list(COLORS).index(thing.color) + 1, 0, 0)
        truth[row, column, 2:] = (thing.digit, 1)
    return truth.reshape(side * side, 4)


def pixels(scenes: list[Scene]) -> torch.Tensor:
    """Normalised as the processor does: float [B, 3, height, width]."""
    batch = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    return batch.permute(0, 3, 1, 2).float().div_(255).sub_(0.45).div_(0.25)


def tower_loss(heads: Heads, hidden: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    cls, patches = hidden[:, 0], hidden[:, 1:]
    shape, color, digit, centre = truth.long().unbind(-1)
    weight = torch.where(shape > 0, 1.0, 0.15)  # most patches are background

    def patch_loss(logits, target):
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(weight)
        return (losses * weight).sum() / weight.sum()

    side = heads.place.out_features // 2
    places = torch.arange(side * side)
    column, row = (places % side).expand_as(shape), (places // side).expand_as(shape)
    at = centre > 0
    inside = torch.zeros(len(truth), heads.inside.out_features)
    for offset, value in ((0, shape), (len(SHAPES), color)):
        example, patch = (value > 0).nonzero(as_tuple=True)
        inside[example, value[example, patch] - 1 + offset] = 1
    inside[at.nonzero(as_tuple=True)[0], digit[at] + len(SHAPES) + len(COLORS)] = 1
    return (
        patch_loss(heads.shape(patches), shape)
        + patch_loss(heads.color(patches), color)
        + 1.5 * F.cross_entropy(heads.digit(patches[at]), digit[at])
        + 2 * F.binary_cross_entropy_with_logits(heads.centre(patches)[..., 0], at.float())
        + 0.5 * patch_loss(heads.place(patches)[..., :side], column)
        + 0.5 * patch_loss(heads.place(patches)[..., side:], row)
        + F.binary_cross_entropy_with_logits(heads.inside(cls), inside)
    )


def train_tower(tower, scenes, held_out, spec, steps: int, seed: int, batch: int = 16) -> None:
    heads = Heads(tower.config.hidden_size, spec.tokens_per_side)
    matrices = [p for n, p in tower.named_parameters() if p.ndim == 2 and "embed" not in n]
    optimizers = muon_and_adamw(matrices, [*tower.parameters(), *heads.parameters()], 3e-3)
    truth = torch.from_numpy(np.stack([patch_truth(scene, spec) for scene in scenes]))
    rng = np.random.default_rng([seed, 1])
    started = time.process_time()
    for step in range(steps):
        rows = rng.integers(0, len(scenes), batch)
        hidden = tower(pixel_values=pixels([scenes[i] for i in rows])).last_hidden_state
        loss = tower_loss(heads, hidden, truth[rows])
        update(optimizers, loss, 3e-3 * schedule(step, steps, flat=0.4))
        if (step + 1) % 100 == 0:
            spent = time.process_time() - started
            scores = tower_accuracy(tower, heads, held_out, spec)
            print(f"tower {step + 1}/{steps}  loss {loss.item():.3f}  {scores}  {spent:.0f} CPU s", flush=True)


@torch.no_grad()
def tower_accuracy(tower, heads, held_out, spec) -> dict[str, float]:
    truth = torch.from_numpy(np.stack([patch_truth(scene, spec) for scene in held_out[:100]])).long()
    patches = tower(pixel_values=pixels(held_out[:100])).last_hidden_state[:, 1:]
    shown, at = truth[..., 0] > 0, truth[..., 3] > 0
    return {
        "shape": round((heads.shape(patches).argmax(-1) == truth[..., 0])[shown].float().mean().item(), 3),
        "color": round((heads.color(patches).argmax(-1) == truth[..., 1])[shown].float().mean().item(), 3),
        "digit": round((heads.digit(patches).argmax(-1) == truth[..., 2])[at].float().mean().item(), 3),
    }


# ---------------------------------------------------------------- projector and LLM


def pack(scene: Scene, length: int) -> np.ndarray:
    """All questions and answers of a scene in one row: ids, question number, offset, target: int16 [4, length]."""
    row = np.empty((4, length), np.int16)
    row[:] = np.array([WORD["<pad>"], -1, 0, IGNORE])[:, None]
    at = 0
    for number, question in enumerate(scene.questions):
        words = [WORD[word] for word in question.text.split()] + [WORD[question.answer]]
        end = at + len(words)
        row[0, at:end], row[1, at:end], row[2, at:end] = words, number, np.arange(len(words))
        # the answer is read at the last word of the question (one hop), <eos> at the answer
        row[3, end - 2 : end] = words[-1], WORD["<eos>"]
        at = end
    return row


def packed_logits(model, visual: torch.Tensor, positions: torch.Tensor, packed: torch.Tensor, tokens: int):
    """Logits [B, length, V] of the packed questions; each sees the picture and itself only."""
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


def train_llm(model, scenes, held_out, steps: int, seed: int, batch: int = 8, few: int = 24) -> dict[str, float]:
    length = max(sum(len(q.text.split()) + 1 for q in s.questions) for s in [*scenes, *held_out])
    packed = torch.from_numpy(np.stack([pack(scene, length) for scene in scenes]))
    features, centres = encode(model, scenes)
    tokens = features.shape[1]
    everywhere = torch.arange(1, tokens + 1)
    projector, llm = model.model.multi_modal_projector, model.model.language_model
    matrices = [p for n, p in llm.named_parameters() if p.ndim == 2 and "embed" not in n]
    matrices += [p for p in projector.parameters() if p.ndim == 2]
    everything = [*llm.parameters(), *model.lm_head.parameters(), *projector.parameters()]
    optimizers = muon_and_adamw(matrices, everything, 2.5e-3)
    rng = np.random.default_rng([seed, 2])
    draw = torch.Generator().manual_seed(seed)
    scores: dict[str, float] = {}
    started = time.process_time()
    for step in range(steps):
        rows = torch.from_numpy(rng.integers(0, len(scenes), batch))
        part = packed[rows].long()
        part = part[:, :, : int((part[:, 1] >= 0).sum(1).max())]
        visual, positions = projector(features[rows].float()), everywhere.expand(batch, -1)
        if step < 0.45 * steps:
            # every object's centre and random others, at their true places
            chance = torch.rand(batch, tokens, generator=draw)
            chance[torch.arange(batch)[:, None], centres[rows]] += 2
            kept = chance.topk(few, dim=1).indices.sort(dim=1).values
            visual, positions = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[2])), kept + 1
        logits = packed_logits(model, visual, positions, part, tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 3].flatten(), ignore_index=IGNORE)
        update(optimizers, loss, 2.5e-3 * schedule(step, steps, flat=0.4))
        if (step + 1) % 500 == 0 or step + 1 == steps:
            scores = accuracy_by_kind(model, held_out, length)
            spent = time.process_time() - started
            print(f"llm {step + 1}/{steps}  loss {loss.item():.3f}  {scores}  {spent:.0f} CPU s", flush=True)
    return scores


@torch.no_grad()
def encode(model, scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """Tower features [S, N, width] in bf16, and the patches of object centres [S, 9] (the first one repeated)."""
    tower, config = model.model.vision_tower, model.config.vision_config
    parts, centres = [], []
    for start in range(0, len(scenes), 100):
        chunk = scenes[start : start + 100]
        parts.append(tower(pixel_values=pixels(chunk)).last_hidden_state[:, 1:].bfloat16())
        for scene in chunk:
            side = config.image_size // config.patch_size
            own = [int(o.y // config.patch_size) * side + int(o.x // config.patch_size) for o in scene.objects]
            centres.append(own + own[:1] * (9 - len(own)))
    return torch.cat(parts), torch.tensor(centres)


@torch.no_grad()
def accuracy_by_kind(model, scenes, length: int) -> dict[str, float]:
    features, _ = encode(model, scenes)
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
    scores = {kind: round(float(np.mean(hits)), 3) for kind, hits in right.items()}
    plain = [hit for kind, hits in right.items() if kind != "relation" for hit in hits]
    return {"without relation": round(float(np.mean(plain)), 4), **scores}


# ---------------------------------------------------------------- optimisation


def muon_and_adamw(matrices, everything, lr: float) -> list[torch.optim.Optimizer]:
    """Muon on weight matrices of the layers, AdamW on the rest (measured: clearly faster than AdamW alone)."""
    ours = {id(p) for p in matrices}
    rest = [p for p in everything if id(p) not in ours]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, flat: float) -> float:
    """Warm-up over 50 steps, constant to `flat` of the way, then linear to 1 %."""
    done = step / steps
    return min(1.0, (step + 1) / 50) * (1 - max(0.0, (done - flat) / (1 - flat))) + 0.01


def update(optimizers, loss: torch.Tensor, lr: float) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    weights = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    nn.utils.clip_grad_norm_(weights, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()


if __name__ == "__main__":
    main()
