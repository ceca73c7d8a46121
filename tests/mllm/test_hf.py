"""`FrozenMLLM` against the forward pass of the unmodified model in transformers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from evocomp.data.example import Example, stable_id
from evocomp.data.scenes import draw_scene
from evocomp.inference.hooks import compress
from evocomp.log import UserError
from evocomp.mllm import families
from evocomp.mllm.features import Features, grid_of, pad_right
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.reader import as_array
from evocomp.scoring.answer_losses import AnswerLosses
from tests.inference.tiny_models import IMAGE, PICTURE_TOKENS, VOCABULARY, build, prompts
from tests.mllm.answer_logits import answer_logits
from tests.mllm.image_features import image_features

SCORABLE = [f for f in PICTURE_TOKENS if not f.startswith(("qwen3_vl", "gemma3", "paligemma"))]
every_scorable_family = pytest.mark.parametrize("family", SCORABLE)


def everything(features: Features) -> torch.Tensor:
    return torch.arange(len(features.visual))


def unmodified(nano, example: Example, answer_ids: torch.Tensor) -> torch.Tensor:
    """Teacher-forced logits [A, V] of the answer from the unmodified transformers model."""
    inputs = nano._process(example)
    ids = torch.cat([inputs["input_ids"], answer_ids[None, :-1]], dim=1)
    with torch.no_grad():
        # the head on the same rows as `FrozenMLLM`: the rounding of matrix products depends on the number of rows
        return nano.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"],
            logits_to_keep=len(answer_ids),
        ).logits[0]


@pytest.mark.parametrize("answer", [None, "red circle", "3 yes no left of"])
def test_keeping_all_tokens_is_the_unmodified_model_to_the_bit(nano, questions, answer):
    for example in questions[:12]:
        asked = replace(example, id=stable_id(example.id, answer), answer=answer or example.answer)
        (features,) = nano.features([asked])
        ours = answer_logits(nano, features, features.visual[None], everything(features)[None])[0]
        theirs = unmodified(nano, asked, features.answer_ids)
        assert ours.shape == theirs.shape and float((ours - theirs).abs().max()) == 0.0


def test_logits_to_keep_equals_the_full_forward_pass(nano, questions):
    """The rows compared above are those of the full forward pass, up to rounding in the head."""
    example = questions[0]
    (features,) = nano.features([example])
    with torch.no_grad():
        whole = nano.model(**nano._process(example)).logits[0, -1]
    assert torch.allclose(unmodified(nano, example, features.answer_ids)[0], whole, atol=1e-5, rtol=0)


# ------------------------------------------------------------ the packed-sequence trap


def dropped(features: Features) -> torch.Tensor:
    """Indices of kept tokens with a gap: the first 20 and the last 20 tokens."""
    return torch.cat([torch.arange(20), torch.arange(124, 144)])


def decoder_output(nano, features: Features, index: torch.Tensor, visual: torch.Tensor, mask) -> torch.Tensor:
    embeds, positions = nano.assemble(features, visual[index][None], index[None])
    with torch.no_grad():
        return nano.decoder(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state[0, -1]


def test_without_a_mask_transformers_takes_gaps_for_borders_of_packed_sequences(nano, encoded):
    """The reason for the all-ones mask. If this test fails, transformers has changed and the mask can be removed."""
    features = encoded[0]
    index = dropped(features)
    altered = features.visual.clone()
    altered[:20] += 1.0
    before, after = (decoder_output(nano, features, index, v, None) for v in (features.visual, altered))
    assert torch.equal(before, after), "tokens before the gap are masked away"
    length = len(features.prompt_ids) - 144 + len(index)
    with_mask = decoder_output(nano, features, index, features.visual, torch.ones(1, length, dtype=torch.long))
    assert float((with_mask - before).abs().max()) > 0.1


def test_a_token_before_a_gap_changes_the_logits(nano, encoded):
    for features in encoded[:6]:
        index = dropped(features)
        before = answer_logits(nano, features, features.visual[index][None], index[None])
        altered = features.visual.clone()
        altered[3] += 1.0
        after = answer_logits(nano, features, altered[index][None], index[None])
        assert float((before - after).abs().max()) > 1e-3


def test_answers_attend_to_tokens_before_a_gap(nano, encoded):
    features = encoded[0]
    index = dropped(features)
    altered = features.visual.clone()
    altered[3] += 1.0
    both = [nano.answer([(features, v[index], index)], 1)[1] for v in (features.visual, altered)]
    assert float((both[0] - both[1]).abs().max()) > 1e-3


# ------------------------------------------------------------ shortened sequences, by hand


def by_hand(model, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits of the last token from a plain causal pass that calls every layer with an explicit 4-D mask."""
    length = embeds.shape[1]
    mask = torch.full((length, length), torch.finfo(embeds.dtype).min).triu(1)[None, None]
    decoder = model.get_decoder()
    rotary = decoder.rotary_emb(embeds, positions)
    hidden = embeds
    with torch.no_grad():
        for layer in decoder.layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return model.get_output_embeddings()(decoder.norm(hidden))[0, -1]


