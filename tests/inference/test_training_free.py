"""Selectors by name in `compress`: the same selections as in the panel, alone and in batches."""

import copy
import socket
import threading

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import LlavaForConditionalGeneration, MistralConfig

from evocomp.compressor.model import EvoCompCompressor
from evocomp.evaluation.panel import Panel, Rival
from evocomp.inference import card, names
from evocomp.inference.generate import timed_generate
from evocomp.inference.hooks import compress
from evocomp.inference.pick import LLMInput
from evocomp.inference.rewrite import compress_inputs
from evocomp.inference.training_free import distinct
from evocomp.log import UserError
from evocomp.mllm import families
from evocomp.selection import SELECTORS, selector, selector_for_depth
from tests.inference.test_hooks import answer
from tests.inference.tiny_models import FAMILIES, IMAGE, build, processor_for_llava, prompts

TOKENS_ONLY = ("random_tokens", "uniform_stride", "average_pool", "tome", "divprune")
DECODER = ("fastv", "sparsevlm", "pyramiddrop", "dart")
TOWER = ("cls_attention", "prumerge", "prumerge_plus", "hired", "visionzip", "vispruner")
MERGES = ("average_pool", "tome", "prumerge", "prumerge_plus", "visionzip")
USABLE = {
    "llava": {*TOKENS_ONLY, *TOWER, *DECODER},
    "qwen2_5_vl": {*TOKENS_ONLY, *DECODER},
    "smolvlm": {*TOKENS_ONLY, *DECODER},
}
usable_with_llava = pytest.mark.parametrize("name", [name for name in SELECTORS if name in USABLE["llava"]])


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("family", USABLE)
def test_every_name_gives_a_result_or_one_line(family, name):
    model, inputs = build(family), prompts(family)
    if name not in USABLE[family]:
        with pytest.raises(UserError) as error:
            compress(model, name, keep=4)
        text = str(error.value)
        assert text.startswith(f"{name} needs ") and "\n" not in text
        named = text.rsplit(": ", 1)[1].split(", ")
        assert set(named) == USABLE[family]
        return
    before = hooks(model)
    with compress(model, name, keep=4) as handle:
        out = answer(model, inputs)
    assert out.sequences.shape[1] > inputs["input_ids"].shape[1]
    images = sum(handle.last.indices, [])
    assert len(images) == 3 and all(len(index) == 4 for index in images)
    assert all(bool((index.diff() > 0).all()) for index in images)
    assert bool(handle.last.merged) == (name in MERGES)
    assert hooks(model) == before


def hooks(model) -> int:
    """Hooks on all modules, except those of transformers that record hidden states."""
    found = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return sum("output_capturing" not in getattr(hook, "__name__", "") for hook in found)


# ------------------------------------------------------------ against the panel


def kept_by_panel(panel, name, kept, context=0.0, number=0):
    rival = Rival(selector_for_depth(name, len(panel.mllm.decoder.layers)), name, sharp=context)
    with torch.no_grad():
        return panel._select(rival, panel.asked[number], kept)


@usable_with_llava
@pytest.mark.parametrize("kept", [5, 16, 40])
def test_same_selection_and_answer_as_the_panel(nano, questions, name, kept):
    panel = Panel(nano, questions[:3])
    for number, example in enumerate(questions[:3]):
        shown = kept_by_panel(panel, name, kept, number=number)
        with compress(nano.model, name, keep=kept) as handle:
            given = nano.model(**nano._process(example)).logits[0, -1]
        (index,) = handle.last.indices[0]
        if name == "random_tokens":
            assert len(index) == kept  # the panel's random numbers depend on the question's index
            continue
        if name in MERGES:
            (merged,) = handle.last.merged
            assert torch.equal(merged.origin - panel.asked[number].features.visual_at[0], shown.places)
            assert_close(merged.tokens, shown.tokens, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(index, shown.places)
        _, logits = nano.answer([(panel.asked[number].features, *shown)], max_new_tokens=1)
        assert_close(given, logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in SELECTORS if name in USABLE["llava"] and name not in MERGES])
