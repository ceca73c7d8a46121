"""Losses of candidate masks against transformers' own logits, and ways of batching against each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from evocomp.config.schema import ScorerConfig
from evocomp.data.example import stable_id
from evocomp.log import UserError
from evocomp.mllm.context import shown
from evocomp.scoring.answer_losses import AnswerLosses, shares_prefix
from evocomp.scoring.scorer import CandidateScorer
from tests.mllm.answer_logits import answer_logits


def masks(count: int, size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.sort(np.argsort(rng.random((count, 144)), axis=1)[:, :size], axis=1)


@pytest.fixture(scope="module")
def asked(nano, questions):
    """The same questions with answers of one to three tokens."""
    answers = [None, "red circle", "3 yes no"]
    changed = []
    for i, example in enumerate(questions[:6]):
        answer = answers[i % 3] or example.answer
        changed.append(replace(example, id=stable_id("scorer", example.id), answer=answer))
    return nano.features(changed), changed


def test_all_tokens_give_the_loss_of_the_unmodified_model(nano, asked):
    scorer = CandidateScorer(nano)
    for features, example in zip(*asked, strict=True):
        inputs = nano._process(example)
        ids = torch.cat([inputs["input_ids"], features.answer_ids[None]], dim=1)
        with torch.no_grad():
            logits = nano.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
            ).logits[0]
        count = len(features.answer_ids)
        # the formula, in double precision: mean over answer tokens of log sum exp minus the token's logit
        rows = logits[-count - 1 : -1].double()
        expected = (rows.exp().sum(-1).log() - rows[torch.arange(count), features.answer_ids]).mean()
        assert scorer.full(features) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    assert {len(f.answer_ids) for f in asked[0]} == {1, 2, 3}


def test_masks_give_the_loss_of_the_adapters_logits(nano, asked):
    scorer = CandidateScorer(nano)
    kept = masks(5, 16)
    for features in asked[0]:
        index = torch.from_numpy(kept)
        rows = answer_logits(nano, features, features.visual[index], index).double()
        count = len(features.answer_ids)
        chosen = rows[:, torch.arange(count), features.answer_ids]
        expected = (rows.exp().sum(-1).log() - chosen).mean(1)
        assert np.allclose(scorer(features, kept), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_equal_single_masks(nano, asked, batch):
    kept = masks(20, 16)
    for features in asked[0]:
        alone = np.concatenate([CandidateScorer(nano)(features, row[None]) for row in kept])
        together = CandidateScorer(nano, batch)(features, kept)
        assert together.shape == (20,) and together.dtype == np.float32
        assert np.allclose(together, alone, atol=1e-5) and np.std(alone) > 1e-3


def test_masks_of_several_samples_equal_single_masks(nano, asked):
    """Prompts and answers of different lengths, so that rows are padded."""
    features = asked[0]
    assert len({len(f.prompt_ids) + len(f.answer_ids) for f in features}) > 2
    kept = np.stack([masks(8, 16, seed) for seed in range(len(features))])
    alone = np.stack([CandidateScorer(nano)(f, own) for f, own in zip(features, kept, strict=True)])
    for batch in (8, 24, 1000):
        assert np.allclose(CandidateScorer(nano, batch).each(features, kept), alone, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 5, 24, 1000])
def test_context_tokens_reach_every_mask_of_every_batch(nano, asked, batch):
    """For any batch size, losses equal those of `FrozenMLLM` for the same tokens and cluster sizes."""
    features = [replace(f, answer_ids=f.answer_ids[:1]) for f in asked[0][:4]]
    kept = np.stack([masks(8, 6, seed) for seed in range(len(features))])
    given = CandidateScorer(nano, batch).each(features, kept, context=4)
    for one, own, losses in zip(features, kept, given, strict=True):
        prompts = [(one, *shown(one.visual, torch.from_numpy(mask), 4)) for mask in own]
        logits = nano.answer(prompts, max_new_tokens=1)[1].double()
        expected = logits.exp().sum(-1).log() - logits[:, one.answer_ids[0]]
        assert np.allclose(losses, expected.numpy(), atol=1e-5)


def same_picture(encoded) -> list:
    return [f for f in encoded if f.image_id == encoded[0].image_id]


def test_packed_questions_equal_single_questions(nano, encoded):
    together = same_picture(encoded)
    assert len(together) > 5
    kept = masks(6, 16)
    shared = CandidateScorer(nano, 4).shared(together, kept)
    alone = np.stack([CandidateScorer(nano)(f, kept) for f in together])
    assert shared.shape == (len(together), 6) and np.allclose(shared, alone, atol=2e-5)
    assert np.allclose(CandidateScorer(nano).shared(together[:1], kept), alone[:1], atol=2e-5)


def test_packed_questions_with_answers_of_several_tokens(nano, questions):
    changed = [
        replace(e, id=stable_id("shared", e.id), answer=answer)
        for e, answer in zip(questions[:3], ("red", "red circle", "3 yes no"), strict=True)
    ]
    together = nano.features(changed)
    kept = masks(4, 12)
    alone = np.stack([CandidateScorer(nano)(f, kept) for f in together])
    assert np.allclose(CandidateScorer(nano).shared(together, kept), alone, atol=2e-5)


def test_questions_about_two_images_cannot_be_packed(nano, encoded):
    other = next(f for f in encoded if f.image_id != encoded[0].image_id)
    assert shares_prefix(same_picture(encoded)) and not shares_prefix([encoded[0], other])
    with pytest.raises(UserError, match="prompts differ before the end of the image"):
        AnswerLosses(nano).shared([encoded[0], other], torch.from_numpy(masks(2, 8)))


def test_earlier_turns_break_sharing_only_if_they_differ(nano, questions):
    def with_history(text: str, id: int):
        return replace(questions[id], id=stable_id(text, id), history=((text, "red"),))

    a, b, c = nano.features(
        [with_history("color of circle", 0), with_history("color of circle", 1), with_history("color of ring", 2)]
    )
    kept = masks(3, 16)
    # the image comes before the first turn, so even these prompts share their prefix
    assert shares_prefix([a, b, c])
    alone = np.stack([CandidateScorer(nano)(f, kept) for f in (a, b, c)])
    assert np.allclose(CandidateScorer(nano).shared([a, b, c], kept), alone, atol=2e-5)


def test_forward_passes_and_seconds_are_counted(nano, encoded):
    scorer = CandidateScorer(nano, batch=4, settings=ScorerConfig(own_pass=False, fit_memory=False))
    calls = []
    rows = []
    hook = nano.decoder.register_forward_pre_hook(
        lambda _, __, kw: rows.append(tuple(kw["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    together = same_picture(encoded)[:5]
    try:
        with scorer.after_each_batch(lambda: calls.append(scorer.forwards)):
            scorer(encoded[0], masks(10, 16))
        text = len(encoded[0].text_at)
        assert rows == [(n, text + 16) for n in (4, 4, 2)] and len(calls) == 3
        scorer.shared(together, masks(6, 16))
        # one sequence per mask, for any number of questions
        assert [count for count, _ in rows[3:]] == [4, 2]
    finally:
        hook.remove()
    assert scorer.forwards == 10 + 6 * 5 and scorer.seconds > 0
    assert scorer.losses.sequences == sum(count for count, _ in rows) == 16
    assert scorer.losses.tokens == sum(count * length for count, length in rows)


def test_nothing_is_counted_within_uncounted(nano, encoded):
    """All counters, from which the cost of labels is computed."""
    scorer = CandidateScorer(nano)
    scorer(encoded[0], masks(3, 16))

    def counts():
        return scorer.forwards, scorer.seconds, scorer.losses.sequences, scorer.losses.tokens

    before = counts()
    with pytest.raises(RuntimeError, match="on purpose"), scorer.uncounted():
        scorer(encoded[0], masks(3, 16))
        assert all(after > first for after, first in zip(counts(), before, strict=True))
        raise RuntimeError("on purpose")
    assert counts() == before and before[0] == 3


def test_one_call_after_each_batch_at_a_time(nano, encoded):
    scorer, calls = CandidateScorer(nano), []
    with scorer.after_each_batch(lambda: calls.append(1)):
        with pytest.raises(RuntimeError, match="already"), scorer.after_each_batch(print):
            pass
        scorer(encoded[0], masks(3, 16))
    scorer(encoded[0], masks(3, 16))
    assert len(calls) == 1, "over after the block, and not before"


def test_llama_body_has_the_same_counts(nano, encoded):
    both = [CandidateScorer(nano, settings=ScorerConfig(own_pass=own)) for own in (True, False)]
    for scorer in both:
        scorer(encoded[0], masks(10, 16))
        scorer.each(encoded[:3], np.stack([masks(4, 8)] * 3))
    assert len({(s.forwards, s.losses.sequences, s.losses.tokens) for s in both}) == 1


def test_only_answer_rows_reach_the_head(nano, asked):
    """The output head over the vocabulary is the most expensive layer of a real model."""
    seen = []
    scorer = CandidateScorer(nano)
    head = scorer.losses.head
    scorer.losses.head = lambda rows: seen.append(rows.shape) or head(rows)
    for features in asked[0][:3]:
        scorer(features, masks(5, 16))
    assert [tuple(shape[:2]) for shape in seen] == [(5, len(f.answer_ids)) for f in asked[0][:3]]


def test_half_precision_is_close_and_leaves_the_model_alone(nano, encoded):
    kept = masks(20, 16)
    before = CandidateScorer(nano)(encoded[0], kept)
    half = CandidateScorer(nano, dtype="bfloat16")(encoded[0], kept)
    assert half.dtype == np.float32 and 0 < np.abs(half - before).max() < 0.3
    assert np.corrcoef(half, before)[0, 1] > 0.99
    assert nano.vocabulary.dtype == torch.float32
    assert np.array_equal(CandidateScorer(nano)(encoded[0], kept), before)


@pytest.mark.parametrize(
    "reuse,device,reused", [("auto", "cpu", 0), ("auto", "cuda", 1), ("always", "cpu", 1), ("never", "cuda", 0)]
)
def test_local_search_reuses_prefixes_where_it_pays(nano, asked, reuse, device, reused, monkeypatch):
    features, kept = asked[0][0], masks(3, 16)
    scorer = CandidateScorer(nano, settings=ScorerConfig(prefix_reuse=reuse))
    seen, right = [], scorer.losses.candidates
    scorer.losses.candidates = lambda one, some, flips, *rest: seen.append(flips) or right(one, some, flips, *rest)
    monkeypatch.setattr(CandidateScorer, "_reuse_pays", staticmethod(lambda _: device == "cuda"))
    scorer(features, kept, flips=True)
    scorer(features, kept)
    assert seen == [bool(reused), False]
