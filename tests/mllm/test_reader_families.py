"""Questions about two images of different sizes, encoded by the families' processors, against the unmodified model."""

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from evocomp.data.example import Example
from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring.answer_losses import AnswerLosses
from tests.inference.tiny_models import IMAGE, PAD, VIDEO, VOCABULARY, build
from tests.mllm.answer_logits import answer_logits

# keeps the order of images and text, as the families' own templates do
TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ ' MARK ' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
)


def tokenizer(image: str):
    names = {PAD: "<pad>", 1: "<bos>", 2: "<eos>", 3: "<|vision_start|>", 4: "<|vision_end|>"}
    names |= {IMAGE: image, VIDEO: "<video>"}
    names = {i: names.get(i, f"w{i}") for i in range(VOCABULARY)}
    tokens = Tokenizer(models.WordLevel({name: i for i, name in names.items()}, unk_token="w19"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [name for name in names.values() if name.startswith("<")]
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="w19",
        additional_special_tokens=special,
    )


class QwenProcessor:
    """Qwen's processor for images only; the original needs torchvision for videos."""

    def __init__(self, pictures, words, template: str):
        self.image_processor, self.tokenizer, self.chat_template = pictures, words, template

    def apply_chat_template(self, messages, **settings):
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **settings)

    def __call__(self, text, images, return_tensors, **settings):
        pixels = self.image_processor(images, return_tensors=return_tensors)
        (words,) = text
        for grid in pixels["image_grid_thw"]:
            words = words.replace("<|image_pad|>", " ".join(["<pad>"] * int(grid.prod() // 4)), 1)
        words = words.replace("<pad>", "<|image_pad|>")
        inputs = self.tokenizer([words], return_tensors=return_tensors, **settings)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
        return tf.BatchFeature({**inputs, **pixels})


def processor(family: str):
    if family in ("qwen2_5_vl", "qwen3_vl"):
        pictures = tf.Qwen2VLImageProcessorPil(
            patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
        )
        mark = "<|vision_start|> <|image_pad|> <|vision_end|>"
        return QwenProcessor(pictures, tokenizer("<|image_pad|>"), TEMPLATE.replace("MARK", mark))
    words = tokenizer("<image>")
    template = TEMPLATE.replace("MARK", "<image>")
    if family == "llava_next":
        pictures = tf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 16},
            crop_size={"height": 16, "width": 16},
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        )
        return tf.LlavaNextProcessor(
            pictures, words, 4, "default", chat_template=template, image_token="<image>", num_additional_image_tokens=1
        )
    pictures = tf.CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    return tf.LlavaProcessor(
        pictures, words, 8, "default", chat_template=template, image_token="<image>", num_additional_image_tokens=1
    )


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_two_images_of_different_sizes(family):
    mllm = FrozenMLLM(build(family), processor(family), family)
    rng = np.random.default_rng(0)
    one, two = (rng.integers(0, 256, (*size, 3), np.uint8) for size in ((24, 30), (16, 32)))
    example = Example(
        1, one, "a + b", "w20 w21 w22", "w30 w31", history=(("w40 w41", "w42"),),
        further_images=(two,), image_ids=("a", "b"), placed=((0, 4), (1, 0)),
    )  # fmt: skip
    (features,) = mllm.features([example])
    assert len(features.counts) == 2 and sum(features.counts) == len(features.visual) > 8
    alone = mllm.features([Example(2, two, "b", "w20", "w30")])[0]
    assert torch.equal(features.visual[features.counts[0] :], alone.visual) or torch.allclose(
        features.visual[features.counts[0] :], alone.visual, atol=1e-5
    )
    mark = int(features.visual_at[0])
    assert mllm.processor.tokenizer.decode(features.prompt_ids[:mark]).split()[0] == "w40"
    first = {"type": "text", "text": "w40 "}
    text = mllm.processor.apply_chat_template(
        [
            {"role": "user", "content": [first, {"type": "image"}, {"type": "text", "text": "w41"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "w42"}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w20 w21 w22"}]},
        ],
        tokenize=False,
    )
    inputs = mllm.processor(text=[text], images=[Image.fromarray(one), Image.fromarray(two)], return_tensors="pt")
    assert torch.equal(features.prompt_ids, inputs["input_ids"][0])
    answer = features.answer_ids
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[None, :-1]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    with torch.no_grad():
        logits = mllm.model(**inputs).logits[0, -len(answer) :].float()
    kept = torch.arange(len(features.visual))[None]
    ours = answer_logits(mllm, features, features.visual[None], kept)[0]
    assert torch.allclose(ours, logits, atol=2e-4), float((ours - logits).abs().max())
    loss = torch.nn.functional.cross_entropy(logits, answer)
    assert torch.allclose(AnswerLosses(mllm).candidates(features, kept), loss[None], atol=1e-4)