@pytest.mark.parametrize("context", [0.25, 12])
def test_context_tokens_are_those_of_the_panel(nano, questions, name, context):
    panel = Panel(nano, questions[:2])
    for number, example in enumerate(questions[:2]):
        shown = kept_by_panel(panel, name, 16, context, number)
        with compress(nano.model, name, keep=16, context=context) as handle:
            given = nano.model(**nano._process(example)).logits[0, -1]
        assert handle.last.after == [16] and int(handle.last.sizes[0][0].sum()) == 144
        if name == "random_tokens":
            continue
        assert torch.equal(handle.last.indices[0][0], shown.places)
        assert_close(handle.last.sizes[0][0].float().log(), shown.log_size)
        _, logits = nano.answer([(panel.asked[number].features, *shown)], max_new_tokens=1)
        assert_close(given, logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MERGES)
def test_merging_selectors_take_no_context_and_no_later_layer(name):
    with pytest.raises(UserError, match=f"{name} merges tokens itself"):
        compress(build("llava"), name, keep=4, context=0.25)
    with pytest.raises(UserError, match=f"{name} merges tokens before the LLM; use layer=0"):
        compress(build("llava"), name, keep=4, layer=1)
    with compress(build("llava"), name, keep=4, context=0) as handle:
        answer(build("llava"), prompts("llava"), max_new_tokens=1)
    assert handle.last.sizes == [[None], [None, None]]


def test_context_goes_with_functions_and_replaces_that_of_a_compressor(nano, questions):
    example = questions[0]
    panel = Panel(nano, [example])
    torch.manual_seed(0)
    saved = EvoCompCompressor.from_mllm(nano.model, budget_input=True, dither=0.5, sharp=1 / 6).eval()
    wanted = copy.deepcopy(saved)
    wanted.config.sharp = 0.25
    (shown,) = panel.compressor_tokens(wanted, 16)
    with compress(nano.model, saved, keep=16, context=0.25) as handle:
        nano.model(**nano._process(example))
    assert torch.equal(handle.last.indices[0][0], shown.places)
    assert_close(handle.last.sizes[0][0].float().log(), shown.log_size)
    assert saved.config.sharp == 1 / 6
    with compress(nano.model, saved, keep=16, context=0) as handle:
        nano.model(**nano._process(example))
    assert handle.last.sizes == [[None]]

    told = []

    def function(visual, text, keep):
        told.append(keep)
        return selector_scores(visual)

    def selector_scores(visual):
        chosen = selector("divprune")(inputs_of(visual), told[-1]).indices
        return torch.zeros(len(visual)).index_fill(0, chosen, 1.0)

    with compress(nano.model, function, keep=16, context=0.25) as handle:
        nano.model(**nano._process(example))
    assert told == [11]  # 16 * 36 / (16 + 36)
    expected = kept_by_panel(panel, "divprune", 16, 0.25)
    assert torch.equal(handle.last.indices[0][0], expected.places)
    assert_close(handle.last.sizes[0][0].float().log(), expected.log_size)


def inputs_of(visual):
    from evocomp.selection.base import SelectionInputs

    return SelectionInputs(tokens=visual, grid=(1, len(visual)))


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), True, "0.25"])
def test_invalid_context_is_refused(bad):
    with pytest.raises(UserError, match="context=.*: give the maximum number of selected tokens"):
        compress(build("llava"), "divprune", context=bad)


@pytest.mark.parametrize("family", FAMILIES)
def test_context_in_every_family(family):
    model = build(family)
    with compress(model, "divprune", keep=6, context=4, newline="drop") as handle:
        answer(model, prompts(family), max_new_tokens=2)
    with compress(model, "divprune", keep=6) as kept:
        answer(model, prompts(family), max_new_tokens=1)
    tokens = sum(handle.last.before) - (sum(kept.last.after) - 3 * 6)  # without separators
    for picked, sizes in zip(sum(handle.last.picked, []), sum(handle.last.sizes, []), strict=True):
        assert len(picked) == len(sizes) == 6
        assert int((sizes == 1).sum()) >= 2, "6 * 4 / (6 + 4) are selected"
        tokens -= int(sizes.sum())
    assert tokens == 0


