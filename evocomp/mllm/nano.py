"""The nano MLLMs: instances of `LlavaForConditionalGeneration` that are trained to answer questions about images.

They are small enough to ship: a CLIP tower (patch size 8), a two-layer projector and a Llama of three layers, 0.7 M
parameters. `nano` takes images of 96 x 96 pixels (144 visual tokens); `nano576` takes 192 x 192 pixels (576 visual
tokens) and also reads words in the image. They answer the questions of `evocomp.data.scenes`. Their weights in
`evocomp/assets/` are ordinary Hugging Face folders; `experiments/nano_mllm.py` trains them from scratch.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from evocomp.data.scenes import COLORS, SHAPES, SIGN, SIGN_WORDS

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>")
WORDS = (
    *SPECIAL,
    *COLORS,
    *SHAPES,
    *(str(digit) for digit in range(10)),
    # the last words occur in no question: like every real vocabulary, this one has rows that are never trained
    *"color shape digit on with of any how many left right above below yes no".split(),
    *"what is the there a things nothing word in text".split(),
)
# vocabulary of a model that reads words on signs; `WORDS` come first, so their ids are the same
READING_WORDS = (*WORDS, SIGN, *SIGN_WORDS)
# images and text in the order of the message; each answer ends with <eos>
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image> ' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<eos> ' }}{% endif %}{% endfor %}"
)


def nano_config(
    image_size: int = 96,
    patch: int = 8,
    width: int = 96,
    layers: int = 3,
    heads: int = 3,
    words: Sequence[str] = WORDS,
) -> LlavaConfig:
    """Configuration of a nano MLLM; `image_size` and `patch` in pixels, `width` is the hidden size of tower and LLM."""
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch,
        projection_dim=width,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        pad_token_id=WORDS.index("<pad>"),
        bos_token_id=WORDS.index("<bos>"),
        eos_token_id=WORDS.index("<eos>"),
        tie_word_embeddings=False,
        # with a large RoPE base, attention between distant text and image tokens is learned much faster
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_seq_length=(image_size // patch) ** 2,
        image_token_index=WORDS.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def build_nano(config: LlavaConfig, generator: torch.Generator) -> LlavaForConditionalGeneration:
    """A nano MLLM with random weights, initialised for training from scratch at this size."""
    model = LlavaForConditionalGeneration(config)
    side = config.vision_config.image_size // config.vision_config.patch_size
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "position_embedding" in name:
                nn.init.normal_(weight, std=0.02, generator=generator)
                weight[1:] = 0.5 * _grid_sinusoids(side, weight.shape[1])
            elif "class_embedding" in name:
                nn.init.normal_(weight, std=0.02, generator=generator)
            elif "embed_tokens" in name:
                nn.init.normal_(weight, std=0.5, generator=generator)
            elif "lm_head" in name:
                nn.init.normal_(weight, std=0.02, generator=generator)
            elif weight.ndim >= 2:
                fan_in = weight[0].numel()
                gain = 1.0 if "patch_embedding" in name or "projector" in name else 0.7
                nn.init.normal_(weight, std=gain * fan_in**-0.5, generator=generator)
    return model


def _grid_sinusoids(side: int, width: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine position embeddings [side * side, width] of the patch grid."""
    wavelengths = 100 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    x, y = columns.flatten()[:, None] * wavelengths, rows.flatten()[:, None] * wavelengths
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


def nano_processor(config: LlavaConfig, words: Sequence[str] = WORDS) -> LlavaProcessor:
    """Processor of a nano MLLM: a word-level tokenizer and an image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessorPil

    vocabulary = {word: i for i, word in enumerate(words)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=2048,
    )
    size = config.vision_config.image_size
    image_processor = CLIPImageProcessorPil(
        size={"height": size, "width": size},
        do_center_crop=False,
        image_mean=[0.45] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
