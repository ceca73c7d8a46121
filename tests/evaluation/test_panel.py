"""The panel asks all methods the same questions; compared with the same steps done by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from evocomp.compressor.keep import dither
from evocomp.compressor.model import EvoCompCompressor
from evocomp.config.schema import EvalConfig, RunConfig
from evocomp.data.scoring import score_answer
from evocomp.evaluation.panel import Panel, Rival, picture
from evocomp.evaluation.request import BASIC, FULL, panel_names
from evocomp.evaluation.run import all_outcomes, build_rival, middle
from evocomp.log import UserError
from evocomp.mllm.context import shown
from evocomp.mllm.hf import FrozenMLLM
from evocomp.selection import selector
from evocomp.selection.base import SelectionInputs
from tests.inference.tiny_models import build

EVERYTHING = torch.arange(144)


@pytest.fixture(scope="module")
def panel(nano, questions):
    return Panel(nano, questions[:30], batch=8, max_new_tokens=3)


@pytest.fixture(scope="module")
def compressor(nano):
    torch.manual_seed(0)
    return EvoCompCompressor.from_mllm(nano.model).eval()


def by_hand(panel, tokens_of) -> list[str]:
    """Answers one at a time; tokens_of(asked) -> (tokens [R, D], indices [R])."""
    return [panel.mllm.answer([(a.features, *tokens_of(a))], 3)[0][0] for a in panel.asked]


def scores(panel, answers) -> list[float]:
    return [score_answer(a.example, text) for a, text in zip(panel.asked, answers, strict=True)]


# ------------------------------------------------------------ references


def test_the_reference_sees_everything(panel):
    outcome = panel.full()
    assert outcome.answers == by_hand(panel, lambda a: (a.features.visual, EVERYTHING))
    assert outcome.correct.tolist() == scores(panel, outcome.answers) and outcome.kept == 144
    assert outcome.correct.mean() > 0.8


def test_the_first_floor_sees_nothing(panel):
    outcome = panel.no_image()
    nothing = torch.zeros(0, dtype=torch.long)
    assert outcome.kept == 0 and outcome.answers == by_hand(panel, lambda a: (a.features.visual[:0], nothing))
    alike = {}
    for asked, answer in zip(panel.asked, outcome.answers, strict=True):
        assert alike.setdefault(asked.example.prompt, answer) == answer


def test_the_second_floor_sees_another_picture(panel):
    outcome = panel.wrong_image()
    own = panel.full().answers
    assert outcome.kept == 144 and outcome.note == ""
    possible = {}
    for asked in panel.asked:
        possible.setdefault(asked.example.image_id, asked.features.visual)
    for asked, answer in zip(panel.asked, outcome.answers, strict=True):
        others = [tokens for name, tokens in possible.items() if name != asked.example.image_id]
        said = [panel.mllm.answer([(asked.features, tokens, EVERYTHING)], 3)[0][0] for tokens in others]
        assert answer in said
    assert outcome.answers != own and outcome.correct.mean() < panel.full().correct.mean() - 0.3


def test_where_there_is_no_other_picture_the_floor_says_so(nano, questions):
    one = [e for e in questions if e.image_id == questions[0].image_id]
    outcome = Panel(nano, one).wrong_image()
    assert outcome.not_applicable and "no other image" in outcome.not_applicable
    two = Panel(nano, [*one[:3], next(e for e in questions if e.image_id != questions[0].image_id)])
    two.asked[3].features = replace(two.asked[3].features, visual=two.asked[3].features.visual[:100])
    two.asked[0].features = replace(two.asked[0].features, visual=two.asked[0].features.visual[:100])
    assert "2 questions used their own" in two.wrong_image().note


# ------------------------------------------------------------ methods


def test_a_rival_is_its_selection_answered(panel):
    methods = [Rival(selector("uniform_stride"), "stride"), Rival(selector("average_pool"), "pool")]
    outcomes = {(o.method, o.kept): o for o in panel.selectors(methods, (36, 4))}
    assert outcomes.keys() == {(m, k) for m in ("stride", "pool") for k in (36, 4)}
    # every fourth token of 144, as defined by the selector
    from evocomp.selection.base import SelectionInputs

    for count in (36, 4):
        chosen = selector("uniform_stride")(SelectionInputs(panel.asked[0].features.visual, (12, 12)), count).indices
        expected = by_hand(panel, lambda a, chosen=chosen: (a.features.visual[chosen], chosen))
        assert outcomes["stride", count].answers == expected and len(chosen) == count

    def pooled(asked):
        means = asked.features.visual.view(6, 2, 6, 2, -1).mean((1, 3)).flatten(0, 1)
        places = torch.arange(144).view(12, 12)
        return means, places

    # 36 of 144: means of 2 x 2 tokens; the method chooses their positions
    inputs = SelectionInputs(panel.asked[0].features.visual, (12, 12))
    selection = selector("average_pool")(inputs, 36)
    assert torch.allclose(selection.tokens, pooled(panel.asked[0])[0], atol=1e-5)


def test_random_depends_on_seed_and_question_alone(nano, panel, questions):
    def chosen(examples, seed):
        return [row.tolist() for row in Panel(nano, examples).chosen(Rival(selector("random_tokens"), "r", seed), 8)]

    first = chosen(questions[:12], 0)
    assert chosen(questions[:12], 0) == first
    assert chosen(questions[:12][::-1], 0) == first[::-1]
    other = chosen(questions[:12], 1)
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert all(row == sorted(set(row)) and len(row) == 8 for row in first)
    assert len({tuple(row) for row in first}) == 12


def test_answers_do_not_depend_on_the_batch(nano, questions, panel, compressor):
    other = Panel(nano, questions[:30], batch=30, max_new_tokens=3)
    rival = Rival(selector("random_tokens"), "random", 1)
    for a, b in (
        (panel.full(), other.full()),
        (panel.selectors([rival], (16,))[0], other.selectors([rival], (16,))[0]),
        (panel.compressor(compressor, 16), other.compressor(compressor, 16)),
    ):
        assert a.answers == b.answers


@pytest.mark.parametrize("budget", [False, True])
def test_a_compressors_row_is_its_top_tokens_answered(panel, nano, budget):
    torch.manual_seed(0)
    one = EvoCompCompressor.from_mllm(nano.model, budget_input=budget, dither=0.7 * budget)
    if budget:
        with torch.no_grad():
            for weight in one.budget.parameters():
                weight.normal_()
    one.train()  # the panel must set evaluation mode
    for kept in (32, 5):

        def top(asked, kept=kept):
            with torch.no_grad():
                prompt = nano.prompt_embeds(asked.features)[None]
                logits = one(asked.features.visual[None], prompt, budget=float(kept) if budget else None).logits[0]
            index = (logits + 0.7 * budget * dither(144)).topk(kept).indices.sort().values
            return asked.features.visual[index], index

        outcome = panel.compressor(one, kept)
        assert not one.training
        assert outcome.answers == by_hand(panel, top) and outcome.kept == kept
        rows = panel.compressor_tokens(one, kept)
        assert all(torch.equal(row.places, top(asked)[1]) for row, asked in zip(rows, panel.asked, strict=True))


def test_a_compressor_with_context_is_told_how_many_it_selects(panel, nano):
    torch.manual_seed(0)
    one = EvoCompCompressor.from_mllm(nano.model, budget_input=True, sharp=48)
    with torch.no_grad():
        for weight in one.budget.parameters():
            weight.normal_(0, 10)
    one.eval()

    def top(asked):
        with torch.no_grad():
            prompt = nano.prompt_embeds(asked.features)[None]
            logits = one(asked.features.visual[None], prompt, budget=12.0).logits[0]
        return shown(asked.features.visual, logits.topk(12).indices, 4)

    assert panel.compressor(one, 16).answers == by_hand(panel, top)


def test_pictures_made_smaller(panel, nano):
    outcome = panel.downsampling(16)

    def smaller(asked):
        tokens = nano.encode_resized(asked.example, (32, 32))
        places = (torch.tensor([1, 4, 7, 10])[:, None] * 12 + torch.tensor([1, 4, 7, 10])).flatten()
        return tokens, places

    assert outcome.answers == by_hand(panel, smaller)
    assert outcome.kept == 16 and "16 tokens" in outcome.note
    assert "9 tokens (the largest size of at most 10)" in panel.downsampling(10).note
    # nothing is lost at full size
    assert panel.downsampling(144).answers == panel.full().answers


def test_what_a_model_cannot_do_has_a_row_that_says_why(panel, nano, questions):
    rows = panel.selectors([Rival(selector("cdpruner"), "cdpruner"), Rival(selector("uniform_stride"), "stride")], (8,))
    by_name = {row.method: row for row in rows}
    assert "cdpruner is not applicable" in by_name["cdpruner"].not_applicable
    assert by_name["stride"].not_applicable is None and len(by_name["stride"].correct) == 30
    model = FrozenMLLM(build("qwen2_vl"), processor=nano.processor)
    other = Panel(nano, questions[:2])
    other.mllm = model
    assert "only LLaVA supports images of another size" in other.downsampling(8).not_applicable


def test_a_rival_may_have_context_tokens_too(panel, nano):
    """With context tokens a selector selects fewer tokens and merges dropped ones; methods that merge are refused."""
    one = build_rival("uniform_stride+context", nano, 48.0)
    assert (one.label, one.sharp) == ("uniform_stride+context", 48.0)
    assert build_rival("uniform_stride", nano, 48.0).sharp == 0

    def chosen(asked):
        grid = SelectionInputs(tokens=asked.features.visual, grid=(12, 12))
        return shown(asked.features.visual, selector("uniform_stride")(grid, 12).indices, 4)

    row = panel.selectors([one], (16,))[0]
    assert row.method == "uniform_stride+context" and row.answers == by_hand(panel, chosen)
    with pytest.raises(UserError, match="tome merges tokens itself"):
        panel.selectors([build_rival("tome+context", nano, 48.0)], (16,))


def test_rows_with_context_stand_where_the_compressor_has_some():
    assert "divprune+context" in panel_names("full", context=True) and panel_names("full") == FULL
    assert panel_names("divprune,random_tokens+context", context=True) == ("divprune", "random_tokens+context")
    with pytest.raises(UserError, match="no context tokens"):
        panel_names("divprune+context")
    with pytest.raises(UserError, match="'divprun\\+context' is unknown"):
        panel_names("divprun+context", context=True)


def test_what_methods_read_is_gathered_once_a_picture(nano, questions):
    panel = Panel(nano, questions[:20])
    calls = []
    handle = nano.model.base_model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        panel.selectors([Rival(selector(n), n) for n in ("cls_attention", "visionzip", "prumerge")], (16, 4))
    finally:
        handle.remove()
    assert len(calls) == len({e.image_id for e in questions[:20]})


def test_methods_that_ran_the_llm_say_so(panel):
    rows = panel.selectors([build_rival(n, panel.mllm) for n in ("fastv", "uniform_stride")], (16,))
    assert [row.needs_llm for row in rows] == [True, False]


def test_questions_are_told_with_kinds_and_pictures(panel):
    asked = panel.questions
    assert len(asked) == 30 and asked.kinds == [a.example.kind for a in panel.asked]
    assert asked.images == [a.example.image_id for a in panel.asked] and asked.gold[0] == panel.asked[0].example.answer


def test_the_basic_panel_has_every_floor_at_every_count(panel, compressor):
    config = RunConfig(eval=EvalConfig(kept=(16, 4), seeds=2))
    rows = all_outcomes(panel, config, {"evocomp": compressor}, BASIC)
    counts: dict[str, list[int]] = {}
    for row in rows:
        counts.setdefault(row.method, []).append(row.kept)
        assert len(row.correct) == len(row.answers) == 30
    assert counts == {
        "full": [144],
        "no_image": [0],
        "wrong_image": [144],
        "downsampling": [16, 4],
        "random": [16, 4, 16, 4],
        "uniform_stride": [16, 4],
        "average_pool": [16, 4],
        "cls_attention": [16, 4],
        "divprune": [16, 4],
        "evocomp": [16, 4],
    }


def test_scores_follow_the_examples_own_rule(nano, questions):
    asked = [replace(e, answer="no", extra={"scoring": "yes_no"}) for e in questions[:6]]
    outcome = Panel(nano, asked).full()
    assert outcome.correct.tolist() == [float("no" in answer.split()) for answer in outcome.answers]


def test_small_things():
    assert middle((48, 32, 16, 8, 4)) == 16 and middle((8, 4)) == 8
    large = np.zeros((900, 600, 3), np.uint8)
    from evocomp.data.example import Example

    assert picture(Example(1, large, "a", "q", "a")).shape == (448, 299, 3)
    assert picture(Example(1, large[:96, :96], "a", "q", "a")).shape == (96, 96, 3)
