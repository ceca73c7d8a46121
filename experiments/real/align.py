"""Align SmolLM2 with an image encoder: projector, then projector and LoRA, on packed questions with cached features.

    python -m experiments.real.align --config experiments/real/cpu.yaml
    python -m experiments.real.align --config experiments/real/cpu.yaml --out runs/real   # resumes an interrupted run
    python -m experiments.real.align --config experiments/real/cpu.yaml --blind           # the same without images

1. The projector is initialised in closed form (`ridge.py`) and briefly trained as a classifier of tokens: the nearest
   word embedding must be the word for what the token shows. This stage takes seconds to minutes and does not use the
   LLM.
2. The projector is trained with the answer loss of the LLM.
3. Projector and LoRA (peft) are trained with the answer loss, first with few visual tokens of each image (including
   some of every item), then with all.

OUT contains an ordinary Hugging Face folder `model/` with LoRA merged, the small files `projector.safetensors` and
`lora/` from which `model/` can be made again, and the figures of the gate in `gate.json`. `--blind` trains the LLM
without visual tokens on the same questions, for as many steps as the run in OUT, and writes OUT/blind/gate.json.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from evocomp.log import UserError, exit_code
from experiments.real.assemble import assemble
from experiments.real.features import EncodedScenes, encode_streams
from experiments.real.model import build_real, real_processor, save_eyes
from experiments.real.packing import pack, packed_logits, question_scores, targets, trimmed
from experiments.real.recipe import Recipe, read_recipe
from experiments.real.scenes import KINDS
from experiments.real.words import train_words

LONGEST = 600  # largest number of text tokens of all questions about a scene in the evaluation


def lora_config(recipe: Recipe) -> LoraConfig:
    names = [f"model.language_model.*.{name}" for name in recipe.lora_targets.split(",")]
    pattern = "|".join(name.replace(".", r"\.").replace("*", ".*") for name in names)
    return LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules=f"({pattern})")


class Alignment(lightning.LightningModule):
    """Answer loss of packed questions; step k always uses the same scenes, so that resuming is exact."""

    def __init__(self, model, tokenizer, recipe: Recipe, train: EncodedScenes, held_out: EncodedScenes):
        super().__init__()
        self.recipe, self.tokenizer, self.held_out = recipe, tokenizer, held_out
        self.vlm = get_peft_model(model.requires_grad_(False), lora_config(recipe))
        base = self.vlm.get_base_model()
        self.parts = (base.model.language_model, base.lm_head, base.model.multi_modal_projector)
        self.tower = base.model.vision_tower
        self.parts[2].requires_grad_(True)
        self.train_scenes = train
        self.centres = [_item_tokens(scene, recipe) for scene in train.scenes]

    def train(self, mode: bool = True):
        """Set the mode; the frozen vision tower stays in evaluation mode."""
        super().train(mode)
        self.tower.eval()
        return self

    def visual(self, raw: Tensor) -> Tensor:
        return self.parts[2](self.tower.tokens(raw.to(self.device).float()))

    def training_step(self, batch, batch_idx):
        loss = self.answer_loss(self.global_step)
        self.log("loss", loss)
        return loss

    def answer_loss(self, step: int) -> Tensor:
        """Mean loss of the answers of a step."""
        recipe = self.recipe
        rng = np.random.default_rng([recipe.seed, step])
        rows = rng.integers(0, len(self.train_scenes.scenes), recipe.batch)
        scenes = [self.train_scenes.scenes[i] for i in rows]
        packed = [pack(s, self.tokenizer, recipe.row, rng.permutation(len(s.questions))) for s in scenes]
        packed = trimmed(torch.stack(packed))
        places, target = (x.to(self.device) for x in targets(packed))
        visual = self.visual(self.train_scenes.raw[torch.from_numpy(rows)])
        index = torch.arange(visual.shape[1]).expand(len(rows), -1)
        if step < recipe.few_share * recipe.steps:
            chance = torch.from_numpy(rng.random(index.shape))
            for row, scene in enumerate(rows):
                chance[row, self.centres[scene]] += 1
            index = chance.topk(recipe.few_tokens, dim=1).indices.sort(dim=1).values.to(self.device)
            visual = visual.gather(1, index[..., None].expand(-1, -1, visual.shape[2]))
        index, packed = index.to(self.device), packed.to(self.device)
        logits = packed_logits(*self.parts[:2], visual, index, packed, places, recipe.side**2)
        return F.cross_entropy(logits.float(), target)

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
    def scores(self, encoded: EncodedScenes) -> dict:
        """Loss and accuracy with the correct image and with the image of the next scene, for each question type."""
        scenes, rows, batch = encoded.scenes, [], self.recipe.batch
        for start in range(0, len(scenes), batch):
            part = scenes[start : start + batch]
            packed = trimmed(torch.stack([pack(s, self.tokenizer, LONGEST) for s in part]))
            places = targets(packed)[0].to(self.device)
            for shift in (0, 1):
                picture = [(start + i + shift) % len(scenes) for i in range(len(part))]
                visual = self.visual(encoded.raw[picture])
                index = torch.arange(visual.shape[1], device=self.device).expand(len(part), -1)
                logits = packed_logits(*self.parts[:2], visual, index, packed.to(self.device), places, visual.shape[1])
                rows += [(shift, *score) for score in question_scores(logits, packed, self.tokenizer.eos_token_id)]
        return summary(rows)


def summary(rows: list[tuple[int, int, float, bool]]) -> dict:
    """Means over rows of (whether the image is wrong, kind, loss, whether the answer is correct)."""

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
            if any(row[1] == k for row in rows)
        },
    }


def _item_tokens(scene, recipe: Recipe) -> Tensor:
    """Indices of the tokens at the centre of each item and of their left and right neighbours."""
    step, found = recipe.size / recipe.side, []
    for left, top, right, bottom in (item.box for item in scene.items):
        x, y = (left + right) / 2, (top + bottom) / 2
        for dx, dy in ((0, 0), (step, 0), (-step, 0)):
            column, row = int((x + dx) // step), int((y + dy) // step)
            found.append(min(max(row, 0), recipe.side - 1) * recipe.side + min(max(column, 0), recipe.side - 1))
    return torch.tensor(sorted(set(found)))


class Look(Callback):
    """Evaluates on held-out scenes every `every` steps, and prints and saves the figures."""

    def __init__(self, path: Path, every: int):
        self.path, self.every, self.report_every = path, every, max(1, every // 5)
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        step = trainer.global_step
        if step % self.report_every == 0:
            spent = time.perf_counter() - self.started
            print(f"step {step}  loss {float(outputs['loss']):.3f}  {spent:.0f} s", flush=True)
        if step % self.every == 0:
            module.eval()
            with torch.autocast(module.device.type, torch.bfloat16):
                figures = {"step": step, **module.scores(module.held_out)}
            module.train()
            kinds = {kind: row["accuracy"] for kind, row in figures["by_kind"].items()}
            print(f"step {step}  gap {figures['gap']}  accuracy {figures['accuracy']}  {kinds}", flush=True)
            with self.path.open("a") as file:
                file.write(json.dumps(figures) + "\n")


def affordable(module: Alignment, recipe: Recipe, timed: int = 4) -> Recipe:
    """The recipe with as many steps as fit into `seconds`, found by timing steps with few and with all tokens."""
    taken = []
    for few_share in (1.0, 0.0):
        module.recipe = replace(recipe, steps=1, few_share=few_share)
        for step in range(timed + 2):
            if step == 2:
                _wait(module.device)
                started = time.perf_counter()
            with torch.autocast(module.device.type, torch.bfloat16):
                loss = module.answer_loss(0)
            loss.backward()
            module.zero_grad()
        _wait(module.device)
        taken.append((time.perf_counter() - started) / timed)
    each = recipe.few_share * taken[0] + (1 - recipe.few_share) * taken[1]
    print(f"a step takes {taken[0]:.3f} s with few tokens, {taken[1]:.3f} s with all", flush=True)
    return replace(recipe, steps=max(1, int(recipe.seconds / each)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_steps(module: Alignment, recipe: Recipe, out: Path) -> Recipe:
    """The recipe with its number of steps, which is saved so that a resumed run has the same schedule."""
    if recipe.seconds:
        path = out / "steps.json"
        if not path.is_file():
            path.write_text(json.dumps(affordable(module, recipe).steps))
        recipe = replace(recipe, steps=json.loads(path.read_text()))
        print(f"{recipe.steps} steps", flush=True)
    module.recipe = recipe
    return recipe


def align(recipe: Recipe) -> dict:
    """Run all stages and the gate and save the model; returns the figures of the gate."""
    torch.manual_seed(recipe.seed)
    out, device = Path(recipe.out), torch.device("cuda" if recipe.accelerator == "gpu" else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    model = build_real(recipe.side, recipe.size).to(device)
    processor = real_processor(model.config)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    train, held_out, test = (_seen(encoded, recipe).to(device) for encoded in encode_streams(tower, recipe))
    tower.mean.data, tower.scale.data = tower.mean.float(), tower.scale.float()
    projector.float()
    checkpoint = out / "checkpoints" / "last.ckpt"
    started = time.perf_counter()
    if not checkpoint.is_file() and not recipe.blind:
        share = train_words(model, train, recipe, processor.tokenizer)
        spent = time.perf_counter() - started
        print(f"projector: {share:.3f} of tokens are nearest to their own word, {spent:.0f} s", flush=True)
    module = Alignment(model, processor.tokenizer, recipe, train, held_out).to(device)
    recipe = with_steps(module, recipe, out)
    keep = ModelCheckpoint(out / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=recipe.save_every)
    # stop early on a machine that becomes slower, so that the model is saved in any case
    limit = [Timer(timedelta(seconds=1.3 * recipe.seconds + 20))] if recipe.seconds else []
    trainer = lightning.Trainer(
        max_steps=recipe.steps,
        accelerator=recipe.accelerator,
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=[keep, Look(out / "held_out.jsonl", recipe.look_every), *limit],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    module.strict_loading = False  # checkpoints contain only trained weights; the others come from the packages
    loader = torch.utils.data.DataLoader(range(recipe.steps + 1), batch_size=1)
    trainer.fit(module, loader, ckpt_path=checkpoint if checkpoint.is_file() else None)
    module.to(device).eval()
    with torch.autocast(device.type, torch.bfloat16):
        figures = {"recipe": asdict(recipe), "steps_made": trainer.global_step, **module.scores(test)}
    figures["passed"] = figures["gap"] >= 1.0 and figures["by_kind"]["yes-no"]["accuracy"] >= 0.8
    (out / "gate.json").write_text(json.dumps(figures, indent=1) + "\n")
    if not recipe.blind:
        save(module, out)
    return figures


def _seen(encoded: EncodedScenes, recipe: Recipe) -> EncodedScenes:
    """The encoded scenes, without visual tokens if the recipe is blind."""
    return replace(encoded, raw=encoded.raw[:, :0]) if recipe.blind else encoded


def blinded(recipe: Recipe) -> Recipe:
    """The recipe without visual tokens. Raises `UserError` if the run with images has no number of steps yet."""
    steps = Path(recipe.out) / "steps.json"
    if recipe.seconds and not steps.is_file():
        raise UserError(f"{steps} is missing; first align the model with images: leave out --blind")
    count = json.loads(steps.read_text()) if recipe.seconds else recipe.steps
    out = str(Path(recipe.out) / "blind")
    return replace(recipe, out=out, blind=True, few_share=0.0, seconds=0, steps=count)


def save(module: Alignment, out: Path) -> None:
    """Save the trained weights as small files in float16, and the merged model as a Hugging Face folder."""
    module.vlm.save_pretrained(out / "lora")
    adapter = out / "lora" / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(adapter).items()}, adapter, {"format": "pt"})
    save_eyes(module.vlm.get_base_model(), out / "projector.safetensors")
    model, processor = assemble(out)
    model.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=None, help="YAML with the fields of Recipe")
    parser.add_argument("--out", default=None)
    parser.add_argument("--blind", action="store_true", help="train a model without visual tokens, into OUT/blind")
    args = parser.parse_args()
    recipe = read_recipe(args.config, args.out)
    if args.blind:
        figures = align(blinded(recipe))
        print(json.dumps(figures["by_kind"], indent=1))
        return
    figures = align(recipe)
    print(json.dumps({k: v for k, v in figures.items() if k != "recipe"}, indent=1))
    print("gate passed" if figures["passed"] else "gate NOT passed")
    sys.exit(0 if figures["passed"] else 1)


if __name__ == "__main__":
    sys.exit(exit_code(main, "align"))