def test_kept_tokens_stand_at_their_original_positions(nano, encoded):
    rng = np.random.default_rng(0)
    for features in encoded[:6]:
        index = torch.from_numpy(np.sort(rng.permutation(144)[:16]))
        text_before = [i for i in range(len(features.prompt_ids)) if i < int(features.visual_at[0])]
        text_after = [i for i in range(len(features.prompt_ids)) if i > int(features.visual_at[-1])]
        table = nano.model.get_input_embeddings().weight
        rows = [table[features.prompt_ids[i]] for i in text_before]
        rows += [features.visual[i] for i in index] + [table[features.prompt_ids[i]] for i in text_after]
        places = text_before + [int(features.visual_at[i]) for i in index] + text_after
        expected = by_hand(nano.model, torch.stack(rows)[None], torch.tensor([places]))
        ours = answer_logits(nano, features, features.visual[index][None], index[None])[0, 0]
        assert torch.allclose(ours, expected, atol=2e-5, rtol=0)


def test_features_are_those_of_the_model(nano, questions):
    for example in questions[:4]:
        (features,) = nano.features([example])
        inputs = nano._process(example)
        with torch.no_grad():
            theirs = torch.cat(list(nano.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output))
        assert torch.equal(features.visual, theirs)
        assert features.prompt_ids[features.visual_at].tolist() == [nano.model.config.image_token_id] * 144
        assert features.positions.tolist() == list(range(len(features.prompt_ids)))
        words = nano.processor.tokenizer.convert_ids_to_tokens(features.prompt_ids[features.text_at].tolist())
        assert words == ["<bos>", *example.prompt.split()]  # one bos token only
        assert nano.processor.tokenizer.decode(features.answer_ids) == example.answer
        assert torch.equal(nano.prompt_embeds(features), nano.vocabulary[features.prompt_ids[features.text_at]])
        assert grid_of(features) == (12, 12)


def test_earlier_turns_are_in_the_prompt(nano, questions):
    asked = replace(questions[0], id=1, prompt="shape of red", history=(("color of circle", "red"),))
    (features,) = nano.features([asked])
    words = nano.processor.tokenizer.convert_ids_to_tokens(features.prompt_ids[features.text_at].tolist())
    assert words == "<bos> color of circle red <eos> shape of red".split()
    # the image comes before the first question
    assert int(features.visual_at[0]) == 1


@every_scorable_family
def test_families_with_all_tokens_are_the_unmodified_model(family):
    features, inputs, model = tiny(family)
    ours = answer_logits(FrozenMLLM(model, processor=None), features, features.visual[None], everything(features)[None])
    with torch.no_grad():
        theirs = model(**inputs, logits_to_keep=1).logits
    assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_separators_are_not_visual_tokens_and_always_kept(family):
    """Labels and panel score the same LLM input that `compress` builds for the same selection."""
    features, inputs, model = tiny(family)
    rows = image_features(model, inputs)[0]
    is_separator = families.newline_rows(model, rows)
    assert 0 < len(features.separators) == int(is_separator.sum())
    assert torch.equal(features.visual, rows[~is_separator])
    mllm, kept = FrozenMLLM(model, processor=None), torch.arange(0, len(features.visual), 3)
    ours = answer_logits(mllm, features, features.visual[kept][None], kept[None])[0, -1]
    losses = AnswerLosses(mllm).candidates(features, kept[None])
    score = torch.full((len(features.visual),), -1.0)
    score[kept] = 1.0
    with torch.no_grad(), compress(model, lambda visual, text, keep: score, keep=len(kept)):
        theirs = model(**inputs).logits[0, -1].float()
    torch.testing.assert_close(ours, theirs)
    expected = torch.nn.functional.cross_entropy(theirs, features.answer_ids[0])
    torch.testing.assert_close(losses[0], expected)
    assert len(mllm.prompt_embeds(features)) == int((inputs["input_ids"] != IMAGE).sum())
    assert features.picture_end == int(families.visual_mask(model, inputs["input_ids"])[0].nonzero().max()) + 1