class MergingPicker:
    def pick(self, visual, text, keep):
        owner = [torch.zeros(len(v), dtype=torch.long) for v in visual]
        return [(torch.arange(r), None, one) for one, r in zip(owner, keep, strict=True)]


def test_a_merging_selector_refuses_context():
    with (
        compress(build("llava"), MergingPicker(), keep=4, context=0.5),
        pytest.raises(UserError, match="merges tokens itself"),
    ):
        answer(build("llava"), prompts("llava"))


# ------------------------------------------------------------ batches


def alone(inputs, row, images):
    """One row of the batch without its padding, with its own images."""
    real = inputs["attention_mask"][row].bool()
    return {
        "input_ids": inputs["input_ids"][row : row + 1, real],
        "attention_mask": inputs["attention_mask"][row : row + 1, real],
        "pixel_values": inputs["pixel_values"][images],
    }


@usable_with_llava
@pytest.mark.parametrize("context", [None, 0.5])
def test_same_selection_alone_and_in_a_batch(name, context):
    if context and name in MERGES:
        context = 0
    model, inputs = build("llava"), prompts("llava")
    with compress(model, name, keep=5, context=context) as handle:
        both = answer(model, inputs)
        of_both = handle.last
        for row, images in ((0, slice(0, 1)), (1, slice(1, 3))):
            one = answer(model, alone(inputs, row, images))
            assert all(torch.equal(a, b) for a, b in zip(handle.last.indices[0], of_both.indices[row], strict=True)), (
                name
            )
            for a, b in zip(one.logits, both.logits, strict=True):
                assert_close(a[0], b[row], rtol=1e-3, atol=1e-3)


