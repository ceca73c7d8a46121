"""Teach SmolLM2 to see: projector, then projector and LoRA, on packed questions about cached features.

    python -m experiments.real.align --config experiments/real/cpu.yaml
    python -m experiments.real.align --config experiments/real/cpu.yaml --out runs/real   # goes on where it stopped

1. projector started in closed form (`ridge.py`), then a short while as a classifier of tokens: the nearest word
   embedding must be the word for what the token shows. No LLM in it, seconds to minutes;
2. the LLM's answer loss on the projector;
3. the answer loss on projector and LoRA (peft). First with few visual tokens of each picture (some of every item
   among them), later with all.

OUT receives an ordinary Hugging Face folder `model/` with LoRA merged, the small files `projector.safetensors` and
`lora/` that are enough to make it again, and the gate's figures `gate.json`.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import lightning
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from evocomp.log import UserError
from experiments.real.assemble import assemble
from experiments.real.features import EncodedScenes, encode_scenes, scene_words
from experiments.real.model import build_real, real_processor, save_eyes
from experiments.real.packing import IGNORE, pack, packed_logits, question_scores, trimmed
from experiments.real.ridge import as_projector, place_vectors, ridge_projector, training_pairs, word_embeddings
from experiments.real.scenes import KINDS, NAMES, SceneSpec, all_names
from experiments.real.smollm2 import cache_folder

TRAIN, HELD_OUT, TEST = 1, 2, 3  # streams of scenes; HELD_OUT is looked at while training, TEST only by the gate


@dataclass
class Recipe:
    """Everything that alignment can be told; see cpu.yaml and gpu.yaml."""

    out: str = "runs/real"
    size: int = 224  # pixels
    side: int = 7  # visual tokens a side
    cells: int = 2
    names: str = "few"  # few: 60 names; all: 849
    scenes: int = 4000
    held_out: int = 60
    test: int = 200
    word_steps: int = 600  # projector as classifier of tokens
    projector_steps: int = 30  # answer loss, projector only
    steps: int = 400  # all steps with the LLM
    batch: int = 8  # scenes
    row: int = 110  # text tokens of a scene's packed questions, at most
    few_tokens: int = 20  # visual tokens at first
    few_share: float = 0.5  # of the steps
    lora_rank: int = 8
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj"
    lr_words: float = 1e-3
    lr_projector: float = 2e-4
    lr_lora: float = 1e-3
    look_every: int = 50
    seed: int = 0
    accelerator: str = "cpu"

    def spec(self) -> SceneSpec:
        names = NAMES if self.names == "few" else all_names()
        return SceneSpec(size=self.size, cells=self.cells, names=names)

    def lora(self) -> LoraConfig:
        targets = [f"model.language_model.*.{name}" for name in self.lora_targets.split(",")]
        pattern = "|".join(target.replace(".", r"\.").replace("*", ".*") for target in targets)
        return LoraConfig(r=self.lora_rank, lora_alpha=2 * self.lora_rank, target_modules=f"({pattern})")


def read_recipe(path: Path | None, out: str | None) -> Recipe:
    """Raises `UserError` for a key that is none of `Recipe`'s."""
    given = yaml.safe_load(path.read_text()) if path is not None else {}
    unknown = set(given) - {field.name for field in fields(Recipe)}
    if unknown:
        raise UserError(f"{path}: unknown keys {sorted(unknown)}; known: {[f.name for f in fields(Recipe)]}")
    return Recipe(**given | ({"out": out} if out else {}))


# ---------------------------------------------------------------- stage 1: words