def test_questions_with_the_same_id_do_not_share_a_cache_entry(nano, questions):
    mllm = FrozenMLLM(nano.model, nano.processor)
    one, other = questions[0], replace(questions[0], prompt=questions[1].prompt, answer=questions[1].answer)
    mllm.features([one])
    (again,) = mllm.features([other])
    (fresh,) = FrozenMLLM(nano.model, nano.processor).features([other])
    assert torch.equal(again.prompt_ids, fresh.prompt_ids) and torch.equal(again.answer_ids, fresh.answer_ids)


@every_scorable_family
def test_families_attend_to_tokens_before_a_gap(family):
    features, _, model = tiny(family)
    mllm, count = FrozenMLLM(model, processor=None), len(features.visual)
    index = torch.cat([torch.arange(3), torch.arange(count - 3, count)])
    altered = features.visual.clone()
    altered[1] += 1.0
    before, after = (answer_logits(mllm, features, v[index][None], index[None]) for v in (features.visual, altered))
    assert float((before - after).abs().max()) > 1e-4


def tiny(family: str) -> tuple[Features, dict, torch.nn.Module]:
    """Features of row 0 of the family's prompts (one image), without padding."""
    model, inputs = build(family), prompts(family)
    real = inputs["attention_mask"][0].bool()
    inputs = {
        name: value[:1][:, real] if value.shape[:2] == (2, len(real)) else first_picture(family, name, value, inputs)
        for name, value in inputs.items()
    }
    example = Example(0, np.zeros((2, 2, 3), np.uint8), "a", "", "answer")
    (features,) = FrozenMLLM(model, Prepared(inputs)).features([example])
    return features, inputs, model


class Prepared:
    """A stub processor with a prepared prompt and pixels, whose answers are one token."""

    chat_template = ""
    bos_token = None

    def __init__(self, inputs: dict):
        self.inputs = inputs
        self.tokenizer = lambda text, **_: BatchFeature({"input_ids": torch.tensor([[VOCABULARY - 1]])})

    def apply_chat_template(self, messages, **_) -> str:
        return ""

    def __call__(self, **_) -> BatchFeature:
        return BatchFeature(self.inputs)


def first_picture(family: str, name: str, value: torch.Tensor, inputs: dict) -> torch.Tensor:
    if family.startswith("qwen") and name == "pixel_values":
        return value[: int(inputs["image_grid_thw"][0].prod())]
    if family == "internvl":
        return value[:2]
    return value[:1]


# ------------------------------------------------------------ answering


def test_answers_do_not_depend_on_the_batch(nano, encoded):
    rng = np.random.default_rng(1)
    prompts = []
    for i, features in enumerate(encoded[:20]):
        index = torch.from_numpy(np.sort(rng.permutation(144)[: (4, 16, 144, 48)[i % 4]]))
        prompts.append((features, features.visual[index], index))
    together, first = nano.answer(prompts, 3)
    alone = [nano.answer([prompt], 3) for prompt in prompts]
    assert together == [texts[0] for texts, _ in alone]
    assert torch.allclose(first, torch.cat([logits for _, logits in alone]), atol=1e-4)


def test_prompts_without_visual_tokens_can_be_answered(nano, encoded):
    nothing = torch.zeros(0, dtype=torch.long)
    texts, logits = nano.answer([(encoded[0], encoded[0].visual[:0], nothing)])
    assert len(texts) == 1 and torch.isfinite(logits).all()


def test_answers_stop_at_the_eos_token(nano, encoded):
    texts, _ = nano.answer([(f, f.visual, everything(f)) for f in encoded[:10]], max_new_tokens=8)
    assert all(len(text.split()) == 1 for text in texts)


