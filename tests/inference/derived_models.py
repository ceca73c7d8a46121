"""Tiny random models of families outside the table, and prompts for them; made from config classes, no download.

Each prompt has one image, and one unpadded row.
"""

import functools
import types

import torch
import transformers as tf

from tests.inference.tiny_models import HIDDEN, IMAGE, MROPE, PAD, TEXT, VIDEO, VISION, _pixels, _qwen_ids, _words

FRAMES = dict(image_start_token_id=3, image_end_token_id=4, video_start_token_id=7, video_end_token_id=8)
WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
HEAD = dict(head_dim=8)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
LINEAR |= dict(layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"])
QWEN_VISION = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, out_hidden_size=HIDDEN)
CLIP = dict(VISION, image_size=32, patch_size=8, projection_dim=16)
SIGLIP = dict(VISION, image_size=32, patch_size=4, vision_use_head=False)


def _mrope(**more):
    return dict(TEXT, **HEAD, rope_parameters=dict(MROPE, **more))


def _prompt(tokens, before=(3,), after=(4,), **inputs):
    ids = torch.tensor([[1, *_words(3, 1), *before, *[IMAGE] * tokens, *after, *_words(8, 2)]])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)


def _with_types(inputs):
    return inputs | dict(mm_token_type_ids=(inputs["input_ids"] == IMAGE).int())


def _grid():
    return _with_types(_prompt(16, pixel_values=_pixels(64, 96), image_grid_thw=torch.tensor([[1, 8, 8]])))


def _plain(size=32, tokens=16):
    return lambda: _prompt(tokens, pixel_values=_pixels(1, 3, size, size))


def qwen3_vl_moe():
    vision = dict(QWEN_VISION, depth=4, num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2])
    config = tf.Qwen3VLMoeConfig(vision_config=vision, text_config=_mrope(mrope_interleaved=True) | MOE, **_qwen_ids())
    return tf.Qwen3VLMoeForConditionalGeneration(config), _grid()


def _qwen3_5(config, model, **more):
    vision = dict(QWEN_VISION, num_position_embeddings=64)
    text = _mrope(mrope_interleaved=True, partial_rotary_factor=1.0) | LINEAR | more
    return model(config(vision_config=vision, text_config=text, **_qwen_ids())), _grid()


def qwen3_5():
    return _qwen3_5(tf.Qwen3_5Config, tf.Qwen3_5ForConditionalGeneration)


def qwen3_5_moe():
    more = MOE | dict(shared_expert_intermediate_size=16)
    return _qwen3_5(tf.Qwen3_5MoeConfig, tf.Qwen3_5MoeForConditionalGeneration, **more)


def _glm(config, model, **more):
    vision = dict(QWEN_VISION, image_size=32)
    text = dict(TEXT, rope_parameters=dict(MROPE, partial_rotary_factor=1.0)) | more
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, **FRAMES)
    return model(config(vision_config=vision, text_config=text, **ids)), _grid()


def glm4v():
    return _glm(tf.Glm4vConfig, tf.Glm4vForConditionalGeneration)


def glm46v():
    text = dict(TEXT, model_type="glm4v_text", rope_parameters=dict(MROPE, partial_rotary_factor=1.0))
    vision = dict(QWEN_VISION, image_size=32, model_type="glm4v_vision")
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, **FRAMES)
    return tf.Glm46VForConditionalGeneration(tf.Glm46VConfig(vision_config=vision, text_config=text, **ids)), _grid()


def glm4v_moe():
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1)
    return _glm(tf.Glm4vMoeConfig, tf.Glm4vMoeForConditionalGeneration, **experts, n_group=1, topk_group=1)


def glm_ocr():
    return _glm(tf.GlmOcrConfig, tf.GlmOcrForConditionalGeneration, **HEAD)


def llava_next_video():
    config = tf.LlavaNextVideoConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=4, projection_dim=16),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    pixels = dict(pixel_values=_pixels(1, 5, 3, 16, 16), image_sizes=torch.tensor([[16, 32]]))
    return tf.LlavaNextVideoForConditionalGeneration(config), _prompt(52, **pixels)


def _vision_and_text(config, model, vision=None, text=None, **more):
    vision = tf.SiglipVisionConfig(**SIGLIP) if vision is None else vision
    text = tf.LlamaConfig(**TEXT) if text is None else text
    return model(config(vision_config=vision, text_config=text, **more)), _plain()()


def vipllava():
    more = dict(vision=tf.CLIPVisionConfig(**CLIP), image_token_index=IMAGE, vision_feature_layers=[-1, -2])
    return _vision_and_text(tf.VipLlavaConfig, tf.VipLlavaForConditionalGeneration, **more)


