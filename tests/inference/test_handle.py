"""The handle: its records, its errors, and that removing it restores the model."""

import copy

import pytest
import torch
import transformers as tf
from torch.testing import assert_close

from evocomp import log
from evocomp.compressor.model import EvoCompCompressor
from evocomp.compressor.transfer import PooledCompressor
from evocomp.inference.hooks import compress
from evocomp.log import UserError
from evocomp.mllm import families
from tests.inference.layer_loop import expected_logits
from tests.inference.test_hooks import answer, jumble, sizes
from tests.inference.tiny_models import (
    FAMILIES,
    IMAGE,
    PICTURE_TOKENS,
    VIDEO,
    build,
    processor_for_llava,
    prompts,
    quiet,
)
from tests.mllm.image_features import image_features

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def llava():
    return copy.deepcopy(build("llava"))


@pytest.fixture
def inputs():
    return prompts("llava")


def first(visual, text, keep):
    """Keeps the first tokens."""
    return -torch.arange(len(visual), dtype=torch.float)


def hooks(model):
    """All hooks of all modules (transformers itself leaves some that record hidden states)."""
    return {
        name: [list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())]
        for name, module in model.named_modules()
    }


# --- removal ---


@every_family
def test_after_remove_everything_is_as_before(family):
    model, inputs = build(family), prompts(family)
    plain = answer(model, inputs)
    attributes, before = {name: set(vars(module)) for name, module in model.named_modules()}, hooks(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    handle = compress(model, jumble, keep=4, layer=1, restore_length=True)
    answer(model, inputs)
    handle.remove()
    handle.remove()
    assert hooks(model) == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    again = answer(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, again.logits, strict=True))


def test_hooks_are_removed_when_the_block_ends_with_an_error(llava, inputs):
    answer(llava, inputs)
    before = hooks(llava)
    with pytest.raises(ZeroDivisionError), compress(llava, lambda *_: 1 / 0, keep=4):
        answer(llava, inputs)
    assert hooks(llava) == before


def test_an_error_before_the_decoder_leaves_its_next_call_alone(llava, inputs):
    embeds = torch.randn(*inputs["input_ids"].shape, 32)
    with torch.no_grad(), compress(llava, jumble, keep=4):
        with pytest.raises(ValueError, match="exactly one of"):
            llava(**inputs, inputs_embeds=embeds)
        assert llava.get_decoder()(inputs_embeds=embeds).last_hidden_state.shape == embeds.shape


def test_save_pretrained_writes_the_same_model(llava, inputs, tmp_path):
    llava.save_pretrained(tmp_path / "before")
    with compress(llava, jumble, keep=4):
        answer(llava, inputs, max_new_tokens=1)
        llava.save_pretrained(tmp_path / "during")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "during" / file.name).read_bytes(), file.name


def test_a_deep_copy_is_compressed_by_itself(llava, inputs):
    handle = compress(llava, jumble, keep=4)
    short = answer(llava, inputs)
    twin = copy.deepcopy(llava)
    handle.remove()
    full = answer(llava, inputs)
    theirs = answer(twin, inputs)
    assert all(torch.equal(a, b) for a, b in zip(short.logits, theirs.logits, strict=True))
    assert not torch.equal(full.logits[0], theirs.logits[0])
    with pytest.raises(UserError, match="compressed already"):
        compress(twin, jumble)


# --- settings and records ---


def test_keep_can_be_set_between_calls(llava, inputs):
    with compress(llava, first, keep=4) as handle:
        answer(llava, inputs, max_new_tokens=1)
        assert handle.last.after == [4, 8] and handle.last.before == [16, 32]
        assert [image.tolist() for image in handle.last.indices[1]] == [[0, 1, 2, 3]] * 2
        assert torch.equal(handle.last.scores[0][0], first(torch.zeros(16), None, 4))
        handle.keep = 0.5
        answer(llava, inputs, max_new_tokens=1)
        assert handle.last.after == [8, 16]
        for bad in (1.5, -1, 0.0, "192", True):
            with pytest.raises(UserError, match="keep"):
                handle.keep = bad
        assert handle.keep == 0.5


