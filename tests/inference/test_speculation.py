"""Speculative greedy decoding equals greedy decoding, and the selector never reads a draft."""

import copy

import pytest
import torch
import transformers as tf

from evocomp.inference.handle import Handle
from evocomp.inference.hooks import compress
from tests.inference.test_hooks import jumble
from tests.inference.tiny_models import IMAGE, PAD, TEXT, build, prompts, quiet

families = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "mistral3", "gemma3", "smolvlm"])
layers = pytest.mark.parametrize("layer", [0, 2])
NEW = 12


def one_prompt(family):
    """Row 0 without padding; its words repeat, so that there are drafts from the first step on."""
    inputs = prompts(family)
    real, shape = inputs["attention_mask"][0].bool(), inputs["input_ids"].shape
    one = {name: value[:1, real] for name, value in inputs.items() if value.shape == shape}
    ids = one["input_ids"][0]
    ids[-9:] = torch.tensor([40, 41, 42, 43, 44, 45, 40, 41, 42])
    assert not (ids[-9:] == IMAGE).any()
    one["pixel_values"] = inputs["pixel_values"][: 64 if family.startswith("qwen") else 1]
    for name in ("image_grid_thw", "image_sizes"):
        if name in inputs:
            one[name] = inputs[name][:1]
    return one


def uncompressed(model):
    """A copy of the model without the copied hooks."""
    twin = copy.deepcopy(model)
    owners = {hook.__self__ for hook in twin.base_model._forward_pre_hooks.values() if hasattr(hook, "__self__")}
    for handle in [owner for owner in owners if isinstance(owner, Handle)]:
        handle.remove()
    return twin


def assert_as_greedy(model, inputs, handle, wanted, kept, **draft):
    seen = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    out = model.generate(**inputs, max_new_tokens=NEW, **{**quiet(model), **draft})
    hook.remove()
    assert torch.equal(out, wanted)
    assert [image.tolist() for image in handle.last.indices[0]] == kept
    return seen


@families
@layers
def test_prompt_lookup_is_greedy_decoding(family, layer):
    model, inputs = build(family), one_prompt(family)
    with compress(model, jumble, keep=5, layer=layer) as handle:
        wanted = model.generate(**inputs, max_new_tokens=NEW, **quiet(model))
        kept = [image.tolist() for image in handle.last.indices[0]]
        for size in (1, 2):
            draft = dict(prompt_lookup_num_tokens=4, max_matching_ngram_size=size)
            seen = assert_as_greedy(model, inputs, handle, wanted, kept, **draft)
            assert seen[0] > inputs["input_ids"].shape[1]  # the first pass had a draft


@families
@layers
@pytest.mark.parametrize("assistant", ["uncompressed", "compressed", "text"])
def test_an_assistant_is_greedy_decoding(family, layer, assistant):
    model, inputs = build(family), one_prompt(family)
    if assistant == "text" and set(inputs) & {"token_type_ids", "mm_token_type_ids"}:
        pytest.skip("transformers hands these inputs to the text model, which does not take them")
    with compress(model, jumble, keep=5, layer=layer) as handle:
        wanted = model.generate(**inputs, max_new_tokens=NEW, **quiet(model))
        kept = [image.tolist() for image in handle.last.indices[0]]
        if assistant == "text":
            torch.manual_seed(0)
            helper = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).eval()
            helper.generation_config.pad_token_id = PAD
        else:
            helper = copy.deepcopy(model) if assistant == "compressed" else uncompressed(model)
        helper.generation_config.eos_token_id = None
        helper.generation_config.assistant_confidence_threshold = 0.0
        seen = assert_as_greedy(model, inputs, handle, wanted, kept, assistant_model=helper)
        assert max(seen[1:]) > 1


@layers
def test_a_draft_may_repeat_the_placeholder(layer):
    # the words before the image occur again in the answer, so that the draft continues with the placeholder
    model, inputs = build("llava"), one_prompt("llava")
    before = inputs["input_ids"][0, (inputs["input_ids"][0] == IMAGE).nonzero()[0] - 1].item()
    others = [token for token in range(TEXT["vocab_size"]) if token not in (before, IMAGE)]
    options = dict(do_sample=False, max_new_tokens=NEW, suppress_tokens=others)
    with compress(model, jumble, keep=5, layer=layer):
        wanted = model.generate(**inputs, **options)
        drafts = []
        hook = model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: drafts.append((kwargs["input_ids"] == IMAGE).any().item()), with_kwargs=True
        )
        out = model.generate(**inputs, **options, prompt_lookup_num_tokens=4, max_matching_ngram_size=1)
        hook.remove()
    assert torch.equal(out, wanted)
    assert any(drafts[1:])
