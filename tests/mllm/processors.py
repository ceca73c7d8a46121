"""Processors of every supported family, built from their classes over one small tokenizer, without a download."""

from functools import cache

import pytest
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TILES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
ADDED = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<fake_token_around_image>", "<global-img>"]
ADDED += ["<end_of_utterance>", *TILES, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
ADDED += ["<img>", "</img>", "<IMG_CONTEXT>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
ADDED += ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
TEXT = "what colour is the circle?\n\n how many  squares\n\n\n are there left of it\n"
QWEN = dict(
    image_token="<|image_pad|>",
    video_token="<|video_pad|>",
    vision_start_token="<|vision_start|>",
    vision_end_token="<|vision_end|>",
)
IDEFICS = dict(
    image_token="<image>",
    fake_image_token="<fake_token_around_image>",
    global_image_token="<global-img>",
    end_of_utterance_token="<end_of_utterance>",
)
CLIP = dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)


@cache
def _trained() -> str:
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # spaces and line breaks merge with neighbouring characters, as in real vocabularies
    raw.train_from_iterator(
        [TEXT] * 50, trainers.BpeTrainer(vocab_size=500, special_tokens=ADDED, initial_alphabet=alphabet)
    )
    return raw.to_str()


def tokenizer(**named: str) -> tf.PreTrainedTokenizerFast:
    """A byte-pair tokenizer with the added tokens of all families; `named`: tokens that processors look up by name."""
    marks = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), **marks, extra_special_tokens=named
    )


def build(family: str) -> tuple[tf.ProcessorMixin, str]:
    """The family's processor without its video processor, and the text that its chat template writes for an image."""
    frame = "<|vision_start|><|image_pad|><|vision_end|>"
    qwen = dict(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    side = {"height": 16, "width": 16}
    match family:
        case "llava":
            images = tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
            return tf.LlavaProcessor(images, tokenizer(), **CLIP), "<image>"
        case "llava_next":
            pinpoints = [[16, 32], [32, 16], [32, 32]]
            images = tf.LlavaNextImageProcessor(
                size={"shortest_edge": 16}, crop_size=side, image_grid_pinpoints=pinpoints
            )
            return tf.LlavaNextProcessor(images, tokenizer(), **{**CLIP, "patch_size": 4}), "<image>"
        case "llava_onevision":
            images = tf.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=[[16, 32], [32, 16]])
            sizes = dict(num_image_tokens=16, vision_feature_select_strategy="full")
            return tf.LlavaOnevisionProcessor(images, tokenizer(), None, **sizes), "<image>"
        case "qwen2_vl":
            return tf.Qwen2VLProcessor(tf.Qwen2VLImageProcessor(**qwen), tokenizer(**QWEN), None), frame
        case "qwen2_5_vl":
            return tf.Qwen2_5_VLProcessor(tf.Qwen2VLImageProcessor(**qwen), tokenizer(**QWEN), None), frame
        case "qwen3_vl":
            return tf.Qwen3VLProcessor(tf.Qwen2VLImageProcessor(**qwen), tokenizer(**QWEN), None), frame
        case "idefics3":
            images = tf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
            return tf.Idefics3Processor(images, tokenizer(**IDEFICS), image_seq_len=4), "<image>"
        case "smolvlm":
            pytest.importorskip("num2words")
            images = tf.SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
            return tf.SmolVLMProcessor(images, tokenizer(**IDEFICS), None, image_seq_len=4), "<image>"
        case "internvl":
            named = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>")
            images = tf.GotOcr2ImageProcessor(size=side, crop_to_patches=True, min_patches=1, max_patches=4)
            own = tokenizer(**named, video_token="<video>")
            return tf.InternVLProcessor(images, own, None, image_seq_length=4), "<IMG_CONTEXT>"
        case "mistral3":
            pytest.importorskip("torchvision")  # the processor's module cannot be imported without it
            images = tf.PixtralImageProcessor(size={"longest_edge": 32}, patch_size=4)
            return tf.PixtralProcessor(images, tokenizer(), patch_size=4, spatial_merge_size=2), "[IMG]"
        case "gemma3":
            named = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
            images = tf.Gemma3ImageProcessor(size=side)
            return tf.Gemma3Processor(images, tokenizer(**named), image_seq_length=4), "<start_of_image>"
        case _:
            images = tf.SiglipImageProcessor(size=side)
            images.image_seq_length = 4
            return tf.PaliGemmaProcessor(images, tokenizer()), "<image>"
