"""Tiny random LLaVA models with many text decoders, built from transformers' config classes, and a sample."""

import functools

import torch
import transformers as tf

from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM

HIDDEN, VOCABULARY, IMAGE = 32, 96, 5
BEFORE, TOKENS, SEPARATE = 9, 9, 5
"""Numbers of text tokens before the image, visual tokens, and text tokens after it."""

SHORT, LONG = 6, 64
"""Attention windows: one shorter than every sequence of the sample, one longer than all."""

TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def rope(kind: str, **settings) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def row(config: str, **settings):
    """A decoder: the name of its config class, and its settings in addition to `TEXT`."""
    return functools.partial(_config, config, settings)


def _config(config: str, settings: dict):
    return getattr(tf, config)(**{**TEXT, **settings})


def windows(name: str, config: str, **settings) -> dict:
    return {f"{name}, window {size}": row(config, sliding_window=size, **settings) for size in (SHORT, LONG)}


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
LLAMA4 = dict(
    num_experts_per_tok=1,
    num_local_experts=2,
    intermediate_size_mlp=48,
    head_dim=8,
    moe_layers=[1],
    no_rope_layers=[1, 0, 1],
    layer_types=["chunked_attention", "full_attention", "chunked_attention"],
)
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0}
SCALED = dict(YARN, llama_4_scaling_beta=0.5, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)

DECODERS = {
    # full attention
    "llama": row("LlamaConfig"),
    "llama, one key head": row("LlamaConfig", num_key_value_heads=1),
    "llama, no groups": row("LlamaConfig", num_key_value_heads=4),
    "llama, wide heads, biases": row("LlamaConfig", head_dim=16, attention_bias=True, mlp_bias=True),
    "llama, gelu": row("LlamaConfig", hidden_act="gelu"),
    "llama, linear rope": row("LlamaConfig", **rope("linear", factor=2.0)),
    "llama, llama3 rope": row("LlamaConfig", **rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **YARN)),
    "llama, yarn": row("LlamaConfig", **rope("yarn", **YARN)),
    "llama, dynamic rope within its limit": row("LlamaConfig", **rope("dynamic", factor=2.0)),
    "llama, dynamic rope beyond it": row(
        "LlamaConfig", **rope("dynamic", factor=2.0), **{"max_position_embeddings": 16}
    ),
    "llama, longrope within its limit": row(
        "LlamaConfig", **rope("longrope", original_max_position_embeddings=64, **LONGROPE)
    ),
    "llama, longrope beyond it": row(
        "LlamaConfig", **rope("longrope", original_max_position_embeddings=16, **LONGROPE)
    ),
    "llama, a window that it ignores": row("LlamaConfig", sliding_window=SHORT),
    "granite, multipliers": row(
        "GraniteConfig", embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5
    ),
    "cohere": row("CohereConfig"),
    "olmo": row("OlmoConfig", clip_qkv=0.5),
    "olmo2": row("Olmo2Config"),
    "stablelm": row("StableLmConfig"),
    "glm": row("GlmConfig", head_dim=8),
    "glm4": row("Glm4Config", head_dim=8),
    "phi": row("PhiConfig"),
    "gemma": row("GemmaConfig", head_dim=8),
    "nemotron": row("NemotronConfig", head_dim=8),
    "helium": row("HeliumConfig", head_dim=8),
    "gpt_neox": row("GPTNeoXConfig"),
    "qwen3": row("Qwen3Config", head_dim=8),
    "qwen3_moe": row("Qwen3MoeConfig", head_dim=8, **MOE),
    "smollm3": row("SmolLM3Config", no_rope_layer_interval=2),
    "ministral3": row("Ministral3Config", head_dim=8, **rope("yarn", **SCALED)),
    "ministral3, scaled queries": row(
        "Ministral3Config", head_dim=8, **rope("yarn", **SCALED | {"original_max_position_embeddings": 8})
    ),
    # windows
    **windows("qwen2", "Qwen2Config", use_sliding_window=True, max_window_layers=1),
    **windows("qwen3", "Qwen3Config", use_sliding_window=True, max_window_layers=1, head_dim=8),
    **windows("qwen2_moe", "Qwen2MoeConfig", use_sliding_window=True, max_window_layers=1, **MOE),
    **windows("mistral", "MistralConfig"),
    **windows("mixtral", "MixtralConfig", **MOE),
    **windows("ministral", "MinistralConfig", head_dim=8, layer_types=MIXED),
    **windows("ministral3", "Ministral3Config", head_dim=8, **rope("yarn", **SCALED)),
    **windows("phi3", "Phi3Config"),
    **windows("starcoder2", "Starcoder2Config"),
    **windows("gemma2", "Gemma2Config", head_dim=8, query_pre_attn_scalar=8, layer_types=MIXED),
    **windows("gemma3", "Gemma3TextConfig", head_dim=8, query_pre_attn_scalar=8, layer_types=MIXED),
    **windows("cohere2", "Cohere2Config", layer_types=MIXED, head_dim=8),
    **windows("exaone4", "Exaone4Config", layer_types=MIXED),
    **windows("olmo3", "Olmo3Config", layer_types=MIXED),
    **windows("gpt_oss", "GptOssConfig", head_dim=8, layer_types=MIXED, **MOE),
    **windows(
        "qwen2_5_vl",
        "Qwen2_5_VLTextConfig",
        use_sliding_window=True,
        max_window_layers=1,
        rope_parameters=MROPE,
        tie_word_embeddings=False,
    ),
    "qwen2_vl": row("Qwen2VLTextConfig", rope_parameters=MROPE, tie_word_embeddings=False),
    "llama4, chunks of 6": row("Llama4TextConfig", attention_chunk_size=SHORT, attn_temperature_tuning=False, **LLAMA4),
    "llama4, chunks of 64": row("Llama4TextConfig", attention_chunk_size=LONG, attn_temperature_tuning=False, **LLAMA4),
    "llama4, scaled queries": row("Llama4TextConfig", floor_scale=17, attention_chunk_size=LONG, **LLAMA4),
    # layers other than attention
    "lfm2": row("Lfm2Config", layer_types=["conv", "full_attention", "conv"]),
    "qwen3_next": row(
        "Qwen3NextConfig",
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        head_dim=8,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        **MOE,
    ),
}
EAGER = ("llama, gelu", "mistral, window 6", "qwen2, window 6", "llama4, chunks of 6")
"""Decoders that are also tested with eager attention, which adds masks to the logits."""