@usable_with_llava
def test_with_and_without_cache_and_with_beams(name):
    model, inputs = build("llava"), prompts("llava")
    with compress(model, name, keep=5):
        for beams in (1, 3):
            cached = answer(model, inputs, num_beams=beams)
            bare = answer(model, inputs, num_beams=beams, use_cache=False)
            assert torch.equal(cached.sequences, bare.sequences)
            assert_close(cached.logits[0], bare.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fastv", "dart", "visionzip", "vispruner"])
def test_a_static_cache_agrees(name):
    model, inputs = build("llava"), prompts("llava")
    with compress(model, name, keep=5):
        dynamic = answer(model, inputs)
        static = answer(model, inputs, cache_implementation="static", disable_compile=True)
    for a, b in zip(dynamic.logits, static.logits, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "smolvlm", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl", "mistral3"])
def test_decoder_attention_is_that_of_each_image_of_a_padded_batch(family):
    """FastV's ranking from the attention that transformers itself returns."""
    model, inputs = build(family, "eager"), prompts(family)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions[1]
        encoded = families.encode(model, inputs)
    numbers = families.image_numbers(model, inputs["input_ids"], encoded)
    tokens = families.visual_tokens(model, inputs["input_ids"], encoded)
    separators = torch.zeros_like(numbers, dtype=torch.bool)
    separators[numbers >= 0] = families.newline_rows(model, tokens)
    with compress(build(family), "fastv", keep=4, newline="drop") as handle:
        answer(build(family), inputs, max_new_tokens=1)
    for image, (row, picked) in enumerate(zip((0, 1, 1), sum(handle.last.picked, []), strict=True)):
        own = ((numbers[row] == image) & ~separators[row]).nonzero().squeeze(1)
        expected = attentions[row, :, -1, own].mean(0).topk(4).indices.sort().values
        assert torch.equal(picked, expected)


def test_only_the_layers_that_a_selector_reads_are_run():
    model, runs = build("llava"), []
    hooks = [
        layer.register_forward_hook(lambda *_, n=number: runs.append(n))
        for number, layer in enumerate(model.get_decoder().layers)
    ]
    try:
        with compress(model, "fastv", keep=4):
            runs.clear()  # compress() has tested on a short sequence that it reads this decoder correctly
            answer(model, prompts("llava"), max_new_tokens=1)
    finally:
        for hook in hooks:
            hook.remove()
    assert runs == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize("name", ["fastv", "cls_attention"])
def test_threads_are_independent(name):
    """Different prompts of different lengths, many times at once."""
    model, inputs = build("llava"), prompts("llava")
    rows = [alone(inputs, 0, slice(0, 1)), alone(inputs, 1, slice(1, 3))]
    rows += [{**row, "pixel_values": row["pixel_values"] * -1} for row in rows]
    asked = [llm_input(model, row, families.encode(model, row)) for row in rows]
    found = []

    def ask(number, times):
        for _ in range(times):
            with torch.no_grad():
                families.encode(model, rows[number])
                found.append((number, picked(handle.picker, asked[number])))

    with compress(model, name, keep=4) as handle:
        for number in range(4):
            ask(number, 1)
        wanted = dict(found)
        threads = [threading.Thread(target=ask, args=(number, 15)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 64 and all(kept == wanted[number] for number, kept in found)


def llm_input(model, inputs, encoded):
    ids = inputs["input_ids"]
    visual = ids == IMAGE
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter(visual[..., None], families.visual_tokens(model, ids, encoded)).detach()
    indices = visual[0].nonzero().squeeze(1).split(16)
    return LLMInput(embeds, ~visual, visual, None, [0] * len(indices), list(indices))


def picked(picker, given):
    visual = [given.embeds[0, index] for index in given.indices]
    text = [given.embeds[0, given.text[0]]] * len(visual)
    return [pick.kept.tolist() for pick in picker.pick(visual, text, [4] * len(visual), llm_input=given)]


def test_a_prompt_without_text_after_the_image_is_refused():
    model, inputs = build("llava"), prompts("llava")
    last = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    with compress(model, "fastv", keep=4), pytest.raises(UserError, match="ranks by the text after the image"):
        model(
            input_ids=inputs["input_ids"][:1, :last],
            attention_mask=inputs["attention_mask"][:1, :last],
            pixel_values=inputs["pixel_values"][:1],
        )


def test_a_sliding_window_shorter_than_the_prompt_is_refused():
    config = copy.deepcopy(build("llava").config)
    shared = {key: getattr(config.text_config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    shared |= {key: getattr(config.text_config, key) for key in ("num_hidden_layers", "num_attention_heads")}
    config.text_config = MistralConfig(**shared, num_key_value_heads=2, sliding_window=8, head_dim=8)
    model = LlavaForConditionalGeneration(config).eval()
    with compress(model, "fastv", keep=4), pytest.raises(UserError, match="window of 8 .*use one of .*divprune"):
        model(**prompts("llava"))


# ------------------------------------------------------------ the tower


def test_stale_encodings_are_refused():
    model, inputs = build("llava"), prompts("llava")
    encoded = families.encode(model, inputs)
    given = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with compress(model, "cls_attention", keep=4) as handle:
        with pytest.raises(UserError, match="has not run on these images since"):
            model(**given, mm_encoder_outputs=encoded)
        encoded = families.encode(model, inputs)
        model(**given, mm_encoder_outputs=encoded)
        first = handle.last.indices
        model(**inputs)
        assert all(torch.equal(a, b) for a, b in zip(sum(first, []), sum(handle.last.indices, []), strict=True))
        families.encode(model, {**inputs, "pixel_values": inputs["pixel_values"] + 1})
        with pytest.raises(UserError, match="has not run on these images since"):
            model(**given, mm_encoder_outputs=encoded)


@pytest.mark.parametrize("name", ["cls_attention", "visionzip", "fastv", "divprune"])
def test_timed_answers_with_selectors(name):
    from PIL import Image

    model, image = copy.deepcopy(build("llava")), Image.new("RGB", (40, 30), (200, 30, 60))
    model.generation_config.suppress_tokens = [IMAGE]
    with compress(model, name, keep=4) as handle:
        timed = timed_generate(model, processor_for_llava(), image, "w30 w31", handle, max_new_tokens=3)
    assert (timed.before, timed.after) == (16, 4) and timed.compressor > 0


@pytest.mark.parametrize("name", [*TOKENS_ONLY, *TOWER, *DECODER])
def test_shorter_inputs_hold_the_same_tokens(name):
    model, inputs = build("llava"), prompts("llava")
    if name in MERGES:
        with pytest.raises(UserError, match=f"{name} merges tokens.*use evocomp.compress"):
            compress_inputs(model, inputs, name, keep=4)
        return
    with compress(model, name, keep=4) as handle:
        answer(model, inputs, max_new_tokens=1)
    before = hooks(model)
    short = compress_inputs(model, inputs, name, keep=4)
    for ours, theirs in zip(sum(short.compression.indices, []), sum(handle.last.indices, []), strict=True):
        assert torch.equal(ours, theirs)
    assert hooks(model) == before


@given(st.lists(st.integers(0, 9), min_size=1, max_size=10))
def test_indices_of_merged_tokens_are_distinct_and_near(positions):
    positions = torch.tensor(sorted(positions))
    index = distinct(positions, 10)
    assert bool((index.diff() > 0).all()) and 0 <= index[0] and index[-1] < 10
    if len(set(positions.tolist())) == len(positions):
        assert torch.equal(index, positions)


# ------------------------------------------------------------ names


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to reach another machine; none succeeds."""
    tried = []

    def refuse(*call, **_):
        tried.append(call)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tried


def test_names_are_resolved_without_the_network(no_network, monkeypatch, tmp_path):
    model = build("llava")
    for name in SELECTORS:
        try:
            compress(model, name, keep=4).remove()
        except UserError as error:
            assert str(error).startswith(f"{name} needs ")
    with pytest.raises(UserError, match="'divprun' is no selector.*did you mean 'divprune'.*tome.*nano.*owner/name"):
        compress(model, "divprun", keep=4)
    with pytest.raises(UserError, match="'llama' is no selector, shipped compressor or folder; selectors"):
        compress(model, "llama", keep=4)
    monkeypatch.chdir(tmp_path)
    EvoCompCompressor.from_mllm(model).save_pretrained("mine")
    compress(model, "mine", keep=4).remove()
    assert not no_network
    with pytest.raises(UserError, match="no compressor at owner/none"):
        compress(model, "owner/none", keep=4)
    assert no_network, "the test would see it"


def test_a_shipped_compressor_loads_by_its_name(no_network, monkeypatch, tmp_path):
    model = build("llava")
    torch.manual_seed(0)
    compressor = EvoCompCompressor.from_mllm(model, keep=3, sharp=2)
    monkeypatch.setitem(names.SHIPPED, "tiny", tmp_path / "tiny")
    with pytest.raises(UserError, match="'tiny' is missing from this installation"):
        compress(model, "tiny")
    card.save(compressor, tmp_path / "tiny", data="drawn scenes")
    with compress(model, "tiny") as named, torch.no_grad():
        model(**prompts("llava"))
    with compress(model, compressor) as given, torch.no_grad():
        model(**prompts("llava"))
    assert named.keep == 3 and named.picker.compressor.config.metadata == {"data": "drawn scenes"}
    assert_close(named.last.scores[0][0], given.last.scores[0][0])
    assert not no_network


def test_a_folder_of_a_selectors_name_is_given_as_a_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    EvoCompCompressor.from_mllm(build("llava")).save_pretrained("divprune")
    with compress(build("llava"), "divprune", keep=4) as by_name:
        pass
    with compress(build("llava"), "./divprune", keep=4) as by_path:
        pass
    assert not hasattr(by_name.picker, "compressor") and hasattr(by_path.picker, "compressor")
