"""A small attention tower with a class token on the frozen CNN features, for selectors that need CLS attention.

    python -m experiments.real.attention train --config experiments/real/photos_gpu.yaml
    python -m experiments.real.attention attach --config experiments/real/photos_gpu.yaml

Four encoder layers of transformers' CLIP (width 256, 3 M parameters) process the tokens of `EfficientNetLiteTower`.
They are trained to name the photographs and signs on training boards from the class token alone. `train` writes
OUT/attention; its gate requires, on test boards, a mean average precision of the names of at least 0.80, and CLS
attention on items of at least twice their share of the area. `attach` combines tower and aligned model in
OUT/model_cls: the projector's weights for the 256 new channels are zero, so the outputs of the model do not change.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.functional.classification import multilabel_average_precision
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from evocomp.log import UserError, exit_code
from experiments.real.assemble import assemble
from experiments.real.efficientnet import (
    CHANNELS,
    EfficientNetLiteConfig,
    EfficientNetLiteTower,
    package_weights,
)
from experiments.real.features import EncodedScenes, encode_streams, scene_words
from experiments.real.model import real_processor
from experiments.real.recipe import Recipe, read_recipe
from experiments.real.ridge import statistics

LEARNED = ("encoder.", "embed.", "class_token", "mean", "scale")


class EfficientNetLiteClipConfig(EfficientNetLiteConfig):
    """Configuration of `EfficientNetLiteClipTower`: that of the CNN, and the attention layers on top of it."""

    model_type = "efficientnet_lite_clip"

    width: int = 256
    layers: int = 4
    num_attention_heads: int = 4

    @property
    def hidden_size(self) -> int:
        """Channels of a token: those of the CNN, then those of the attention layers."""
        return CHANNELS + 2 * self.side + self.width


class SideLayer(CLIPEncoderLayer):
    """CLIP's encoder layer on the last `width` channels; the other channels pass unchanged."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        before, own = hidden_states.split([hidden_states.shape[-1] - self.embed_dim, self.embed_dim], dim=-1)
        return torch.cat([before, super().forward(own, None)], dim=-1)


class EfficientNetLiteClipTower(EfficientNetLiteTower):
    """Tokens [B, 1 + side^2, C + width]: a class token, then the CNN's tokens with the outputs of the attention layers.

    The first C channels are those of `EfficientNetLiteTower` (zero for the class token). `encoder.layers` and their
    `self_attn` have the same names as in CLIP, so selectors that read CLIP's attention find them.
    """

    config_class = EfficientNetLiteClipConfig

    def __init__(self, config: EfficientNetLiteClipConfig):
        super().__init__(config)
        clip = CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.num_attention_heads,
            attn_implementation="sdpa",
        )
        self.embed = nn.Linear(config.hidden_size - config.width, config.width)
        self.class_token = nn.Parameter(torch.zeros(config.width))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(SideLayer(clip) for _ in range(config.layers))
        self.post_init()

    def states(self, tokens: Tensor) -> Tensor:
        """The CNN's tokens [B, N, C] -> [B, 1 + N, C + width]."""
        own = torch.cat([self.class_token.expand(len(tokens), 1, -1), self.embed(tokens)], dim=1)
        states = torch.cat([F.pad(tokens, (0, 0, 1, 0)), own], dim=-1)
        for layer in self.encoder.layers:
            states = layer(states)
        return states

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        states = self.states(self.tokens(self.raw(pixel_values)))
        return BaseModelOutputWithPooling(last_hidden_state=states, hidden_states=(states,))


AutoConfig.register("efficientnet_lite_clip", EfficientNetLiteClipConfig)
AutoModel.register(EfficientNetLiteClipConfig, EfficientNetLiteClipTower)


# ---------------------------------------------------------------- training


def labels(encoded: EncodedScenes, words: list[str]) -> Tensor:
    """Multi-hot labels [S, W] of the names and words of signs in each scene, float."""
    shown = torch.zeros(len(encoded.scenes), len(words))
    number = {word: i for i, word in enumerate(words)}
    for row, scene in zip(shown, encoded.scenes, strict=True):
        row[[number[item.text] for item in scene.items]] = 1
    return shown


