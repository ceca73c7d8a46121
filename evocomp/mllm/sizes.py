"""Models of real sizes with random weights for benchmarks, created on the device without a download.

Speed does not depend on the weights. Sizes follow the published configurations; `tiny_*` are for tests.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
)

from evocomp.log import UserError
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM


@dataclass(frozen=True)
class ModelShape:
    """A model and the sequence lengths [tokens] of its benchmarks.

    Attributes:
        config: creates its configuration.
        tokens: visual tokens of an image (N).
        groups: tokens kept during label search, one per group.
        kept: tokens kept at inference (R).
        before, after: text tokens before and after the image.
        answer: scored answer tokens.
        tiles: tiles that an image is split into for the vision tower; 0: the tower is not measured.
    """

    config: Callable[[], PreTrainedConfig]
    tokens: int
    groups: int
    kept: int
    before: int
    after: int
    answer: int
    tiles: int


def _llava(kind: type[PreTrainedConfig], **sizes: int) -> PreTrainedConfig:
    """LLaVA with Vicuna-7B and CLIP ViT-L/14 at 336 pixels, unless `sizes` overrides it."""
    width, heads, layers = (sizes.get(key, usual) for key, usual in (("width", 4096), ("heads", 32), ("layers", 32)))
    text = LlamaConfig(
        vocab_size=sizes.get("vocabulary", 32_064),
        hidden_size=width,
        intermediate_size=sizes.get("inner", 11_008),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
    )
    tower = sizes.get("tower", 1024)
    vision = CLIPVisionConfig(
        hidden_size=tower,
        intermediate_size=4 * tower,
        num_hidden_layers=min(24, layers),
        num_attention_heads=tower // 64,
        image_size=sizes.get("image", 336),
        patch_size=14,
        projection_dim=768,
    )
    count = (vision.image_size // vision.patch_size) ** 2
    image = min(32_000, text.vocab_size - 1)
    return kind(vision_config=vision, text_config=text, image_token_index=image, image_seq_length=count)


def _qwen(width: int = 3584, inner: int = 18_944, layers: int = 28, heads: int = 28, kv_heads: int = 4):
    """Qwen2.5-VL-7B, unless arguments override it. Its tower has one layer, because it is never run here."""
    pairs = width // heads // 2
    space = 3 * pairs // 8  # rotary pairs for height, and as many for width; the rest are for time
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [pairs - 2 * space, space, space]}
    text = {
        "vocab_size": 152_064,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 1, "hidden_size": 1280, "out_hidden_size": width})


SHAPES = {
    "llava15_7b": ModelShape(lambda: _llava(LlavaConfig), 576, 150, 64, 35, 50, 5, 1),
    "llava_next_7b": ModelShape(lambda: _llava(LlavaNextConfig), 2880, 511, 160, 35, 50, 5, 5),
    "qwen25_vl_7b": ModelShape(_qwen, 1024, 200, 128, 30, 60, 8, 0),
    "tiny_llava": ModelShape(
        lambda: _llava(LlavaConfig, width=64, inner=96, layers=2, heads=4, vocabulary=300, tower=64, image=56),
        16, 6, 4, 9, 5, 3, 1,
    ),
    "tiny_llava_next": ModelShape(
        lambda: _llava(LlavaNextConfig, width=64, inner=96, layers=2, heads=4, vocabulary=300, tower=64, image=56),
        80, 16, 8, 9, 5, 3, 5,
    ),
    "tiny_qwen": ModelShape(lambda: _qwen(width=64, inner=96, layers=2, heads=4, kv_heads=2), 16, 6, 4, 9, 5, 3, 0),
}  # fmt: skip
"""Shapes by name. Numbers of groups are those expected from untuned vocabularies; text and answer lengths are those of
short questions."""


def shape_named(name: str) -> ModelShape:
    """The shape of that name. Raises UserError if it is not in `SHAPES`."""
    if name not in SHAPES:
        raise UserError(f"--shape {name}: choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def number_format(device: torch.device | str) -> torch.dtype:
    """bfloat16 on GPUs, float32 on CPUs."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def random_model(shape: ModelShape, device: torch.device | str, layers: int | None = None) -> nn.Module:
    """A model with random weights, drawn on the device: 7B parameters take about a second on a GPU.

    Args:
        shape: which model.
        device: device of the weights.
        layers: number of decoder layers; None: all.
    """
    config = shape.config()
    if layers is not None:
        config.text_config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=number_format(device), attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def random_features(mllm: FrozenMLLM, shape: ModelShape) -> Features:
    """Random features of a question, whose visual tokens have the standard deviation of word embeddings."""
    device, table = mllm.device, mllm.vocabulary
    generator = torch.Generator(device).manual_seed(0)
    words = torch.randint(
        10, min(len(table), 32_000) - 1, (shape.before + shape.after,), generator=generator, device=device
    )
    visual = torch.randn(shape.tokens, table.shape[1], generator=generator, device=device) * table.float().std()
    asked = words[: len(words) - shape.answer]
    places = torch.full((shape.tokens,), mllm.model.config.image_token_id, device=device)
    ids = torch.cat([asked[: shape.before], places, asked[shape.before :]])
    positions = torch.arange(len(ids), device=device)
    if "mrope_section" in (getattr(mllm.decoder.config, "rope_parameters", None) or {}):
        positions = positions.expand(4, -1).clone()
    return Features(
        id=0,
        image_id="random",
        visual=visual.to(table.dtype),
        prompt_ids=ids,
        visual_at=torch.arange(shape.before, shape.before + shape.tokens, device=device),
        positions=positions,
        answer_ids=words[len(words) - shape.answer :],
    )


def pictures(shape: ModelShape, model: nn.Module, batch: int) -> Tensor:
    """Random pixels [batch * tiles, 3, side, side] in the model's number format."""
    side = model.config.vision_config.image_size
    parameter = next(model.parameters())
    return torch.randn(batch * shape.tiles, 3, side, side, device=parameter.device, dtype=parameter.dtype)
