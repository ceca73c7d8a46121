"""Tiny random models of every supported family and prompts for them; made from config classes, no download.

Every prompt batch has two rows of different length (left padded): row 0 with one image, row 1 with two.
"""

import functools

import torch
import transformers as tf

IMAGE, VIDEO, PAD = 5, 6, 0
FAKE, TILE_1, TILE_2, GLOBAL = 7, 8, 9, 10  # Idefics3 and SmolVLM frame their tiles with these
VOCABULARY, HIDDEN, LAYERS = 128, 32, 4

VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def llava():
    vision = tf.CLIPVisionConfig(**VISION, image_size=32, patch_size=8, projection_dim=16)
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_index=IMAGE)
    return tf.LlavaForConditionalGeneration(config)


def llava_next():
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=4, projection_dim=16),
        text_config=tf.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    return tf.LlavaNextForConditionalGeneration(config)


def llava_onevision():
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=16, patch_size=4, vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 16]],
        vision_feature_layer=-1,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config)


def _qwen_ids():
    return dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=3, vision_end_token_id=4)


def qwen2_vl():
    vision = dict(depth=2, embed_dim=16, hidden_size=HIDDEN, num_heads=2, patch_size=4, mlp_ratio=2)
    text = dict(TEXT, rope_parameters=MROPE)
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(vision_config=vision, text_config=text, **_qwen_ids()))


def qwen2_5_vl():
    vision = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4)
    vision |= dict(out_hidden_size=HIDDEN, window_size=16, fullatt_block_indexes=[1])
    text = dict(TEXT, rope_parameters=MROPE)
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_qwen_ids())
    )


def qwen3_vl():
    vision = dict(depth=4, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4)
    vision |= dict(out_hidden_size=HIDDEN, num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2])
    text = dict(TEXT, head_dim=8, rope_parameters=dict(MROPE, mrope_interleaved=True))
    return tf.Qwen3VLForConditionalGeneration(tf.Qwen3VLConfig(vision_config=vision, text_config=text, **_qwen_ids()))


def idefics3():
    config = tf.Idefics3Config(
        vision_config=dict(VISION, image_size=16, patch_size=2),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return tf.Idefics3ForConditionalGeneration(config)


def smolvlm():
    config = tf.SmolVLMConfig(
        vision_config=dict(VISION, image_size=16, patch_size=2),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return tf.SmolVLMForConditionalGeneration(config)


def internvl():
    config = tf.InternVLConfig(
        vision_config=dict(VISION, image_size=[16, 16], patch_size=[2, 2]),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    return tf.InternVLForConditionalGeneration(config)


def gemma3():
    text = dict(TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    text["layer_types"] = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=32, patch_size=4, vision_use_head=False),
        text_config=tf.Gemma3TextConfig(**text),
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
    )
    return tf.Gemma3ForConditionalGeneration(config)


def paligemma():
    vision = dict(VISION, image_size=16, patch_size=4, vision_use_head=False, projection_dim=HIDDEN)
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**vision),
        text_config=tf.GemmaConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
    )
    return tf.PaliGemmaForConditionalGeneration(config)


def paligemma2():
    text = dict(TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    vision = dict(VISION, image_size=16, patch_size=4, vision_use_head=False, projection_dim=HIDDEN)
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**vision),
        text_config=tf.Gemma2Config(**text),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
    )
    return tf.PaliGemmaForConditionalGeneration(config)


def mistral3():
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**VISION, image_size=32, patch_size=4),
        text_config=tf.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return tf.Mistral3ForConditionalGeneration(config)


FAMILIES = {
    make.__name__: make
    for make in (
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        idefics3,
        smolvlm,
        internvl,
        gemma3,
        paligemma,
        paligemma2,
        mistral3,
    )
}


@functools.cache
def _built(family: str, attention: str):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.set_attn_implementation(attention)
    # otherwise random models repeat one token and hardly depend on the image
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                parameter.mul_(6)
        for name, parameter in model.named_parameters():
            if name.endswith("image_newline"):
                parameter.normal_()
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def build(family: str, attention: str = "sdpa"):
    """The tiny model of a family (one object per family and attention: tests must not change it)."""
    return _built(family, "eager" if family == "paligemma2" else attention)  # Gemma 2 supports only this one