def video_llava():
    more = dict(vision=tf.CLIPVisionConfig(**CLIP), image_token_index=IMAGE, video_token_index=VIDEO)
    return _vision_and_text(tf.VideoLlavaConfig, tf.VideoLlavaForConditionalGeneration, **more)


def aya_vision():
    more = dict(downsample_factor=2, alignment_intermediate_size=32, adapter_layer_norm_eps=1e-6)
    text = tf.Cohere2Config(**TEXT, **WINDOW)
    return _vision_and_text(
        tf.AyaVisionConfig, tf.AyaVisionForConditionalGeneration, text=text, image_token_index=IMAGE, **more
    )


def cohere2_vision():
    more = dict(downsample_factor=2, alignment_intermediate_size=32, image_token_id=IMAGE)
    text = tf.Cohere2Config(**TEXT, **WINDOW)
    return _vision_and_text(tf.Cohere2VisionConfig, tf.Cohere2VisionForConditionalGeneration, text=text, **more)


def lfm2_vl():
    text = dict(TEXT, layer_types=["conv", "full_attention"] * 2, conv_L_cache=3, block_ff_dim=48)
    config = tf.Lfm2VlConfig(
        vision_config=tf.Siglip2VisionConfig(**VISION, num_patches=64, patch_size=4, vision_use_head=False),
        text_config=tf.Lfm2Config(**text, block_auto_adjust_ff_dim=False),
        image_token_id=IMAGE,
        downsample_factor=2,
        projector_hidden_size=32,
    )
    pixels = dict(pixel_values=_pixels(1, 64, 48), spatial_shapes=torch.tensor([[8, 8]]))
    mask = torch.ones(1, 64, dtype=torch.long)
    return tf.Lfm2VlForConditionalGeneration(config), _prompt(16, **pixels, pixel_attention_mask=mask)


def ovis2():
    config = tf.Ovis2Config(
        vision_config=dict(
            VISION, image_size=32, patch_size=4, vocab_size=40, num_visual_indicator_tokens=5, hidden_stride=2
        ),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[7, 8, 9, 10, 11],
        vocab_size=128,
        hidden_size=HIDDEN,
    )
    return tf.Ovis2ForConditionalGeneration(config), _prompt(16, (7,), (8,), pixel_values=_pixels(1, 3, 32, 32))


def idefics2():
    latents = dict(resampler_n_latents=16, resampler_depth=1, resampler_n_heads=2, num_key_value_heads=1)
    config = tf.Idefics2Config(
        vision_config=dict(VISION, image_size=32, patch_size=4),
        perceiver_config=dict(latents, resampler_head_dim=8, hidden_size=HIDDEN),
        text_config=tf.MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
    )
    return tf.Idefics2ForConditionalGeneration(config), _prompt(16, pixel_values=_pixels(1, 1, 3, 32, 32))


def janus():
    vision = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    codes = dict(embed_dim=8, num_embeddings=16, base_channels=32, channel_multiplier=[1], latent_channels=8)
    codes |= dict(num_res_blocks=1, projection_dim=HIDDEN, image_token_embed_dim=HIDDEN, num_patches=4)
    config = tf.JanusConfig(
        text_config=tf.LlamaConfig(**TEXT),
        vision_config=dict(vision, projection_dim=HIDDEN, mlp_ratio=2, depth=2),
        vq_config=codes,
        image_token_id=IMAGE,
    )
    return tf.JanusForConditionalGeneration(config), _plain()()


def deepseek_vl():
    vision = tf.SiglipVisionConfig(**dict(SIGLIP, patch_size=8))
    return _vision_and_text(
        tf.DeepseekVLConfig, tf.DeepseekVLForConditionalGeneration, vision=vision, image_token_id=IMAGE
    )


def got_ocr2():
    vision = dict(hidden_size=16, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=64)
    vision |= dict(patch_size=4, mlp_dim=32, window_size=4, global_attn_indexes=[1])
    text = tf.Qwen2Config(**TEXT)
    config = tf.GotOcr2Config(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16)
    return tf.GotOcr2ForConditionalGeneration(config), _plain(64)()


def _gemma4(**more):
    vision = dict(VISION, patch_size=4, num_key_value_heads=2, head_dim=8, position_embedding_size=64)
    text = dict(TEXT, **HEAD, **WINDOW, global_head_dim=8, hidden_size_per_layer_input=8) | more
    config = tf.Gemma4Config(
        vision_config=dict(vision, pooling_kernel_size=2, default_output_length=16),
        text_config=dict(text, vocab_size_per_layer_input=128),
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=3,
        eoi_token_id=4,
        audio_token_id=9,
        boa_token_id=10,
        eoa_token_id=11,
    )
    places = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1).view(1, 64, 2)
    inputs = _prompt(16, pixel_values=_pixels(1, 64, 48).sigmoid(), image_position_ids=places)
    return tf.Gemma4ForConditionalGeneration(config), _with_types(inputs)


