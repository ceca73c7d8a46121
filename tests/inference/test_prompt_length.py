"""The same prompt keeps the same tokens in all kinds of calls, and an answer is never read as part of the prompt."""

import copy

import pytest
import torch
from torch.testing import assert_close

from evocomp.inference.hooks import compress
from evocomp.log import UserError
from tests.inference.layer_loop import expected_logits
from tests.inference.test_hooks import answer, jumble, sizes
from tests.inference.tiny_models import IMAGE, PAD, VIDEO, build, prompts, quiet

some_families = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mistral3", "gemma3", "smolvlm", "internvl"])
NEW = 4


def with_answer(inputs, tokens, right=0):
    """The prompt with answer tokens [B,A] after it; the last `right` columns of row 0 are padding."""
    new = torch.ones_like(tokens)
    if right:
        tokens, new = tokens.clone(), new.clone()
        tokens[0, -right:], new[0, -right:] = PAD, 0
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], tokens], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], new], dim=1),
    }
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            longer[name] = torch.nn.functional.pad(inputs[name], (0, tokens.shape[1]))
    return inputs | longer


def labels_of(inputs, longer):
    start = inputs["input_ids"].shape[1]
    labels = longer["input_ids"].clone()
    labels[:, :start] = -100
    return labels


def kept(handle):
    return [image.tolist() for row in handle.last.indices for image in row]


# the image tokens of the tiny Gemma 3 are nearly equal, so that its choice would never change
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mistral3", "paligemma", "smolvlm", "internvl"])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_same_prompt_keeps_the_same_tokens(family, layer):
    model, inputs = build(family), prompts(family)
    with torch.no_grad(), compress(model, jumble, keep=5, layer=layer, restore_length=True) as handle:
        out = answer(model, inputs, max_new_tokens=NEW)
        wanted, start = kept(handle), inputs["input_ids"].shape[1]
        longer = with_answer(inputs, out.sequences[:, start:])
        labels = labels_of(inputs, longer)
        end_of_turn = labels.clone()
        end_of_turn[:, -1] = -100  # chat templates end with one or two tokens that are not trained
        ways = {
            "uncached": lambda: answer(model, inputs, use_cache=False),
            "beams": lambda: answer(model, inputs, num_beams=2),
            "static": lambda: answer(model, inputs, cache_implementation="static", disable_compile=True),
            "forward": lambda: model(**inputs),
            "labels": lambda: model(**longer, labels=labels),
            "labels, end of turn": lambda: model(**longer, labels=end_of_turn),
            "logits_to_keep": lambda: model(**longer, logits_to_keep=NEW + 1),
            "prompt_length": lambda: model(**longer, prompt_length=start),
            "prompt_length of each row": lambda: model(**longer, prompt_length=torch.tensor([start, start])),
        }
        for name, run in ways.items():
            run()
            found = kept(handle)
            assert (found[: len(wanted)] if name != "beams" else [found[0], found[2], found[3]]) == wanted, name
        handle.prompt_length = start
        model(**longer)
        assert kept(handle) == wanted
        handle.prompt_length = None
        model(**longer)
        assert kept(handle) != wanted  # otherwise the test shows nothing: the answer must be able to change the choice


@some_families
def test_a_prompt_alone_keeps_what_it_keeps_in_a_batch(family):
    # row 0 is padded in the batch
    model, inputs = build(family), prompts(family)
    real, shape = inputs["attention_mask"][0].bool(), inputs["input_ids"].shape
    alone = {name: value[:1, real] for name, value in inputs.items() if value.shape == shape}
    pixels = {"qwen2_5_vl": 64, "internvl": 2}.get(family, 1)
    alone["pixel_values"] = inputs["pixel_values"][:pixels]
    for name in ("image_grid_thw", "image_sizes"):
        if name in inputs:
            alone[name] = inputs[name][:1]
    with compress(model, jumble, keep=5) as handle:
        answer(model, inputs, max_new_tokens=1)
        batched = kept(handle)
        answer(model, alone, max_new_tokens=1)
        assert kept(handle) == batched[:1]


@pytest.mark.parametrize("layer", [0, 2])
def test_a_longer_prompt_is_another_prompt(layer):
    # outside `generate`, a longer prompt is not known to be a step of a generation
    model, inputs = build("llava"), prompts("llava")
    longer = with_answer(inputs, torch.tensor([[40], [41]]))
    with torch.no_grad():
        with compress(model, jumble, keep=5, layer=layer) as handle:
            model(**longer, use_cache=False)
            fresh = kept(handle)
        with compress(model, jumble, keep=5, layer=layer) as handle:
            model(**inputs, use_cache=False)
            assert kept(handle) != fresh
            model(**longer, use_cache=False)
            assert kept(handle) == fresh


def test_a_random_choice_is_made_once_for_an_uncached_generation():
    model, inputs, calls = build("llava"), prompts("llava"), []

    def random(visual, text, keep):
        calls.append(len(text))
        return torch.rand(len(visual))

    with compress(model, random, keep=5):
        answer(model, inputs, use_cache=False)
        assert len(calls) == 3  # one for each image
        answer(model, inputs, use_cache=False)
        assert len(calls) == 6


def test_unlabelled_answers_are_refused_in_training():
    model, inputs = copy.deepcopy(build("llava")).train(), prompts("llava")
    longer = with_answer(inputs, torch.tensor([[40, 41], [42, 43]]))
    with compress(model, jumble, keep=5, restore_length=True) as handle:
        with pytest.raises(UserError, match="handle.prompt_length"):
            model(**longer)
        assert handle.last is None
        model.generate(**inputs, max_new_tokens=2, **quiet(model))
        wanted = kept(handle)
        model(**longer, prompt_length=inputs["input_ids"].shape[1])
        assert kept(handle) == wanted
        model(**longer, labels=labels_of(inputs, longer))
        assert kept(handle) == wanted