def train_tower(
    tower: EfficientNetLiteClipTower, encoded: EncodedScenes, words: list[str], steps: int, batch: int, lr: float
) -> nn.Linear:
    """Train the tower to name all items of a scene from its class token; returns the classifier."""
    device = tower.class_token.device
    classifier = nn.Linear(tower.config.width, len(words), device=device)
    learned = [p for n, p in tower.named_parameters() if n.startswith(LEARNED)] + list(classifier.parameters())
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    targets, generator = labels(encoded, words).to(device), torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(targets), (batch,), generator=generator)
        tokens = tower.tokens(encoded.raw[rows.to(encoded.raw.device)].to(device).float())
        # dropout against overfitting: there are many boards but few photographs
        tokens = F.dropout(tokens, 0.5)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = classifier(tower.states(tokens)[:, 0, -tower.config.width :])
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets[rows.to(device)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            print(f"step {step}  loss {loss.item():.4f}", flush=True)
    return classifier


@torch.no_grad()
def gate(tower: EfficientNetLiteClipTower, classifier: nn.Linear, encoded: EncodedScenes, words: list[str], names: int):
    """Mean average precision of the first `names` words, and the ratio of CLS attention on items to their area."""
    device, width = tower.class_token.device, tower.config.width
    scores, shares = [], []
    layer = tower.encoder.layers[-1]
    caught: dict[str, Tensor] = {}
    handles = [
        getattr(layer.self_attn, name).register_forward_hook(lambda _, __, out, name=name: caught.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    for start in range(0, len(encoded.scenes), 20):
        part = slice(start, start + 20)
        states = tower.states(tower.tokens(encoded.raw[part].to(device).float()))
        scores.append(classifier(states[:, 0, -width:]).cpu())
        query, key = (
            caught[name].unflatten(-1, (tower.config.num_attention_heads, -1)) for name in ("q_proj", "k_proj")
        )
        logits = torch.einsum("bhd,bnhd->bhn", query[:, 0].float(), key.float()) / query.shape[-1] ** 0.5
        attention = logits.softmax(-1)[..., 1:].mean(1).cpu()
        on_item = (encoded.shown[part] >= 0).cpu()
        attention = attention / attention.sum(1, keepdim=True)
        shares.append((attention * on_item).sum(1) / on_item.float().mean(1))
    for handle in handles:
        handle.remove()
    found, truth = torch.cat(scores)[:, :names], labels(encoded, words)[:, :names].long()
    precision = multilabel_average_precision(found, truth, num_labels=names, average="macro").item()
    ratio = torch.cat(shares).mean().item()
    return {
        "names_map": round(precision, 4),
        "attention_over_area": round(ratio, 3),
        "scenes": len(encoded.scenes),
        "passed": precision >= 0.8 and ratio >= 2.0,
    }


def train(recipe: Recipe, steps: int, batch: int, lr: float) -> dict:
    """Train on cached features, evaluate on test boards, write OUT/attention; returns the figures of the gate."""
    torch.manual_seed(recipe.seed)
    device = torch.device("cuda" if recipe.accelerator == "gpu" else "cpu")
    config = EfficientNetLiteClipConfig(image_size=recipe.size, side=recipe.side)
    tower = EfficientNetLiteClipTower(config).to(device)
    tower.network.load_state_dict(package_weights())
    tower.network.requires_grad_(False)
    encoded, _, test = encode_streams(tower.bfloat16(), recipe)
    tower.float().to(memory_format=torch.contiguous_format)
    mean, scale = statistics(encoded.raw)
    tower.mean.copy_(mean)
    tower.scale.copy_(scale)
    words = scene_words(recipe.spec())
    classifier = train_tower(tower.train(), encoded.to(device), words, steps, batch, lr)
    figures = gate(tower.eval(), classifier, test, words, len(recipe.spec().names))
    figures |= {"steps": steps, "batch": batch, "lr": lr, "recipe": asdict(recipe)}
    out = Path(recipe.out) / "attention"
    out.mkdir(parents=True, exist_ok=True)
    state = {n: v.half().cpu().contiguous() for n, v in tower.state_dict().items() if n.startswith(LEARNED)}
    save_file(state, out / "tower.safetensors")
    (out / "gate.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def attach(folder: Path) -> tuple[LlavaForConditionalGeneration, object]:
    """The aligned model of a folder with the trained attention tower, in bfloat16, and its processor.

    Raises:
        UserError: the tower is not trained or did not pass its gate.
    """
    path = folder / "attention" / "gate.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; run `python -m experiments.real.attention train`")
    if not json.loads(path.read_text())["passed"]:
        raise UserError(f"the attention tower did not pass its gate ({path}); leave out selectors that need it")
    plain, _ = assemble(folder)
    vision = plain.config.vision_config
    config = LlavaConfig(
        vision_config=EfficientNetLiteClipConfig(image_size=vision.image_size, side=vision.side),
        text_config=plain.config.text_config,
        image_seq_length=vision.side**2,
        image_token_index=plain.config.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    state = plain.state_dict()
    name = next(name for name in state if name.endswith("multi_modal_projector.linear_1.weight"))
    state[name] = F.pad(state[name], (0, config.vision_config.width))
    tower = {
        f"model.vision_tower.{name}": value
        for name, value in load_file(folder / "attention" / "tower.safetensors").items()
    }
    for part in ("mean", "scale"):  # keep the statistics that the projector was aligned with
        tower.pop(f"model.vision_tower.{part}")
    model.load_state_dict(state | tower)
    model.tie_weights()
    model.generation_config = plain.generation_config
    return model.eval(), real_processor(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "attach"))
    parser.add_argument("--config", type=Path, required=True, help="recipe of the alignment")
    parser.add_argument("--out", default=None, help="folder of the alignment; default: that of the recipe")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    recipe = read_recipe(args.config, args.out)
    if args.command == "train":
        figures = train(recipe, args.steps, args.batch, args.lr)
        print(json.dumps({name: value for name, value in figures.items() if name != "recipe"}))
        print("attention gate passed" if figures["passed"] else "attention gate NOT passed")
        sys.exit(0 if figures["passed"] else 1)
    model, processor = attach(Path(recipe.out))
    for part in (model, processor):
        part.save_pretrained(Path(recipe.out) / "model_cls")
    print(Path(recipe.out) / "model_cls")


if __name__ == "__main__":
    sys.exit(exit_code(main, "attention"))