def train_words(model, encoded: EncodedScenes, recipe: Recipe, tokenizer) -> float:
    """Start the projector in closed form and sharpen it; returns the share of tokens nearest to their own word."""
    table = model.get_input_embeddings().weight.detach().float()
    spec, projector, tower = recipe.spec(), model.model.multi_modal_projector, model.model.vision_tower
    mean, scale, weight, bias = ridge_projector(encoded, spec, recipe.side, tokenizer, table)
    tower.mean.copy_(mean)
    tower.scale.copy_(scale)
    places = place_vectors(recipe.side, tokenizer, table)
    projector.load_state_dict(as_projector(torch.cat([weight, places]), bias, projector.state_dict()))
    projector.requires_grad_(True)
    own = word_embeddings(scene_words(spec), tokenizer, table)
    at, names = training_pairs(encoded, spec, recipe.side)
    side, generator = recipe.side, torch.Generator().manual_seed(recipe.seed)
    shift = places[at[:, 1] // side] + places[side + at[:, 1] % side]
    optimizer = torch.optim.AdamW(projector.parameters(), lr=recipe.lr_words, weight_decay=0.01)
    hits: list[float] = []
    for step in range(recipe.word_steps):
        optimizer.param_groups[0]["lr"] = recipe.lr_words * (1 - step / recipe.word_steps)
        rows = torch.randint(len(at), (1024,), generator=generator)
        inputs = (encoded.raw[at[rows, 0], at[rows, 1]].float() - mean) * scale
        place = torch.cat([F.one_hot(at[rows, 1] // side, side), F.one_hot(at[rows, 1] % side, side)], dim=1)
        tokens = projector(torch.cat([inputs, place], dim=1)) - shift[rows]
        # a Gaussian around each word: the right one must be near, not only nearest
        logits = -0.5 * torch.cdist(tokens, own).square()
        loss = F.cross_entropy(logits, names[rows]) + 0.05 * (tokens - own[names[rows]]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits.append((logits.argmax(1) == names[rows]).float().mean().item())
    return float(np.mean(hits[-20:])) if hits else float("nan")


# ---------------------------------------------------------------- stages 2 and 3: answers


class Alignment(lightning.LightningModule):
    """Answer loss of packed questions; step k always sees the same scenes, so a resumed run is the same run."""

    def __init__(self, model, tokenizer, recipe: Recipe, train: EncodedScenes, held_out: EncodedScenes):
        super().__init__()
        self.recipe, self.tokenizer, self.held_out = recipe, tokenizer, held_out
        self.vlm = get_peft_model(model.requires_grad_(False), recipe.lora())
        base = self.vlm.get_base_model()
        self.parts = (base.model.language_model, base.lm_head, base.model.multi_modal_projector)
        self.tower = base.model.vision_tower
        self.parts[2].requires_grad_(True)
        self.train_scenes = train
        self.centres = [_item_tokens(scene, recipe) for scene in train.scenes]

    def train(self, mode: bool = True):
        """Frozen parts stay in evaluation mode."""
        super().train(mode)
        self.tower.eval()
        return self

    def visual(self, raw: Tensor) -> Tensor:
        return self.parts[2](self.tower.tokens(raw.to(self.device).float()))

    def training_step(self, batch, batch_idx):
        step, recipe = self.global_step, self.recipe
        rng = np.random.default_rng([recipe.seed, step])
        rows = rng.integers(0, len(self.train_scenes.scenes), recipe.batch)
        scenes = [self.train_scenes.scenes[i] for i in rows]
        packed = [pack(s, self.tokenizer, recipe.row, list(rng.permutation(len(s.questions)))) for s in scenes]
        packed = trimmed(torch.stack(packed)).to(self.device)
        visual = self.visual(self.train_scenes.raw[rows])
        index = torch.arange(visual.shape[1], device=self.device).expand(len(rows), -1)
        if step < recipe.few_share * recipe.steps:
            chance = torch.from_numpy(rng.random(index.shape)).to(self.device)
            for row, scene in enumerate(rows):
                chance[row, self.centres[scene]] += 1
            index = chance.topk(recipe.few_tokens, dim=1).indices.sort(dim=1).values
            visual = visual.gather(1, index[..., None].expand(-1, -1, visual.shape[2]))
        logits = packed_logits(*self.parts[:2], visual, index, packed, recipe.side**2)
        target = packed[:, 3]
        loss = F.cross_entropy(logits.float(), target[target != IGNORE])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        recipe = self.recipe
        lora = [p for n, p in self.vlm.named_parameters() if "lora_" in n]
        groups = [
            {"params": list(self.parts[2].parameters()), "lr": recipe.lr_projector},
            {"params": lora, "lr": recipe.lr_lora},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)

        def fall(step: int) -> float:
            done = step / recipe.steps
            return min(1.0, (step + 1) / 20) * min(1.0, 2 * (1 - done)) + 0.01

        def lora_rate(step: int) -> float:
            return 0.0 if step < recipe.projector_steps else min(1.0, (step - recipe.projector_steps) / 20) * fall(step)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [fall, lora_rate])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        trained |= {name for name in checkpoint["state_dict"] if name.endswith(("tower.mean", "tower.scale"))}
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n in trained}

    @torch.no_grad()
    def scores(self, encoded: EncodedScenes, batch: int = 10) -> dict:
        """Losses with the right and with the next scene's picture, and accuracy, for each kind of question."""
        scenes, rows = encoded.scenes, []
        for start in range(0, len(scenes), batch):
            part = scenes[start : start + batch]
            packed = trimmed(torch.stack([pack(s, self.tokenizer, 400) for s in part])).to(self.device)
            for shift in (0, 1):
                picture = [(start + i + shift) % len(scenes) for i in range(len(part))]
                visual = self.visual(encoded.raw[picture])
                index = torch.arange(visual.shape[1], device=self.device).expand(len(part), -1)
                logits = packed_logits(*self.parts[:2], visual, index, packed, visual.shape[1])
                rows += [(shift, *score) for score in question_scores(logits, packed, self.tokenizer.eos_token_id)]
        return summary(rows)


def summary(rows: list[tuple[int, int, float, bool]]) -> dict:
    """Means of (wrong picture?, kind, loss, right?)."""

    def mean(shift: int, column: int, kind: int | None = None) -> float:
        values = [row[column] for row in rows if row[0] == shift and kind in (None, row[1])]
        return round(float(np.mean(values)), 4) if values else float("nan")

    right, wrong = mean(0, 2), mean(1, 2)
    return {
        "questions": sum(row[0] == 0 for row in rows),
        "loss_right_picture": right,
        "loss_wrong_picture": wrong,
        "gap": round(wrong - right, 4),
        "accuracy": mean(0, 3),
        "accuracy_wrong_picture": mean(1, 3),
        "by_kind": {
            name: {
                "accuracy": mean(0, 3, k),
                "wrong_picture": mean(1, 3, k),
                "gap": round(mean(1, 2, k) - mean(0, 2, k), 3),
            }
            for k, name in enumerate(KINDS)
        },
    }


def _item_tokens(scene, recipe: Recipe) -> Tensor:
    """Tokens at the centre of each item and beside it."""
    step, found = recipe.size / recipe.side, []
    for left, top, right, bottom in (item.box for item in scene.items):
        x, y = (left + right) / 2, (top + bottom) / 2
        for dx, dy in ((0, 0), (step, 0), (-step, 0)):
            column, row = int((x + dx) // step), int((y + dy) // step)
            found.append(min(max(row, 0), recipe.side - 1) * recipe.side + min(max(column, 0), recipe.side - 1))
    return torch.tensor(sorted(set(found)))


class Look(Callback):
    """Prints and keeps the held-out figures now and then."""

    def __init__(self, path: Path, every: int):
        self.path, self.every, self.started = path, every, time.process_time()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        step = trainer.global_step
        if step % 10 == 0:
            spent = time.process_time() - self.started
            print(f"step {step}  loss {float(outputs['loss']):.3f}  {spent:.0f} CPU s", flush=True)
        if step % self.every == 0:
            module.eval()
            with torch.autocast(module.device.type, torch.bfloat16):
                figures = {"step": step, **module.scores(module.held_out)}
            module.train()
            kinds = {kind: row["accuracy"] for kind, row in figures["by_kind"].items()}
            print(f"step {step}  gap {figures['gap']}  accuracy {figures['accuracy']}  {kinds}", flush=True)
            with self.path.open("a") as file:
                file.write(json.dumps(figures) + "\n")


def align(recipe: Recipe) -> dict:
    """All stages, the gate, the saved model; returns the gate's figures."""
    torch.manual_seed(recipe.seed)
    out, spec = Path(recipe.out), recipe.spec()
    out.mkdir(parents=True, exist_ok=True)
    model = build_real(recipe.side, recipe.size)
    processor = real_processor(model.config)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    train, held_out, test = (
        encode_scenes(tower, seed, count, spec, cache_folder())
        for seed, count in ((TRAIN, recipe.scenes), (HELD_OUT, recipe.held_out), (TEST, recipe.test))
    )
    tower.mean.data, tower.scale.data = tower.mean.float(), tower.scale.float()
    projector.float()
    checkpoint = out / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        share = train_words(model, train, recipe, processor.tokenizer)
        print(f"projector: {share:.3f} of training tokens are nearest to their own word", flush=True)
    module = Alignment(model, processor.tokenizer, recipe, train, held_out)
    keep = ModelCheckpoint(out / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=20)
    trainer = lightning.Trainer(
        max_steps=recipe.steps,
        accelerator=recipe.accelerator,
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=[keep, Look(out / "held_out.jsonl", recipe.look_every)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    module.strict_loading = False  # a checkpoint holds what was trained; the rest comes from the packages
    loader = torch.utils.data.DataLoader(range(recipe.steps + 1), batch_size=1)
    trainer.fit(module, loader, ckpt_path=checkpoint if checkpoint.is_file() else None)
    module.eval()
    with torch.autocast(module.device.type, torch.bfloat16):
        figures = {"recipe": asdict(recipe), **module.scores(test)}
    (out / "gate.json").write_text(json.dumps(figures, indent=1) + "\n")
    save(module, out)
    return figures


def save(module: Alignment, out: Path) -> None:
    """The small files that were learned, in float16, and the merged model as a Hugging Face folder."""
    module.vlm.save_pretrained(out / "lora")
    adapter = out / "lora" / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(adapter).items()}, adapter, {"format": "pt"})
    save_eyes(module.vlm.get_base_model(), out / "projector.safetensors")
    model, processor = assemble(out, module.recipe.side, module.recipe.size)
    model.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=None, help="YAML with the fields of Recipe")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    figures = align(read_recipe(args.config, args.out))
    passed = figures["gap"] >= 1.0 and figures["by_kind"]["yes-no"]["accuracy"] >= 0.8
    print(json.dumps({k: v for k, v in figures.items() if k != "recipe"}, indent=1))
    print("gate passed" if passed else "gate NOT passed")


if __name__ == "__main__":
    main()