# ------------------------------------------------------------ images


def test_an_image_is_encoded_once_until_it_is_evicted(nano, questions):
    mllm = FrozenMLLM(nano.model, nano.processor, cache_bytes=2 * 144 * 96 * 4)
    calls = []
    handle = nano.model.base_model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        by_picture: dict[str, list] = {}
        for example in questions:
            by_picture.setdefault(example.image_id, []).append(example)
        a, b, c = list(by_picture.values())[:3]
        mllm.features([*a, *b])
        assert len(calls) == 2
        mllm.features([b[0], a[0]])
        assert len(calls) == 2
        mllm.features([c[0]])  # evicts the least recently used image
        mllm.features([a[0]])
        assert len(calls) == 3
        again = mllm.features([b[0]])[0]
        assert len(calls) == 4
    finally:
        handle.remove()
    assert torch.equal(again.visual, nano.features([b[0]])[0].visual)


def test_images_of_the_same_name_in_two_folders_are_distinct(nano, tmp_path):
    """Training and test folders of a data set often contain files of the same name, such as 0001.png."""
    features = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        Image.fromarray(draw_scene(5, number).image).save(folder / "0001.png")
        example = Example(number, str(folder / "0001.png"), "0001.png", "color of circle", "red")
        features += nano.features([example])
    assert not torch.equal(features[0].visual, features[1].visual)


def test_files_and_pixels_give_the_same_features(nano, questions, tmp_path):
    example = questions[0]
    Image.fromarray(example.image).save(tmp_path / "a.png")
    (stored,) = nano.features([replace(example, id=7, image=str(tmp_path / "a.png"), image_id="a.png")])
    assert torch.equal(stored.visual, nano.features([example])[0].visual)
    assert np.array_equal(as_array(str(tmp_path / "a.png")), example.image)


def test_images_are_encoded_at_other_sizes(nano, questions, encoded):
    assert torch.equal(nano.encode_resized(questions[0], None), encoded[0].visual)
    assert nano.encode_resized(questions[0], (48, 32)).shape == (6 * 4, 96)
    assert nano.patch_size == 8


# ------------------------------------------------------------ records and refusals


def test_the_model_is_frozen(nano):
    assert not nano.model.training
    assert not any(p.requires_grad for p in nano.model.parameters())


def test_the_fingerprint_follows_weights_and_processor(nano):
    again = FrozenMLLM.load("nano")
    before = again.fingerprint()
    assert before == nano.fingerprint()
    template, mean = again.processor.chat_template, again.processor.image_processor.image_mean
    again.processor.chat_template = template + " "
    assert again.fingerprint() != before
    again.processor.chat_template = template
    again.processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    assert again.fingerprint() != before
    again.processor.image_processor.image_mean = mean
    assert again.fingerprint() == before
    weight = again.model.get_output_embeddings().weight
    weight.data[3, 5] += 1e-3
    assert again.fingerprint() != before


def test_loading_errors_are_one_line(tmp_path):
    for name in ("nanno", str(tmp_path)):
        with pytest.raises(UserError) as caught:
            FrozenMLLM.load(name)
        assert f"model.name={name} does not load" in str(caught.value) and "\n" not in str(caught.value)


def test_answers_without_tokens_and_prompts_with_a_placeholder_are_refused(nano, questions):
    with pytest.raises(UserError, match="has no token"):
        nano.features([replace(questions[0], id=11, answer=" ")])
    with pytest.raises(UserError, match="color of <image> circle.*rejects it"):
        nano.features([replace(questions[0], id=12, prompt="color of <image> circle")])


def test_a_processor_without_a_chat_template_is_refused(nano, questions, monkeypatch):
    mllm = FrozenMLLM(nano.model, nano.processor, name="mine")
    monkeypatch.setattr(nano.processor, "chat_template", None)
    with pytest.raises(UserError, match="processor of mine has no chat template"):
        mllm.features(questions[:1])


def test_pad_right():
    rows = [torch.ones(n, 2) * n for n in (3, 1, 2)]
    padded, real = pad_right(rows)
    assert padded.shape == (3, 3, 2) and real.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert float(padded[1, 1:].abs().sum()) == 0
