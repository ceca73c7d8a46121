"""Kept tokens keep their position ids, wherever a decoder's layers read them: against the decoder itself on a
shortened sequence."""

import copy

import pytest
import torch
import transformers as tf
from torch.testing import assert_close
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from evocomp.inference.hooks import compress
from evocomp.log import UserError
from tests.inference.layer_loop import assert_by_hand, expected_logits
from tests.inference.test_hooks import answer, jumble, sizes
from tests.inference.test_speculation import one_prompt
from tests.inference.tiny_models import IMAGE, PAD, TEXT, VISION, build, prompts

NEW = 4
SCALED = dict(rope_type="yarn", rope_theta=1e4, factor=2.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0)
SCALED |= dict(mscale_all_dim=1.0, llama_4_scaling_beta=0.5, original_max_position_embeddings=8)
WINDOW, HEAD = dict(sliding_window=8), dict(head_dim=8)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1)
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
LINEAR |= dict(layer_types=["linear_attention", "full_attention"] * 2)
TEXTS = {
    "llama": {},
    "mistral": WINDOW,
    "ministral3": HEAD | dict(sliding_window=None, rope_parameters=dict(SCALED)),  # scales queries by the position
    "mistral4": LATENT | EXPERTS | dict(rope_parameters=dict(SCALED), n_group=1, topk_group=1, first_k_dense_replace=1),
    "qwen2": {},
    "qwen3": HEAD,
    "gemma2": HEAD | WINDOW | dict(query_pre_attn_scalar=8),
    "gemma3_text": HEAD | WINDOW | dict(query_pre_attn_scalar=8),
    "granite": {},
    "cohere2": WINDOW,
    "olmo3": WINDOW,
    "exaone4": WINDOW,
    "smollm3": {},  # layers without rotation
    "phi3": {},
    "glm4": HEAD,
    "doge": {},  # computes with its mask, also where that is causal only
    "lfm2": dict(layer_types=["conv", "full_attention", "conv", "full_attention"], conv_L_cache=3),
    "llama4_text": HEAD | dict(num_local_experts=2, attention_chunk_size=16, intermediate_size_mlp=32),
    "qwen3_5_text": HEAD | LINEAR,  # linear attention
    "gemma4_text": HEAD | WINDOW | dict(global_head_dim=8, hidden_size_per_layer_input=0),
}
REFUSED = {
    "falcon_h1": {},
    "beam": {},
}


def llava_with(kind, settings):
    vision = tf.CLIPVisionConfig(**VISION, image_size=32, patch_size=8, projection_dim=16)
    text = tf.AutoConfig.for_model(kind, **copy.deepcopy(TEXT | settings))  # configs write into their settings
    torch.manual_seed(0)
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return livened(tf.LlavaForConditionalGeneration(config))


def livened(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                parameter.mul_(6)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    return model.eval()


def by_the_decoder(model, inputs, kept, sequences):
    """Logits of the new tokens: the decoder without hooks on the kept tokens, at their positions, without a cache."""
    seen = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda _, __, kw: seen.update(kw), with_kwargs=True)
    answer(model, inputs, max_new_tokens=1)
    hook.remove()
    ids, new = inputs["input_ids"][0], sequences[:, inputs["input_ids"].shape[1] : -1]
    stays = ids != IMAGE
    stays[(ids == IMAGE).nonzero().squeeze(1)[kept]] = True
    embeds = torch.cat([seen["inputs_embeds"][:, stays], model.get_input_embeddings()(new)], dim=1)
    after = len(ids) + torch.arange(new.shape[1])
    positions = torch.cat([seen["position_ids"][:, stays], after[None]], dim=1)
    ones = torch.ones(embeds.shape[:2], dtype=torch.long)
    with torch.no_grad():
        out = model.get_decoder()(inputs_embeds=embeds, position_ids=positions, attention_mask=ones, use_cache=False)
        return model.lm_head(out.last_hidden_state)[0, -NEW:]


@pytest.mark.parametrize("kind", TEXTS)
def test_every_text_model_inside_an_mllm(kind):
    model, inputs = llava_with(kind, TEXTS[kind]), one_prompt("llava")
    for keep in (5, 1.0):
        with compress(model, jumble, keep=keep) as handle:
            out = answer(model, inputs, max_new_tokens=NEW)
        wanted = by_the_decoder(model, inputs, handle.last.indices[0][0], out.sequences)
        assert_close(torch.cat(out.logits), wanted, rtol=1e-4, atol=1e-4 * wanted.std().item())


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_with_other_inputs_are_refused(kind):
    with pytest.raises(UserError, match="supports layers of attention.*use another model"):
        compress(llava_with(kind, REFUSED[kind]), jumble)


def mistral3_with_ministral3():
    torch.manual_seed(0)
    text = tf.Ministral3Config(**TEXT, **HEAD, sliding_window=None, rope_parameters=dict(SCALED))
    vision = tf.PixtralVisionConfig(**VISION, image_size=32, patch_size=4)
    options = dict(image_token_index=IMAGE, spatial_merge_size=2, vision_feature_layer=-1)
    config = tf.Mistral3Config(vision_config=vision, text_config=text, **options)
    return livened(tf.Mistral3ForConditionalGeneration(config))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_ministral_3_beyond_its_original_length(layer):
    model, inputs = mistral3_with_ministral3(), prompts("mistral3")
    plain = answer(model, inputs)
    with compress(model, jumble, keep=0.4, layer=layer) as handle:
        out = answer(model, inputs)
    assert_by_hand(out, expected_logits(model, inputs, sizes("mistral3"), handle.last, out.sequences, layer))
    with compress(model, jumble, keep=1.0, layer=layer):
        whole = answer(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(whole.logits, plain.logits, strict=True))


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_gaps_in_positions_are_one_sequence_for_flash_attention(family, layer):
    # it reads restarting positions as packed sequences
    model, inputs, seen = build(family), one_prompt(family), []
    block = model.get_decoder().layers[-1].self_attn
    with compress(model, jumble, keep=5, layer=layer):
        hook = block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
        )
        answer(model, inputs, max_new_tokens=1)
        hook.remove()
    if seen[0] is not None:  # with M-RoPE, the layers may get none
        (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(seen[0])
        assert starts.tolist() == [0, seen[0].shape[1]] and longest == seen[0].shape[1]
