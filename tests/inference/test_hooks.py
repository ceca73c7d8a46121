"""`compress` against the unmodified model (keep all) and against a loop over layers (pruned), for all
families."""

import pytest
import torch
from torch.testing import assert_close

from evocomp.inference.hooks import compress
from tests.inference.layer_loop import assert_by_hand, expected_logits
from tests.inference.tiny_models import FAMILIES, PICTURE_TOKENS, build, prompts, quiet

every_family = pytest.mark.parametrize("family", FAMILIES)
every_layer = pytest.mark.parametrize("layer", [0, 1, 2])
NEW = 5


def jumble(visual, text, keep):
    """A selector whose choice depends on the tokens and on the text, but on no library code."""
    return torch.sin(1e3 * visual.double().sum(-1)) + torch.sin(1e2 * (visual.double() @ text.double().mean(0)))


def answer(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": NEW, **quiet(model), **kwargs}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **kwargs)


def sizes(family):
    a, b, c = PICTURE_TOKENS[family]
    return [[a], [b, c]]


@every_family
@every_layer
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_keeping_all_changes_nothing(family, layer, attention):
    model, inputs = build(family, attention), prompts(family)
    plain, plain_beams = answer(model, inputs), answer(model, inputs, num_beams=3)
    with compress(model, jumble, keep=1.0, layer=layer) as handle:
        ours, last = answer(model, inputs), handle.last
        ours_beams = answer(model, inputs, num_beams=3)
    assert last.after == last.before == [sum(row) for row in sizes(family)]
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, plain.logits, strict=True))
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.equal(ours_beams.sequences, plain_beams.sequences)
    assert torch.equal(ours_beams.logits[-1], plain_beams.logits[-1])


@every_family
@every_layer
def test_pruned_rows_against_a_loop_over_layers(family, layer):
    # rows of different length and different kept counts, with left padding and cache; the reference has neither
    model, inputs = build(family), prompts(family)
    with compress(model, jumble, keep=0.4, layer=layer) as handle:
        out = answer(model, inputs)
    expected = expected_logits(model, inputs, sizes(family), handle.last, out.sequences, layer)
    assert_by_hand(out, expected)
    plain = answer(model, inputs)
    assert not torch.allclose(plain.logits[0], out.logits[0], atol=1e-2)


@every_family
@every_layer
def test_every_image_keeps_its_own_top_r(family, layer):
    model, inputs = build(family), prompts(family)
    with compress(model, jumble, keep=5, layer=layer, newline="drop") as handle:
        answer(model, inputs, max_new_tokens=1)
    assert [len(image) for row in handle.last.indices for image in row] == [5, 5, 5]
    assert handle.last.after == [5, 10]
    for row, scored in zip(handle.last.indices, handle.last.scores, strict=True):
        for image, scores in zip(row, scored, strict=True):
            assert torch.equal(image, image.sort().values)
            if family not in ("llava_next", "llava_onevision"):  # their indices count separators too
                dropped = torch.ones_like(scores, dtype=torch.bool).index_fill(0, image, False)
                assert scores[image].min() >= scores[dropped].max()


