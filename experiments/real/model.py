"""SmolLM2 with an image encoder: a `LlavaForConditionalGeneration` with EfficientNet-Lite2 and SmolLM2-135M.

49 visual tokens (224 pixels, side 7), 196 (224, 14) or 576 (384, 24, as many as LLaVA-1.5). transformers' LLaVA class
accepts the registered CNN tower, so EvoComp needs no code for this model.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from experiments.real.efficientnet import MEAN, STD, EfficientNetLiteConfig, package_weights
from experiments.real.smollm2 import smollm2_folder

# a special token of SmolLM2 that conversations never contain, so that the tied embeddings need no new row
IMAGE_TOKEN = "<empty_output>"
# image, question, answer: the shortest template, because all its tokens are processed in each of 528 forward passes
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def question_text(question: str) -> str:
    """The text between image and answer in the template."""
    return f"\n{question}\n"


def real_config(side: int = 7, image_size: int = 224) -> LlavaConfig:
    """Configuration for `side` x `side` visual tokens of images with `image_size` pixels per side."""
    text = AutoConfig.from_pretrained(smollm2_folder())
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    return LlavaConfig(
        vision_config=EfficientNetLiteConfig(image_size=image_size, side=side),
        text_config=text,
        image_seq_length=side * side,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )


def build_real(
    side: int = 7, image_size: int = 224, dtype: torch.dtype = torch.bfloat16
) -> LlavaForConditionalGeneration:
    """Pretrained tower and LLM with a new projector. Raises `UserError` if a package is missing."""
    model = LlavaForConditionalGeneration(real_config(side, image_size))
    llm = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.tie_weights()
    model.model.vision_tower.network.load_state_dict(package_weights())
    model.generation_config = llm.generation_config
    model.generation_config.max_new_tokens = 8
    return model.to(dtype).eval()


def real_processor(config: LlavaConfig) -> LlavaProcessor:
    """Processor with SmolLM2's tokenizer and ImageNet's normalisation."""
    vision = config.vision_config
    pictures = CLIPImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size},
        do_center_crop=False,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=AutoTokenizer.from_pretrained(smollm2_folder()),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_feature_select_strategy == "default"),  # a class token
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def eyes(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The aligned weights other than LoRA: the projector, and mean and scale of the tower's features."""
    tower = model.model.vision_tower
    state = {f"projector.{name}": value for name, value in model.model.multi_modal_projector.state_dict().items()}
    return {**state, "tower.mean": tower.mean, "tower.scale": tower.scale}


def save_eyes(model: LlavaForConditionalGeneration, path: Path, dtype: torch.dtype = torch.float16) -> None:
    save_file({name: value.to("cpu", dtype).contiguous() for name, value in eyes(model).items()}, path)


def load_eyes(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Load saved projector and feature statistics into a model of the same `side`."""
    state = load_file(path)
    projector = {name.removeprefix("projector."): v for name, v in state.items() if name.startswith("projector.")}
    model.model.multi_modal_projector.load_state_dict(projector)
    for name in ("mean", "scale"):
        getattr(model.model.vision_tower, name).copy_(state[f"tower.{name}"])


def pixels(images, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images [size, size, 3] uint8, normalised as by the processor: [B, 3, size, size]."""
    return normalised(torch.from_numpy(np.stack(images)), dtype)


def normalised(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As `pixels`, for images [B, size, size, 3] uint8 on any device."""
    batch = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return ((batch - mean) / std).to(dtype)