@pytest.mark.parametrize("bad", [0, 1000, 2.5, [3], [[3, 3]], "3"])
def test_prompt_lengths_that_do_not_fit_are_refused(bad):
    model, inputs = build("llava"), prompts("llava")
    with torch.no_grad(), compress(model, jumble, keep=5), pytest.raises(UserError, match="does not fit input_ids"):
        model(**inputs, prompt_length=bad)


def test_the_prompt_length_may_be_an_argument_of_compress():
    model, inputs = build("llava"), prompts("llava")
    start = inputs["input_ids"].shape[1]
    longer = with_answer(inputs, torch.tensor([[40, 41], [42, 43]]))
    with torch.no_grad(), compress(model, jumble, keep=5) as handle:
        model(**inputs)
        wanted = kept(handle)
    with torch.no_grad(), compress(model, jumble, keep=5, prompt_length=start) as handle:
        model(**longer)
        assert kept(handle) == wanted


def test_a_chunked_prefill_is_refused_unless_there_is_one_chunk():
    model, inputs = build("llava"), prompts("llava")
    with compress(model, jumble, keep=5) as handle:
        answer(model, inputs)
        wanted = kept(handle)
        with pytest.raises(UserError, match="leave out prefill_chunk_size"):
            answer(model, inputs, prefill_chunk_size=20)
        assert handle.last is None
        text = {"input_ids": torch.arange(20, 50)[None], "attention_mask": torch.ones(1, 30, dtype=torch.long)}
        chunked = answer(model, text, prefill_chunk_size=7)  # no image, so nothing to choose
        assert torch.equal(chunked.sequences, answer(model, text).sequences)
        answer(model, inputs)
        assert kept(handle) == wanted


# --- rows of logits ---


@some_families
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("right", [0, 2])
def test_logits_of_completions_are_those_of_generation(family, layer, right):
    # prompts padded on the left, completions on the right, as a policy gradient scores them
    model, inputs = build(family), prompts(family)
    start = inputs["input_ids"].shape[1]
    with torch.no_grad(), compress(model, jumble, keep=5, layer=layer) as handle:
        out = answer(model, inputs, max_new_tokens=NEW)
        longer = with_answer(inputs, out.sequences[:, start:], right)
        scored = model(**longer, logits_to_keep=NEW + 1).logits[:, :-1]
    expected = expected_logits(model, inputs, sizes(family), handle.last, out.sequences, layer)
    for row, wanted in enumerate(expected):
        rows = NEW - right + 1 if right and row == 0 else NEW
        assert_close(scored[row, :rows], wanted[:rows], rtol=1e-4, atol=1e-4 * wanted.std().item())


@pytest.mark.parametrize("keep", [20, torch.tensor([3, 40])])
def test_misaligned_rows_of_logits_are_refused(keep):
    model, inputs = build("llava"), prompts("llava")
    arguments = dict(logits_to_keep=keep, prompt_length=inputs["input_ids"].shape[1])
    with torch.no_grad():
        with compress(model, jumble, keep=5), pytest.raises(UserError, match="restore_length=True"):
            model(**inputs, **arguments)
        with compress(model, jumble, keep=5, restore_length=True):
            some = model(**inputs, **arguments).logits
            every = model(**inputs).logits
    assert torch.equal(some, every[:, -keep:] if isinstance(keep, int) else every[:, keep])


def test_padding_on_the_right_changes_nothing_where_all_is_kept():
    model, inputs = build("llava"), prompts("llava")
    longer = with_answer(inputs, torch.full((2, 4), 40), right=3)
    with torch.no_grad():
        plain = model(**longer).logits
        with compress(model, jumble, keep=1.0):
            ours = model(**longer).logits
    real = longer["attention_mask"].bool()
    assert torch.equal(ours[real], plain[real])


# --- placeholders that are no images ---


@some_families
@pytest.mark.parametrize("layer", [0, 2])
def test_a_placeholder_in_an_answer_is_an_ordinary_token(family, layer):
    model, inputs = build(family), prompts(family)
    tokens = torch.tensor([[40, IMAGE, IMAGE, 41], [IMAGE, 42, IMAGE, 43]])
    with torch.no_grad(), compress(model, jumble, keep=5, layer=layer) as handle:
        out = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, **quiet(model))
        first = out.sequences[:, -1:]
        ids = torch.cat([out.sequences, tokens], dim=1)
        given = torch.cat([first, tokens], dim=1)
        logits = model(input_ids=given[:, :-1], past_key_values=out.past_key_values).logits
    expected = expected_logits(model, inputs, sizes(family), handle.last, ids, layer)
    wanted = expected[1]  # without position_ids transformers counts the padding of row 0
    assert_close(logits[1], wanted[1:], rtol=1e-4, atol=1e-4 * wanted.std().item())


def test_generation_may_produce_the_placeholder():
    model, inputs = build("llava"), prompts("llava")
    others = [token for token in range(model.config.text_config.vocab_size) if token != IMAGE]
    with compress(model, jumble, keep=5) as handle:
        out = answer(model, inputs, suppress_tokens=others)
    assert (out.sequences[:, inputs["input_ids"].shape[1] :] == IMAGE).all() and VIDEO not in out.sequences
    expected = expected_logits(model, inputs, sizes("llava"), handle.last, out.sequences, 0)
    for row, wanted in enumerate(expected):
        assert_close(torch.stack([step[row] for step in out.logits]), wanted, rtol=1e-4, atol=1e-4)