def gemma4():
    return _gemma4(num_kv_shared_layers=0)


def gemma4_shared_keys():
    return _gemma4(num_kv_shared_layers=2)


def gemma4_blocks():
    return _gemma4(num_kv_shared_layers=0, hidden_size_per_layer_input=0, use_bidirectional_attention="vision")


def minicpmv4_6():
    config = tf.MiniCPMV4_6Config(
        vision_config=dict(VISION, image_size=32, patch_size=4),
        insert_layer_id=1,
        text_config=tf.Qwen3Config(**TEXT, **HEAD),
        image_token_id=IMAGE,
    )
    pixels = dict(pixel_values=_pixels(1, 3, 4, 256), target_sizes=torch.tensor([[8, 8]]))
    return tf.MiniCPMV4_6ForConditionalGeneration(config), _prompt(4, **pixels)


def llama4():
    vision = dict(VISION, image_size=32, patch_size=4, pixel_shuffle_ratio=0.5, projector_input_dim=16)
    vision |= dict(projector_output_dim=16, vision_output_dim=16, intermediate_size=64)
    text = dict(TEXT, **HEAD, num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=2)
    text |= dict(intermediate_size_mlp=48, attention_chunk_size=8, no_rope_layers=[1, 1, 1, 0])
    frame = dict(image_token_index=IMAGE, boi_token_index=3, eoi_token_index=4)
    config = tf.Llama4Config(vision_config=vision, text_config=text, **frame)
    return tf.Llama4ForConditionalGeneration(config), _plain()()


def lighton_ocr():
    config = tf.LightOnOcrConfig(
        vision_config=tf.PixtralVisionConfig(**VISION, image_size=32, patch_size=4),
        text_config=tf.Qwen3Config(**TEXT, **HEAD),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    return tf.LightOnOcrForConditionalGeneration(config), _plain()() | dict(image_sizes=torch.tensor([[32, 32]]))


def paddleocr_vl():
    vision = dict(VISION, image_size=32, patch_size=4)
    config = tf.PaddleOCRVLConfig(vision_config=vision, text_config=_mrope() | dict(use_bias=False), **_qwen_ids())
    pixels = dict(pixel_values=_pixels(64, 3, 4, 4), image_grid_thw=torch.tensor([[1, 8, 8]]))
    return tf.PaddleOCRVLForConditionalGeneration(config), _with_types(_prompt(16, **pixels))


def video_llama_3():
    config = tf.VideoLlama3Config(
        vision_config=dict(VISION, patch_size=4), text_config=tf.Qwen2Config(**TEXT), image_token_id=IMAGE
    )
    pixels = dict(pixel_values=_pixels(64, 48), image_grid_thw=torch.tensor([[1, 8, 8]]))
    return tf.VideoLlama3ForConditionalGeneration(config), _prompt(16, **pixels, image_merge_sizes=torch.tensor([2]))


def aria():
    text = dict(TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    config = tf.AriaConfig(
        vision_config=dict(VISION, image_size=32, patch_size=8, model_type="idefics3_vision"),
        text_config=text,
        projector_patch_to_query_dict={16: 4},
        image_token_index=IMAGE,
    )
    mask = dict(pixel_mask=torch.ones(1, 32, 32, dtype=torch.bool))
    return tf.AriaForConditionalGeneration(config), _plain(32, 4)() | mask


def mllama():
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2)
    vision |= dict(image_size=32, patch_size=8, max_num_tiles=1, supported_aspect_ratios=[[1, 1]])
    text = dict(TEXT, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    config = tf.MllamaConfig(
        vision_config=dict(vision, intermediate_layers_indices=[0], vision_output_dim=HIDDEN),
        text_config=text,
        image_token_index=IMAGE,
    )
    return tf.MllamaForConditionalGeneration(config), _plain(32, 1)()


BUILDERS = {
    name: make
    for name, make in list(globals().items())
    if isinstance(make, types.FunctionType) and make.__module__ == __name__ and not name.startswith("_")
}


@functools.cache
def build(name):
    """Model and prompt of a family (one object per family: leave it as you found it)."""
    torch.manual_seed(0)
    model, inputs = BUILDERS[name]()
    model.eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2 and "norm" not in key:
                parameter.mul_(4)
            if key.endswith("image_newline"):
                parameter.normal_()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    return model, inputs