def test_small_images_keep_all_tokens_with_one_warning(llava, inputs, caplog):
    log._warned.clear()
    log.logger.propagate = True
    with compress(llava, first, keep=100) as handle, caplog.at_level("WARNING"):
        answer(llava, inputs, max_new_tokens=1)
        answer(llava, inputs, max_new_tokens=1)
    assert handle.last.after == [16, 32]
    assert [record.message for record in caplog.records if "keep=100" in record.message] == [
        "keep=100 is more than the number of tokens of some images; all tokens of those images are kept"
    ]


def test_prompts_without_images_are_not_changed(llava, inputs):
    text = {
        "input_ids": torch.tensor([[1, 30, 31, 32]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
    }
    plain = answer(llava, text)
    with compress(llava, jumble, keep=4) as handle:
        answer(llava, inputs)
        assert handle.last is not None
        ours = answer(llava, text)
        assert handle.last is None
        again = answer(llava, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))
    assert again.sequences.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newline_separators_are_kept_or_dropped(family):
    model, inputs = build(family), prompts(family)
    with torch.no_grad():
        images = image_features(model, inputs)
    newlines = [families.newline_rows(model, image) for image in images]
    seen = []

    def spy(visual, text, keep):
        seen.append(len(visual))
        return first(visual, text, keep)

    with compress(model, spy, keep=20) as handle:
        answer(model, inputs, max_new_tokens=1)
    for kept, newline in zip(sum(handle.last.indices, []), newlines, strict=True):
        content = (~newline).nonzero().squeeze(1)[:20]
        assert kept.tolist() == sorted(content.tolist() + newline.nonzero().squeeze(1).tolist())
    assert seen == [int((~newline).sum()) for newline in newlines]
    with compress(model, spy, keep=20, newline="drop") as handle:
        answer(model, inputs, max_new_tokens=1)
    for kept, newline in zip(sum(handle.last.indices, []), newlines, strict=True):
        assert kept.tolist() == (~newline).nonzero().squeeze(1)[:20].tolist()


@pytest.mark.parametrize("family", ["llava", "paligemma", "gemma3"])
def test_dense_positions_count_kept_tokens_only(family):
    model, inputs = build(family), prompts(family)
    with compress(model, jumble, keep=4, positions="dense") as handle:
        ours = answer(model, inputs)
    # reference: a prompt of the kept tokens alone, with the features as embeddings
    for row in range(2):
        expected = _dense_by_hand(model, family, inputs, handle.last, row, ours.sequences)
        assert_close(torch.stack([step[row] for step in ours.logits]), expected, rtol=1e-4, atol=1e-4)


def _dense_by_hand(model, family, inputs, last, row, sequences):
    from tests.inference import layer_loop

    original = layer_loop.rows

    def dense_rows(model, inputs):
        found = original(model, inputs)
        for number, (captured, kept) in enumerate(zip(found, last.indices, strict=True)):
            stays = torch.ones(len(captured.ids), dtype=torch.bool)
            visual = (captured.ids == IMAGE).nonzero().squeeze(1)
            stays[visual] = False
            offset = 0
            for image, size in zip(kept, sizes(family)[number], strict=True):
                stays[visual[offset : offset + size][image]] = True
                offset += size
            captured.positions = stays.cumsum(0) - 1 + families.policy(model).forward_offset
        return found

    layer_loop.rows = dense_rows
    try:
        return expected_logits(model, inputs, sizes(family), last, sequences, 0)[row]
    finally:
        layer_loop.rows = original


# --- kinds of callers ---


def test_the_decode_loop_may_be_the_callers_own(llava, inputs):
    for layer in (0, 2):
        one = {"input_ids": inputs["input_ids"][1:], "pixel_values": inputs["pixel_values"][1:]}
        with torch.no_grad(), compress(llava, jumble, keep=4, layer=layer) as handle:
            wanted = answer(llava, one)
            out = llava(**one)
            logits = [out.logits[:, -1]]
            for _ in range(4):
                token = wanted.sequences[:, one["input_ids"].shape[1] + len(logits) - 1][:, None]
                out = llava(input_ids=token, past_key_values=out.past_key_values)
                logits.append(out.logits[:, -1])
            for ours, theirs in zip(logits, wanted.logits, strict=True):
                assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert handle.last.after == [8]


def decoded_with_masks(model, prompt, columns):
    """Logits [2,B,V] of two tokens after the prompt, with masks of ones; columns(cache, length of the conversation)."""
    out = model(**prompt)
    cache, logits, length = out.past_key_values, [], prompt["input_ids"].shape[1]
    for token in (40, 41):
        length += 1
        mask = torch.ones(len(prompt["input_ids"]), columns(cache, length), dtype=torch.long)
        ids = torch.full((len(mask), 1), token)
        logits.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_mask_of_a_callers_loop_may_have_the_caches_length(llava, inputs, layer):
    one = {"input_ids": inputs["input_ids"][1:], "pixel_values": inputs["pixel_values"][1:]}
    with torch.no_grad(), compress(llava, jumble, keep=4, layer=layer):
        whole = decoded_with_masks(llava, one, lambda cache, length: length)
        short = decoded_with_masks(llava, one, lambda cache, length: cache.get_seq_length() + 1)
    assert torch.equal(short, whole)


@pytest.mark.parametrize("layer", [0, 2])
def test_masks_with_too_few_columns_are_refused(llava, inputs, layer):
    one = {"input_ids": inputs["input_ids"][1:], "pixel_values": inputs["pixel_values"][1:]}
    with torch.no_grad(), compress(llava, jumble, keep=4, layer=layer):
        with pytest.raises(UserError, match="30 columns but the conversation 48 tokens"):
            decoded_with_masks(llava, one, lambda cache, length: 30)
        with pytest.raises(UserError, match="24 columns but the conversation 48 tokens"):  # which are padding?
            decoded_with_masks(llava, inputs, lambda cache, length: 24)


def last_first(visual, text, keep):
    """Keeps the last tokens."""
    return torch.arange(len(visual), dtype=torch.float)


def mask_of_the_callers_own(inputs, heads):
    """bool [B,heads,S,S]: causal; the last head hides two words from the last token; the first four tokens of every
    image are visible to each other only, so that dropping them changes nothing."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    length = ids.shape[1]
    visual = ids == IMAGE
    place = torch.where(visual, (visual.cumsum(1) - 1) % 16, -1)
    hidden = (place >= 0) & (place < 4)
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & real[:, None, None, :]
    mask = mask.expand(-1, heads, -1, -1) & (hidden[:, None, :, None] | ~hidden[:, None, None, :])
    mask[:, -1, -1, -4:-2] = False
    return mask | torch.eye(length, dtype=torch.bool)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])
def test_a_mask_of_the_callers_own_holds_for_what_is_kept(family, layer, heads):
    model, inputs = build(family), prompts(family)
    inputs = inputs | {"position_ids": families.position_ids(model, inputs, forward=True)}
    own = mask_of_the_callers_own(inputs, heads)
    with torch.no_grad():
        ordinary = model(**inputs).logits
        plain = model(**inputs | {"attention_mask": own}).logits
        with compress(model, last_first, keep=12, layer=layer, restore_length=True) as handle:
            ours = model(**inputs | {"attention_mask": own}).logits
    assert handle.last.after == [12, 24]
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    assert_close(ours[text], plain[text], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ordinary[text], plain[text], atol=1e-2)


def test_decoding_goes_on_after_a_mask_of_the_callers_own(llava, inputs):
    one = {"input_ids": inputs["input_ids"][1:], "pixel_values": inputs["pixel_values"][1:]}
    own, token = mask_of_the_callers_own(inputs, 1)[1:], torch.tensor([[40]])
    seen = torch.nn.functional.pad(own[:, :, -1:], (0, 1), value=True)
    seen[..., -5:-3] = True  # the new token sees them like any other word
    with torch.no_grad():
        cache = llava(**one, attention_mask=own).past_key_values
        plain = llava(input_ids=token, attention_mask=seen, past_key_values=cache).logits
        with compress(llava, last_first, keep=12):
            cache = llava(**one, attention_mask=own).past_key_values
            ours = llava(input_ids=token, past_key_values=cache).logits
    assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_mask_of_the_callers_own_over_a_compressed_cache_is_refused(llava, inputs, layer):
    with torch.no_grad(), compress(llava, jumble, keep=4, layer=layer):
        cache, mask = llava(**inputs).past_key_values, torch.ones(2, 1, 1, 48, dtype=torch.bool)
        with pytest.raises(UserError, match="4-D attention_mask"):
            llava(input_ids=torch.tensor([[40], [41]]), attention_mask=mask, past_key_values=cache)


def test_mrope_positions_continue_in_the_callers_own_loop():
    model, inputs = build("qwen2_5_vl"), prompts("qwen2_5_vl")
    one = {name: value[1:] for name, value in inputs.items() if value.shape == inputs["input_ids"].shape}
    one |= {"pixel_values": inputs["pixel_values"][64:], "image_grid_thw": inputs["image_grid_thw"][1:]}
    del one["attention_mask"]
    with torch.no_grad(), compress(model, jumble, keep=4):
        wanted = answer(model, one)
        out = model(**one)
        token = wanted.sequences[:, one["input_ids"].shape[1]][:, None]
        out = model(input_ids=token, past_key_values=out.past_key_values)
    assert_close(out.logits[:, -1], wanted.logits[1], rtol=1e-4, atol=1e-4)


def _next_turn(inputs, turn):
    ids = torch.cat([turn.sequences, torch.tensor([[40, 41, 42], [50, 51, 52]])], dim=1)
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl"])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_second_turn_over_the_cache(family, layer):
    model, inputs = build(family), prompts(family)
    with compress(model, jumble, keep=0.4, layer=layer) as handle:
        turn = answer(model, inputs)
        question = torch.tensor([[40, 41, 42], [50, 51, 52]])
        ids = torch.cat([turn.sequences, question], dim=1)
        mask = torch.nn.functional.pad(
            inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1
        )
        second = answer(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=turn.past_key_values)
    expected = expected_logits(model, inputs, sizes(family), handle.last, second.sequences, layer)
    for row, wanted in enumerate(expected):
        got = torch.stack([step[row] for step in second.logits])
        assert_close(got, wanted[-len(got) :], rtol=1e-4, atol=1e-4)


def test_a_second_turn_at_layer_0_is_refused_with_the_alternative(llava, inputs):
    with compress(llava, jumble, keep=4):
        turn = answer(llava, inputs)
        ids = torch.cat([turn.sequences, torch.full((2, 3), 40)], dim=1)
        mask = torch.nn.functional.pad(
            inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1
        )
        with pytest.raises(UserError, match="layer=1"):
            answer(llava, {"input_ids": ids, "attention_mask": mask}, past_key_values=turn.past_key_values)


@pytest.mark.parametrize("layer", [0, 2])
def test_new_images_with_a_filled_cache_are_refused(llava, inputs, layer):
    with compress(llava, jumble, keep=4, layer=layer), torch.no_grad():
        cache = llava(**inputs).past_key_values
        with pytest.raises(UserError, match="empty cache"):
            llava(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], past_key_values=cache)
        text = llava(input_ids=torch.tensor([[1, 20]])).past_key_values
        with pytest.raises(UserError, match="empty cache"):
            llava(
                input_ids=inputs["input_ids"][:1],
                pixel_values=inputs["pixel_values"][:1],
                past_key_values=text,
            )


@pytest.mark.parametrize("layer", [0, 2])
def test_a_cache_that_was_reset_holds_nothing_of_the_prompt_before(llava, inputs, layer):
    text = torch.tensor([[1, 30, 31, 32], [1, 40, 41, 42]])

    def decoded(cache):
        logits, mask, ids = [], torch.ones_like(text), text
        for _ in range(3):
            logits.append(llava(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1])
            ids, mask = logits[-1].argmax(-1, keepdim=True), torch.nn.functional.pad(mask, (0, 1), value=1)
        return torch.stack(logits)

    with torch.no_grad():
        plain = decoded(tf.StaticCache(config=llava.config.get_text_config(), max_cache_len=64))
        cache = tf.StaticCache(config=llava.config.get_text_config(), max_cache_len=64)
        with compress(llava, jumble, keep=4, layer=layer):
            llava(**inputs, past_key_values=cache)
            cache.reset()
            assert torch.equal(decoded(cache), plain)


@every_family
def test_restored_length_gives_the_loss_of_the_masked_prompt(family):
    model, inputs = build(family), prompts(family)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    with torch.no_grad():
        plain = model(**inputs, labels=labels)
        with compress(model, jumble, keep=1.0, restore_length=True):
            whole = model(**inputs, labels=labels)
        with compress(model, jumble, keep=0.4, layer=1, restore_length=True) as handle:
            pruned = model(**inputs, labels=labels)
    assert torch.equal(whole.loss, plain.loss)
    real = inputs["attention_mask"].bool()
    assert torch.equal(whole.logits[real], plain.logits[real])
    assert pruned.logits.shape == plain.logits.shape
    shifted = torch.nn.functional.cross_entropy(
        pruned.logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert_close(pruned.loss.double(), shifted, rtol=1e-5, atol=1e-6)
    assert pruned.loss != plain.loss and handle.last.after != handle.last.before


@every_family
@pytest.mark.parametrize("layer", [0, 2])
def test_restored_length_holds_for_hidden_states_of_every_layer(family, layer):
    model, inputs = build(family), prompts(family)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states
        with compress(model, jumble, keep=0.4, layer=layer) as handle:
            short = model(**inputs, output_hidden_states=True).hidden_states
        with compress(model, jumble, keep=0.4, layer=layer, restore_length=True):
            whole = model(**inputs, output_hidden_states=True).hidden_states
    visual = inputs["input_ids"] == IMAGE
    real = inputs["attention_mask"].bool()
    stays = real & ~visual
    for row, kept in enumerate(handle.last.indices):
        places = visual[row].nonzero().squeeze(1).split(sizes(family)[row])
        stays[row, torch.cat([place[image] for place, image in zip(places, kept, strict=True)])] = True
    for number, (state, before, cut) in enumerate(zip(whole, plain, short, strict=True)):
        assert state.shape == before.shape
        if layer and number <= layer:
            assert torch.equal(state[real], before[real])
            continue
        assert not state[~stays].any()
        for row in range(2):
            assert torch.equal(state[row, stays[row]], cut[row, -int(stays[row].sum()) :])


def test_labels_without_restored_length_are_refused(llava, inputs):
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100  # the selector still has text to read
    with compress(llava, jumble, keep=4), pytest.raises(UserError, match="restore_length=True"):
        llava(**inputs, labels=labels)


def test_the_selector_never_reads_the_answer(llava, inputs):
    seen = []

    def spy(visual, text, keep):
        seen.append(text)
        return first(visual, text, keep)

    labels = inputs["input_ids"].masked_fill(torch.arange(47) < 44, -100)
    with torch.no_grad(), compress(llava, spy, keep=4, restore_length=True):
        llava(**inputs)
        llava(**inputs, labels=labels)
    embed = llava.get_input_embeddings()
    for row, texts in ((0, seen[0::3]), (1, seen[1::3])):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        ids = ids[ids != IMAGE]
        assert torch.equal(texts[0], embed(ids)) and torch.equal(texts[1], embed(ids[:-3]))


def test_pipeline_works_unchanged(llava):
    processor = processor_for_llava()
    pipe = tf.pipeline("image-text-to-text", model=llava, processor=processor)
    from PIL import Image

    image = Image.new("RGB", (40, 30), (200, 30, 60))
    arguments = dict(images=image, text="<image> w30 w31", generate_kwargs={"max_new_tokens": 4, **quiet(llava)})
    plain = pipe(**arguments)
    with compress(llava, jumble, keep=1.0):
        assert pipe(**arguments) == plain
    with compress(llava, first, keep=4) as handle:
        short = pipe(**arguments)
    assert handle.last.after == [4]
    prompt = processor(images=image, text="<image> w30 w31", return_tensors="pt")
    with compress(llava, first, keep=4):
        tokens = llava.generate(**prompt, max_new_tokens=4, **quiet(llava))
    # callers slice the answer by the length of their prompt
    tail = processor.batch_decode(tokens[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert len(tail.split()) == 4 and short[0]["generated_text"].endswith(tail)


@pytest.mark.parametrize("layer", [0, 2])
def test_peft_wrapped_models(llava, inputs, layer):
    import peft

    with compress(llava, jumble, keep=4, layer=layer):
        plain = answer(llava, inputs)
    wrapped = peft.get_peft_model(llava, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).eval()
    labels, before = inputs["input_ids"].masked_fill(torch.arange(47) < 44, -100), hooks(wrapped)
    with compress(wrapped, jumble, keep=4, layer=layer) as handle:
        ours = answer(wrapped, inputs)  # the adapter adds zeros, which changes the order of sums
        assert handle.last.after == [4, 8]
        with pytest.raises(UserError, match="compressed already"):
            compress(wrapped.get_base_model(), jumble)
        with pytest.raises(UserError, match="restore_length"):
            wrapped(**inputs, labels=labels)
        assert handle.last is None  # the refused call dropped nothing
    for a, b in zip(plain.logits, ours.logits, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert hooks(wrapped) == before


def test_inference_mode_and_bf16(llava, inputs):
    llava = llava.bfloat16()
    inputs = inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}
    compressor = EvoCompCompressor.from_mllm(llava, layer=0)
    with torch.inference_mode(), compress(llava, compressor, keep=4, layer=1) as handle:
        out = answer(llava, inputs)
    assert out.logits[0].isfinite().any() and handle.last.after == [4, 8]


def test_prompts_given_as_embeddings_are_not_compressed(llava, caplog):
    log._warned.clear()
    log.logger.propagate = True
    embeds = torch.randn(1, 6, 32)
    with torch.no_grad():
        plain = llava(inputs_embeds=embeds).logits
        with compress(llava, jumble, keep=4), caplog.at_level("WARNING"):
            assert torch.equal(llava(inputs_embeds=embeds).logits, plain)
    assert "input_ids" in caplog.text


# --- videos ---


def _video(family):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(20, 120, (8,), generator=generator).tolist()
    if family == "llava_onevision":  # 3 frames of 2 x 2 pooled tokens and one separator
        ids = [1, *words[:3], *[VIDEO] * 13, *words[3:]]
        extra = {"pixel_values_videos": torch.randn(1, 3, 3, 16, 16, generator=generator)}
        count = 13
    else:  # 2 temporal steps of 4 x 4 merged patches
        frames = [[VIDEO] * 8, [VIDEO] * 8]
        between = words[:2] if family == "qwen3_vl" else []  # time stamps separate its frames
        ids = [1, words[2], 3, *frames[0], *([4, *between, 3] if between else []), *frames[1], 4, *words[3:]]
        pixels = torch.randn(2 * 4 * 8, 3 * 2 * 16, generator=generator)
        extra = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[2, 4, 8]])}
        extra["mm_token_type_ids"] = 2 * (torch.tensor([ids]) == VIDEO).int()
        count = 16
    ids = torch.tensor([ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}, count


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("layer", [0, 2])
def test_videos(family, layer):
    model, (inputs, count) = build(family), _video(family)
    plain = answer(model, inputs)
    with compress(model, jumble, keep=1.0, layer=layer) as handle:
        whole = answer(model, inputs)
        assert handle.last.before == handle.last.after == [count]
        handle.keep = 0.4
        out = answer(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, whole.logits, strict=True))
    parts = [len(part) for part in handle.last.scores[0]]
    parts = parts if family == "qwen3_vl" else [count]
    wanted = expected_logits(model, inputs, [parts], handle.last, out.sequences, layer)[0]
    assert_close(torch.cat(out.logits), wanted, rtol=1e-4, atol=1e-4)


def test_images_and_videos_in_one_prompt():
    model = build("qwen2_5_vl")
    video, _ = _video("qwen2_5_vl")
    image = prompts("qwen2_5_vl")
    ids = torch.cat([video["input_ids"], torch.tensor([[3, *[IMAGE] * 16, 4, 60, 61]])], dim=1)
    both = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        "pixel_values": image["pixel_values"][:64],
        "image_grid_thw": image["image_grid_thw"][:1],
        "pixel_values_videos": video["pixel_values_videos"],
        "video_grid_thw": video["video_grid_thw"],
    }
    with compress(model, jumble, keep=5) as handle:
        out = answer(model, both)
    assert [len(kept) for kept in handle.last.indices[0]] == [5, 5] and handle.last.before == [32]
    wanted = expected_logits(model, both, [[16, 16]], handle.last, out.sequences, 0)[0]
    assert_close(torch.cat(out.logits), wanted, rtol=1e-4, atol=1e-4)


# --- errors ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layer": 4}, "layers 0 to 3"),
        ({"layer": -1}, "layers 0 to 3"),
        ({"layer": "0"}, "layers 0 to 3, give one of them"),
        ({"layer": 0.5}, "layers 0 to 3, give one of them"),
        ({"positions": "dense", "layer": 1}, "layer=0"),
        ({"positions": "new"}, "positions='new'"),
        ({"newline": "some"}, "newline='some'"),
        ({"keep": 2.0}, "keep=2.0"),
    ],
)
def test_bad_settings_are_refused(llava, arguments, message):
    before = hooks(llava)
    with pytest.raises(UserError, match=message):
        compress(llava, jumble, **arguments)
    assert hooks(llava) == before


def test_dense_positions_are_refused_with_mrope():
    with pytest.raises(UserError, match="M-RoPE"):
        compress(build("qwen2_vl"), jumble, positions="dense")


def test_flex_attention_is_refused_where_blocks_would_be_lost():
    model = copy.deepcopy(build("gemma3"))
    model.get_decoder().config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="flex_attention"):
        compress(model, jumble)


def test_a_second_handle_is_refused_and_a_later_one_is_not(llava):
    with compress(llava, jumble), pytest.raises(UserError, match="remove"):
        compress(llava, jumble)
    compress(llava, jumble).remove()


def test_unsupported_families_are_refused():
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(UserError, match="LlamaForCausalLM.*not supported"):
        compress(model, jumble)


def test_a_compressor_of_another_size_is_refused_with_the_transfer_option(llava, inputs):
    other = tf.LlamaConfig(
        vocab_size=8, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    compressor = EvoCompCompressor(EvoCompCompressor.config_class(text_config=other))
    with pytest.raises(UserError, match=r"48.*32.*PooledCompressor\(compressor, 32\)"):
        compress(llava, compressor)
    with compress(llava, PooledCompressor(compressor, 32), keep=4) as handle:
        answer(llava, inputs, max_new_tokens=1)
    assert handle.last.after == [4, 8]


def test_image_tokens_of_the_tiny_models_are_right():
    assert all(sum(PICTURE_TOKENS[f]) == int((prompts(f)["input_ids"] == IMAGE).sum()) for f in FAMILIES)
