"""`compress_inputs`: the unmodified model on shorter inputs, against itself and against `compress`."""

import pytest
import torch
from torch.testing import assert_close

from evocomp.compressor.model import EvoCompCompressor
from evocomp.inference.hooks import compress
from evocomp.inference.rewrite import compress_inputs
from evocomp.log import UserError
from evocomp.mllm import families
from tests.inference.test_hooks import answer, jumble
from tests.inference.tiny_models import FAMILIES, IMAGE, build, prompts

every_family = pytest.mark.parametrize("family", FAMILIES)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_family
def test_keeping_all_changes_nothing(family):
    model, inputs = build(family), prompts(family)
    short = compress_inputs(model, inputs, jumble, keep=1.0)
    assert torch.equal(short["input_ids"], inputs["input_ids"])
    plain, ours = answer(model, inputs), answer(model, short)
    assert same(plain.logits, ours.logits) and torch.equal(plain.sequences, ours.sequences)


@every_family
def test_equals_the_hooks_bit_for_bit(family):
    # the hooks are tested against a loop over layers
    model, inputs = build(family), prompts(family)
    with compress(model, jumble, keep=0.4) as handle:
        hooked = answer(model, inputs)
    short = compress_inputs(model, inputs, jumble, keep=0.4)
    ours, record = answer(model, short), short.compression
    assert record.after == handle.last.after
    assert all(same(a, b) for a, b in zip(record.indices, handle.last.indices, strict=True))
    assert same(ours.logits, hooked.logits)
    new = hooked.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(ours.sequences[:, short["input_ids"].shape[1] :], new)


@every_family
def test_forward_without_cache_accepts_the_inputs(family):
    # gaps in the positions must not look like borders of packed sequences
    model, inputs = build(family), prompts(family)
    short = compress_inputs(model, inputs, jumble, keep=0.4)
    logits = answer(model, short, max_new_tokens=1).logits[0]
    short["position_ids"] = short["position_ids"] + families.policy(model).forward_offset
    with torch.no_grad():
        bare = model(**short, use_cache=False).logits[:, -1]
    finite = logits.isfinite()
    assert_close(bare[finite], logits[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_mrope_has_no_gaps_in_its_text_row(family):
    # generate drops a mask without padding; without a cache, gaps would then split the prompt
    model, inputs = build(family), prompts(family)
    one = {name: value[1:] for name, value in inputs.items() if value.shape == inputs["input_ids"].shape}
    one |= {"pixel_values": inputs["pixel_values"][64:], "image_grid_thw": inputs["image_grid_thw"][1:]}
    short = compress_inputs(model, one, jumble, keep=0.4)
    cached, bare = answer(model, short), answer(model, short, use_cache=False)
    assert torch.equal(cached.sequences, bare.sequences)
    assert_close(cached.logits[-1], bare.logits[-1], rtol=1e-4, atol=1e-4)


@every_family
@pytest.mark.parametrize("newline", ["keep", "drop"])
def test_no_visual_token_left(family, newline):
    model, inputs = build(family), prompts(family)
    short = compress_inputs(model, inputs, jumble, keep=0, newline=newline)
    with compress(model, jumble, keep=0, newline=newline):
        hooked = answer(model, inputs)
    assert same(answer(model, short).logits, hooked.logits)
    if newline == "drop":
        assert not families.visual_mask(model, short["input_ids"]).any()


@every_family
def test_beams_with_equal_counts(family):
    model, inputs = build(family), prompts(family)
    short = compress_inputs(model, inputs, jumble, keep=5, newline="drop")
    with compress(model, jumble, keep=5, newline="drop"):
        hooked = answer(model, inputs, num_beams=3)
    ours = answer(model, short, num_beams=3)
    new = hooked.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(ours.sequences[:, short["input_ids"].shape[1] :], new)


@pytest.mark.parametrize("family", ["llava", "paligemma", "gemma3"])
def test_dense_positions_agree_with_the_hooks(family):
    model, inputs = build(family), prompts(family)
    short = compress_inputs(model, inputs, jumble, keep=4, positions="dense")
    with compress(model, jumble, keep=4, positions="dense"):
        hooked = answer(model, inputs)
    assert same(answer(model, short).logits, hooked.logits)


def test_labels_are_shortened_and_hidden_from_the_selector():
    model, inputs = build("llava"), prompts("llava")
    labels = inputs["input_ids"].masked_fill(torch.arange(47) < 44, -100)
    texts = []

    def spy(visual, text, keep):
        texts.append(len(text))
        return jumble(visual, text, keep)

    short = compress_inputs(model, inputs | {"labels": labels}, spy, keep=4)
    real = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    assert texts == [int(real[0].sum()) - 3] + [int(real[1].sum()) - 3] * 2
    assert torch.equal(short["labels"][:, -3:], labels[:, -3:]) and (short["labels"][:, :-3] == -100).all()
    with torch.no_grad(), compress(model, jumble, keep=4, restore_length=True):
        assert_close(model(**short).loss, model(**inputs, labels=labels).loss, rtol=1e-5, atol=1e-6)


def test_rows_without_padding_need_no_mask():
    model, inputs = build("llava"), prompts("llava")
    one = {"input_ids": inputs["input_ids"][1:], "pixel_values": inputs["pixel_values"][1:]}
    with compress(model, jumble, keep=4):
        hooked = answer(model, one)
    assert same(answer(model, compress_inputs(model, one, jumble, keep=4)).logits, hooked.logits)


def test_inputs_without_images_are_returned_unchanged():
    text = {"input_ids": torch.tensor([[1, 30]])}
    assert compress_inputs(build("llava"), text, jumble) == text


def test_gradients_reach_the_projector():
    model, inputs = build("llava"), prompts("llava")
    weight = model.base_model.multi_modal_projector.linear_2.weight
    short = compress_inputs(model, inputs, jumble, keep=4)
    (gradient,) = torch.autograd.grad(model(**short).logits.square().mean(), [weight])
    assert gradient.abs().max() > 0


def test_dense_positions_are_refused_with_mrope():
    with pytest.raises(UserError, match="M-RoPE"):
        compress_inputs(build("qwen2_vl"), prompts("qwen2_vl"), jumble, positions="dense")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"positions": "dens"}, "positions='dens'"),
        ({"newline": "kep"}, "newline='kep'"),
        ({"keep": 2.0}, "keep=2.0"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        compress_inputs(build("llava_next"), prompts("llava_next"), jumble, **arguments)


def test_settings_default_to_those_of_the_compressor():
    model, inputs = build("llava"), prompts("llava")
    compressor = EvoCompCompressor.from_mllm(model, layer=0, keep=4, positions="dense").eval()
    short = compress_inputs(model, inputs, compressor)
    told = compress_inputs(model, inputs, compressor, keep=4, positions="dense")
    assert short.compression.after == told.compression.after == [4, 8]
    assert torch.equal(short["position_ids"], told["position_ids"])
    assert short["position_ids"][1].tolist() == list(range(23))