@every_family
@pytest.mark.parametrize("layer", [0, 2])
def test_with_and_without_cache_agree(family, layer):
    model, inputs = build(family), prompts(family)
    with compress(model, jumble, keep=0.4, layer=layer):
        cached, bare = answer(model, inputs), answer(model, inputs, use_cache=False)
    assert torch.equal(cached.sequences, bare.sequences)
    for a, b in zip(cached.logits, bare.logits, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@every_family
@pytest.mark.parametrize("layer", [0, 2])
def test_beams_agree_with_beams_without_cache(family, layer):
    model, inputs = build(family), prompts(family)
    with compress(model, jumble, keep=0.4, layer=layer):
        cached = answer(model, inputs, num_beams=3)
        bare = answer(model, inputs, num_beams=3, use_cache=False)
    assert torch.equal(cached.sequences, bare.sequences)
    assert_close(cached.sequences_scores, bare.sequences_scores, rtol=1e-4, atol=1e-4)


# transformers itself cannot run PaliGemma 2 with a static cache: it prepares a dict of masks that its model
# refuses
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "paligemma2"])
@pytest.mark.parametrize("layer", [0, 2])
def test_static_cache_agrees_with_dynamic(family, layer):
    model, inputs = build(family), prompts(family)
    with compress(model, jumble, keep=0.4, layer=layer):
        dynamic = answer(model, inputs)
        static = answer(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic.sequences, static.sequences)
    for a, b in zip(dynamic.logits, static.logits, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@every_family
def test_no_visual_token_left(family):
    model, inputs = build(family), prompts(family)
    with compress(model, jumble, keep=0, newline="drop") as handle:
        out = answer(model, inputs)
    assert handle.last.after == [0, 0]
    expected = expected_logits(model, inputs, sizes(family), handle.last, out.sequences, 0)
    for row, wanted in enumerate(expected):
        assert_close(torch.stack([step[row] for step in out.logits]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_kv_cache_is_short_from_the_layer_on(layer):
    model, inputs = build("llava"), prompts("llava")
    with compress(model, jumble, keep=4, layer=layer):
        out = answer(model, inputs, max_new_tokens=2)
    full = inputs["input_ids"].shape[1] + 1
    short = full - 2 * 12  # the longer row has two images of 16 tokens
    assert [block.keys.shape[2] for block in out.past_key_values.layers] == [full] * layer + [short] * (4 - layer)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("layer", [0, 2])
def test_one_row_without_padding(family, layer):
    # transformers then passes no mask
    model, inputs = build(family), prompts(family)
    pixels = {"qwen3_vl": 64}.get(family, 1)
    real, shape = inputs["attention_mask"][0].bool(), inputs["input_ids"].shape
    one = {name: value[:1, real] for name, value in inputs.items() if value.shape == shape}
    one["pixel_values"] = inputs["pixel_values"][:pixels]
    if family == "qwen3_vl":
        one["image_grid_thw"] = inputs["image_grid_thw"][:1]
    with compress(model, jumble, keep=0.4, layer=layer) as handle:
        out = answer(model, one)
    wanted = expected_logits(model, one, sizes(family)[:1], handle.last, out.sequences, layer)[0]
    assert_close(torch.cat(out.logits), wanted, rtol=1e-4, atol=1e-4)


def test_gaps_in_positions_are_not_read_as_packed_sequences():
    # without cache and mask, transformers reads gaps as borders of packed sequences: a plain forward pass must not
    model, inputs = build("llava"), prompts("llava")
    one = {"input_ids": inputs["input_ids"][1:], "pixel_values": inputs["pixel_values"][1:]}
    with torch.no_grad(), compress(model, jumble, keep=4) as handle:
        got = model(**one, use_cache=False, position_ids=torch.arange(one["input_ids"].shape[1])[None]).logits
    sequences = torch.cat([one["input_ids"], torch.zeros(1, 1, dtype=torch.long)], dim=1)
    wanted = expected_logits(model, one, [[16, 16]], handle.last, sequences, 0)[0]
    assert_close(got[0, -1:], wanted, rtol=1e-4, atol=1e-4)


def test_sliding_window_in_every_layer():
    # Mistral has no layer types, only a window
    from tests.inference import tiny_models

    torch.manual_seed(0)
    model = tiny_models.FAMILIES["llava_next"]().eval()
    model.get_decoder().config.sliding_window = 8
    model.generation_config.eos_token_id = None
    inputs = prompts("llava_next")
    for layer in (0, 2):
        with compress(model, jumble, keep=0.2, layer=layer) as handle:
            out = answer(model, inputs, pad_token_id=0)
        expected = expected_logits(model, inputs, sizes("llava_next"), handle.last, out.sequences, layer)
        for row, wanted in enumerate(expected):
            assert_close(torch.stack([step[row] for step in out.logits]), wanted, rtol=1e-4, atol=1e-5)


def test_static_cache_agrees_with_dynamic_where_every_layer_has_a_window():
    # the last token then attends to few real tokens of the prompt
    from tests.inference import tiny_models

    torch.manual_seed(0)
    model = tiny_models.FAMILIES["llava_next"]().eval()
    model.get_decoder().config.sliding_window = 8
    model.generation_config.eos_token_id = None
    with compress(model, jumble, keep=0.2):
        dynamic = answer(model, prompts("llava_next"), pad_token_id=0)
        options = dict(cache_implementation="static", disable_compile=True, pad_token_id=0)
        static = answer(model, prompts("llava_next"), **options)
    for a, b in zip(dynamic.logits, static.logits, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_first_full_attention_layer_may_come_after_pruning():
    # Gemma3 starts with sliding layers: masks of the whole prompt are then sized by a layer that is short
    import copy

    model, inputs = copy.deepcopy(build("gemma3")), prompts("gemma3")
    types = ["sliding_attention"] * 3 + ["full_attention"]
    model.get_decoder().config.layer_types = types
    for block, kind in zip(model.get_decoder().layers, types, strict=True):
        block.self_attn.layer_type = kind
        block.self_attn.is_sliding = kind == "sliding_attention"
        block.self_attn.sliding_window = 8 if kind == "sliding_attention" else None
    for layer in (0, 2, 3):
        with compress(model, jumble, keep=0.4, layer=layer) as handle:
            out = answer(model, inputs)
        expected = expected_logits(model, inputs, sizes("gemma3"), handle.last, out.sequences, layer)
        for row, wanted in enumerate(expected):
            assert_close(torch.stack([step[row] for step in out.logits]), wanted, rtol=1e-4, atol=1e-4)