def _pixels(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _anyres(sizes, n_tiles):
    return dict(pixel_values=_pixels(len(sizes), n_tiles, 3, 16, 16), image_sizes=torch.tensor(sizes))


def _qwen(grids, temporal=2):
    patches = sum(t * h * w for t, h, w in grids)
    pixels = _pixels(patches, 3 * temporal * 16)
    return dict(pixel_values=pixels, image_grid_thw=torch.tensor(grids))


def _tiles():
    pixels = _pixels(2, 4, 3, 16, 16)
    pixels[0, 3] = 0.0  # a padding image: row 0 has three tiles, row 1 four
    return dict(pixel_values=pixels)


def _plain(size):
    return lambda: dict(pixel_values=_pixels(3, 3, size, size))


PIXELS = {
    "llava": _plain(32),
    "llava_next": lambda: _anyres([[16, 32], [32, 16], [24, 30]], 5),
    "llava_onevision": lambda: _anyres([[16, 32], [32, 16], [12, 32]], 3),
    "qwen2_vl": lambda: _qwen([(1, 8, 8), (1, 4, 8), (1, 8, 6)]),
    "qwen2_5_vl": lambda: _qwen([(1, 8, 8), (1, 4, 8), (1, 8, 6)]),
    "qwen3_vl": lambda: _qwen([(1, 8, 8), (1, 4, 8), (1, 8, 6)]),
    "idefics3": _tiles,
    "smolvlm": _tiles,
    "internvl": lambda: dict(pixel_values=_pixels(4, 3, 16, 16)),
    "gemma3": _plain(32),
    "paligemma": _plain(16),
    "paligemma2": _plain(16),
    "mistral3": lambda: dict(
        pixel_values=_pixels(3, 3, 32, 32), image_sizes=torch.tensor([[32, 32], [16, 32], [32, 24]])
    ),
}


def _words(n, seed):
    return torch.randint(20, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def _picture(family, n):
    """Placeholder ids of one image of n tokens, with the family's start and end tokens."""
    if family in ("idefics3", "smolvlm"):
        runs = [[FAKE, name] + [IMAGE] * 16 for name in (TILE_1, TILE_2, GLOBAL)[3 - n // 16 :]]
        return sum(runs, []) + [FAKE]
    if family == "mistral3":
        rows = [[IMAGE] * 4 + [12] for _ in range(n // 4)]
        return sum(rows, [])[:-1] + [13]
    if family.startswith("paligemma"):
        return [IMAGE] * n
    return [3] + [IMAGE] * n + [4]


def prompts(family: str) -> dict[str, torch.Tensor]:
    """Processor-like inputs: row 0 with one image, row 1 with two, left padded."""
    inputs = PIXELS[family]()
    a, b, c = PICTURE_TOKENS[family]
    # PaliGemma puts images first, without separators
    first, between = ([], []) if family.startswith("paligemma") else ([1, *_words(3, 1)], _words(2, 2))
    rows = [
        [*first, *_picture(family, a), *_words(9, 3)],
        [*first, *_picture(family, b), *between, *_picture(family, c), *_words(5, 4)],
    ]
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    inputs |= dict(input_ids=ids, attention_mask=mask)
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if family.startswith("paligemma"):
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


# visual tokens of the three images
PICTURE_TOKENS = {
    "llava": (16, 16, 16),
    "llava_next": (52, 56, 70),
    "llava_onevision": (52, 56, 52),
    "qwen2_vl": (16, 8, 12),
    "qwen2_5_vl": (16, 8, 12),
    "qwen3_vl": (16, 8, 12),
    "idefics3": (48, 16, 48),
    "smolvlm": (48, 16, 48),
    "internvl": (32, 16, 16),
    "gemma3": (16, 16, 16),
    "paligemma": (16, 16, 16),
    "paligemma2": (16, 16, 16),
    "mistral3": (16, 8, 12),
}


def quiet(model) -> dict:
    """Keywords for `generate`: greedy, no generated placeholders (they would be read as images)."""
    return dict(do_sample=False, suppress_tokens=[IMAGE, VIDEO])


def processor_for_llava():
    """A processor with words w7, w8, ... for ids 7, 8, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE, "<video>": VIDEO}
    words |= {f"w{i}": i for i in range(128) if i not in words.values()}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pictures = tf.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True
    )
    return tf.LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