REFUSED = {
    "llama, dynamic rope beyond it": "dynamic RoPE depends on the longest sequence",
    "llama, longrope beyond it": "longrope RoPE depends on the longest sequence",
}
"""Decoders that are refused for scoring, and a part of the error message."""


def build(name: str, attention: str | None = None) -> FrozenMLLM:
    """A LLaVA model with the named decoder. Its random weights are large enough for attention to affect the output."""
    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = DECODERS[name]()
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    if attention is None:
        attention = "eager" if name.startswith(("gpt_oss", "gemma2")) else "sdpa"
    model = tf.LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    for key, weight in model.named_parameters():
        if weight.ndim > 1 and "vision" not in key:
            torch.nn.init.normal_(weight, std=0.25)
    return FrozenMLLM(model, processor=None, name=name)


def samples(mllm: FrozenMLLM | None = None) -> list[Features]:
    """Three questions about one image, of different lengths; with M-RoPE positions if the decoder has them."""
    mrope = mllm is not None and "mrope_section" in (getattr(mllm.decoder.config, "rope_parameters", None) or {})
    generator = torch.Generator().manual_seed(1)
    visual = torch.randn(TOKENS, HIDDEN, generator=generator)
    before = torch.randint(10, VOCABULARY, (BEFORE,), generator=generator)
    found = []
    for number, (after, answer) in enumerate(((SEPARATE, 3), (3, 1), (7, 2))):
        text = torch.randint(10, VOCABULARY, (after,), generator=generator)
        ids = torch.cat([before, torch.full((TOKENS,), IMAGE), text])
        positions = torch.arange(len(ids))
        if mrope:
            positions = torch.stack([positions, positions // 2, positions % 7, positions % 5])
        found.append(
            Features(
                id=number,
                image_id="one",
                visual=visual,
                prompt_ids=ids,
                visual_at=BEFORE + torch.arange(TOKENS),
                positions=positions,
                answer_ids=torch.randint(10, VOCABULARY, (answer,), generator=generator),
            )
        )
    return found
