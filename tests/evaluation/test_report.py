import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.evaluation import page as page_module
from evocomp.evaluation.outcome import AFTER_LLM, BEFORE_LLM, INSIDE_LLM, REFERENCE, Outcome, Questions, Roles
from evocomp.evaluation.page import build_blocks, markdown, write_report
from evocomp.evaluation.report import make_report
from evocomp.evaluation.rows import summarise
from evocomp.evaluation.statistics import ImageBootstrap, mcnemar
from evocomp.evaluation.summary import how_made, verdict, warnings
from evocomp.evaluation.tables import lead_table, main_table
from evocomp.evaluation.terminal import terminal
from evocomp.viz.names import display_name

PROMISED = {
    "method",
    "kept",
    "accuracy",
    "low",
    "high",
    "n",
    "relative",
    "by_kind",
    "loyalty",
    "group",
    "note",
}
PROMISED |= {"retention_above_chance", "p_vs_evocomp", "difference_vs_evocomp", "hard", "kept_average"}


def panel(seed: int = 0, pictures: int = 12, a_picture: int = 5):
    """Random answers with all parts of a real panel."""
    rng = np.random.default_rng(seed)
    n = pictures * a_picture
    gold = rng.choice(["red", "blue", "4"], n)
    questions = Questions(
        images=[f"picture {i // a_picture}" for i in range(n)],
        kinds=rng.choice(["color", "count"], n).tolist(),
        gold=gold.tolist(),
        prompts=[f"question <{i}> | what" for i in range(n)],
    )

    def outcome(method, kept, share, **rest):
        answers = np.where(rng.random(n) < share, gold, "none")
        return Outcome(method, kept, answers == gold, answers.tolist(), **rest)

    outcomes = [
        outcome("full", 64, 0.95, group=REFERENCE),
        outcome("no_image", 0, 0.2, group=REFERENCE),
        *(outcome("random", kept, 0.4, group=REFERENCE) for kept in (16, 4) for _ in range(3)),
        outcome("downsampling", 16, 0.6, group=REFERENCE),
        outcome("downsampling", 4, 0.4, group=REFERENCE, kept_average=1.0),
        outcome("Div|Prune", 16, 0.8),
        outcome("Div|Prune", 4, 0.6, note="greedy"),
        outcome("evocomp", 16, 0.9),
        outcome("evocomp", 4, 0.8),
        outcome("FastV", 16, 0.85, needs_llm=True, kept_average=40.0),
        outcome("FastV", 4, 0.8, needs_llm=True, kept_average=34.0),
        *(Outcome("HiRED", kept, np.zeros(0), not_applicable="needs several crops") for kept in (16, 4)),
    ]
    return outcomes, questions


def by_key(rows):
    return {(row["method"], row["kept"]): row for row in rows}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_rows_keep_their_invariants(seed):
    outcomes, questions = panel(seed)
    rows = summarise(outcomes, questions, resamples=60)
    found = by_key(rows)
    assert len(rows) == len(found) == len({(o.method, o.kept) for o in outcomes})
    assert len({frozenset(row) for row in rows}) == 1 and set(rows[0]) >= PROMISED
    for row in rows:
        if row["not_applicable"]:
            assert row["accuracy"] is None and row["low"] is None
            continue
        assert 0 <= row["low"] <= row["high"] <= 1 and 0 <= row["loyalty"] <= 1
        sizes = {kind: questions.kinds.count(kind) for kind in row["by_kind"]}
        total = sum(row["by_kind"][kind] * size for kind, size in sizes.items())
        assert total / row["n"] == pytest.approx(row["accuracy"])
    full = found["full", 64]
    assert full["relative"] == full["loyalty"] == full["retention_above_chance"] == 1.0
    assert found["no_image", 0]["retention_above_chance"] == 0.0
    assert full["difference_vs_full"] is None and found["evocomp", 16]["p_vs_evocomp"] is None


def test_every_number_of_a_row_against_the_answers_themselves():
    outcomes, questions = panel(1)
    rows = by_key(summarise(outcomes, questions, resamples=300, seed=4))
    right = {(o.method, o.kept): np.asarray(o.correct, dtype=float) for o in outcomes if o.method != "random"}
    row, full, ours = rows["FastV", 16], right["full", 64], right["evocomp", 16]
    mine, small, none = right["FastV", 16], right["downsampling", 16], right["no_image", 0]
    bootstrap = ImageBootstrap(questions.images, 300, seed=4)
    interval, difference = bootstrap.interval(mine), bootstrap.difference(mine, ours)
    assert row["accuracy"] == pytest.approx(mine.mean())
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert row["relative"] == pytest.approx(mine.mean() / full.mean())
    assert row["difference_vs_evocomp"] == pytest.approx(difference.mean)
    ends = (row["difference_vs_evocomp_low"], row["difference_vs_evocomp_high"])
    assert ends == pytest.approx((difference.low, difference.high))
    assert row["p_vs_evocomp"] == pytest.approx(difference.p)
    assert row["mcnemar_vs_evocomp"] == pytest.approx(mcnemar(mine, ours))
    assert row["difference_vs_full"] == pytest.approx(mine.mean() - full.mean())
    above = (mine.mean() - none.mean()) / (full.mean() - none.mean())
    assert row["retention_above_chance"] == pytest.approx(above)
    hard = [i for i in range(len(questions)) if full[i] == 1 and small[i] == 0]
    assert row["hard_n"] == len(hard) > 5 and row["hard"] == pytest.approx(mine[hard].mean())
    assert rows["downsampling", 16]["hard"] == 0.0
    assert row["kept_average"] == 40.0 and rows["evocomp", 16]["kept_average"] == 16.0
    assert (row["group"], rows["evocomp", 4]["group"]) == (AFTER_LLM, BEFORE_LLM)


def test_seeds_are_averaged_question_by_question_and_their_spread_is_kept():
    outcomes, questions = panel(2)
    row = by_key(summarise(outcomes, questions, resamples=50))["random", 4]
    seeds = [o for o in outcomes if (o.method, o.kept) == ("random", 4)]
    accuracies = [np.mean(o.correct) for o in seeds]
    assert row["seeds"] == 3 and row["accuracy"] == pytest.approx(np.mean(accuracies))
    assert row["seed_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert row["mcnemar_vs_evocomp"] is None  # McNemar's test does not apply to scores of thirds
    full = outcomes[0].answers
    same = [np.mean([a == b for a, b in zip(o.answers, full, strict=True)]) for o in seeds]
    assert row["loyalty"] == pytest.approx(np.mean(same))


def test_fractional_scores_and_missing_answers():
    questions = Questions(["a", "a", "b"], ["x"] * 3, ["1", "2", "3"])
    outcomes = [Outcome("full", 9, np.ones(3)), Outcome("evocomp", 3, np.array([0.5, 1.0, 0.0]))]
    row = by_key(summarise(outcomes, questions, resamples=20))["evocomp", 3]
    assert row["accuracy"] == 0.5 and row["loyalty"] is None and row["retention_above_chance"] is None
    assert row["hard"] is None and row["by_kind"] == {"x": 0.5}


def test_a_panel_that_cannot_be_compared_is_refused():
    outcomes, questions = panel()
    with pytest.raises(ValueError, match="there is no outcome of 'full'"):
        summarise(outcomes[1:], questions)
    with pytest.raises(ValueError, match="FastV at 9 kept: expected one score"):
        summarise([*outcomes, Outcome("FastV", 9, np.ones(3))], questions)
    with pytest.raises(ValueError, match="FastV at 9 kept"):
        summarise([*outcomes, Outcome("FastV", 9, np.ones(len(questions)), ["one answer"])], questions)


@pytest.mark.parametrize("seed", [3, 12, 13])
def test_cases_are_questions_that_compression_decided(seed):
    outcomes, questions = panel(seed)
    report = make_report(outcomes, questions, resamples=20, detail=4)
    right = {(o.method, o.kept): np.asarray(o.correct) for o in outcomes}
    full, ours, small = right["full", 64], right["evocomp", 4], right["downsampling", 4]
    lost = {questions.prompts[i] for i in np.flatnonzero(full & ~ours)}
    won = {questions.prompts[i] for i in np.flatnonzero(full & ours & ~small)}
    shown = [[case.prompt for case in report.cases if case.lost == which] for which in (True, False)]
    assert shown[0] and set(shown[0]) <= lost and len(shown[0]) == min(12, len(lost))
    assert shown[1] and set(shown[1]) <= won and len(set(shown[1])) == len(shown[1]) == min(12, len(won))


def test_files_hold_the_same_numbers(tmp_path):
    outcomes, questions = panel(4)
    report = make_report(
        outcomes, questions, resamples=50, subject="run runs/a · model nano", remarks=["The whole is made up."]
    )
    paths = write_report(report, tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads(paths["json"].read_text()) == report.rows
    text = paths["md"].read_text()
    row = by_key(report.rows)["evocomp", 16]
    number, interval = (
        f"{row['accuracy']:.3f} ({100 * row['relative']:.1f} %)",
        f"{row['low']:.3f} to {row['high']:.3f}",
    )
    assert re.search(rf"{re.escape(number)}\*?\*?; {interval} \|", text)
    assert re.search(rf'title="95 % interval: {interval}">(<b>)?{re.escape(number)}', paths["html"].read_text())
    for words in (
        *(REFERENCE, BEFORE_LLM, AFTER_LLM),
        "60 questions about 12 images",
        "run runs/a · model nano",
        "The whole is made up.",
    ):
        assert words in text and words.replace("'", "&#39;") in paths["html"].read_text()
    assert "FastV: visual tokens averaged over the layers of the LLM: 40.0 at 16 kept, 34.0 at 4 kept." in text
    assert "HiRED: not applicable: needs several crops." in text and "| HiRED | n/a | n/a |" in text


def as_markdown(report):
    return markdown(report, build_blocks(report))


def test_markdown_tables_are_rectangular_and_markup_is_escaped():
    text = as_markdown(make_report(*panel(5), resamples=20))
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 6 and "Div\\|Prune" in text
    for lines in blocks:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "question \\<" in text and "question <" not in text


HOSTILE = ("<script>alert(1)</script>", "a | b", "*x* _y_ `z`", "[a](b) ![c](d)", "two\nlines\n# head", "&lt; $x$ \\|")


@pytest.mark.parametrize("words", HOSTILE)
def test_words_from_data_are_shown_as_they_are(words, tmp_path):
    """Kinds, prompts, answers, image names, methods, notes, reasons, remarks and the subject are untrusted text."""
    n = 8
    questions = Questions([f"{words} {i // 2}" for i in range(n)], [words] * n, [words] * n, [words] * n)
    outcomes = [
        Outcome("full", 9, np.ones(n), [words] * n, group=REFERENCE),
        Outcome("downsampling", 3, np.zeros(n), [words] * n),
        Outcome("evocomp", 3, np.array([1, 0] * 4), [words] * n, note=words),
        Outcome(words, 3, np.ones(n), [words] * n, group=words),
        Outcome("HiRED", 3, np.zeros(0), not_applicable=words),
    ]
    report = make_report(outcomes, questions, resamples=20, subject=words, remarks=[words], title=words)
    paths = write_report(report, tmp_path)
    parser = _Balance()
    parser.feed(re.sub(r"<svg.*?</svg>", "", paths["html"].read_text(), flags=re.S))
    assert parser.open == [] and not {"script", "em", "a"} & parser.seen
    assert parser.text.count(words) >= 30
    text = paths["md"].read_text()
    escaped = page_module.escape_markdown(words)
    assert text.count(escaped) >= 30
    rest = text.replace(escaped, "").replace(page_module.escape_markdown(display_name(words)), "")
    assert not re.search(r"script|alert|\(b\)|lines|`|\$", rest)
    for block in (block.splitlines() for block in text.split("\n\n") if block.startswith("|")):
        assert len({re.sub(r"\\\\|\\\|", "", line).count("|") for line in block}) == 1


@pytest.mark.parametrize("words", HOSTILE)
def test_markdown_escapes_every_mark_once(words):
    """Removing the backslashes gives the original words on one line."""
    escaped = page_module.escape_markdown(words)
    assert re.sub(r"\\(.)", r"\1", escaped) == " ".join(words.split())
    assert not re.search(r"(?<!\\)(\\\\)*[`*_\[\]<>|#$&]", escaped)


def test_the_best_of_each_group_is_strong_and_ties_alike():
    questions = Questions(list("abcd"), ["x"] * 4, ["1"] * 4)
    outcomes = [
        Outcome("full", 9, np.ones(4), group=REFERENCE),
        Outcome("random", 3, np.ones(4), group=REFERENCE),
        Outcome("evocomp", 3, np.array([1, 0, 0, 0])),
        Outcome("tome", 3, np.array([1, 1, 0, 0])),
        Outcome("hired", 3, np.array([0, 0, 1, 1])),
        Outcome("fastv", 3, np.array([1, 1, 1, 0]), needs_llm=True),
    ]
    (_, lines), *_ = [
        x for x in main_table(make_report(outcomes, questions, resamples=20)).groups if x[0] == BEFORE_LLM
    ]
    assert [(line.name, line.cells[0].strong) for line in lines] == [
        ("EvoComp", False),
        ("ToMe", True),
        ("HiRED", True),
    ]
    text = as_markdown(make_report(outcomes, questions, resamples=20))
    assert "| ToMe | **0.500 (50.0 %)**; " in text and "| HiRED | **0.500 (50.0 %)**; " in text
    assert "| random tokens | 1.000" in text, "references are never bold"
    assert "| FastV | 0.750" in text, "a method that is alone in its group is not bold"
    assert "| **EvoComp** | 0.250" in text and "| uncompressed (9 tokens) | 1.000" in text


def test_leads_have_our_sign():
    outcomes, questions = panel(6)
    report = make_report(outcomes, questions, resamples=100)
    row = by_key(report.rows)["random", 4]
    assert row["difference_vs_evocomp"] < 0
    lines = {line.name: line for _, lines in lead_table(report).groups for line in lines}
    assert lines["random tokens"].cells[1].text == f"{-100 * row['difference_vs_evocomp']:+.1f}"
    assert (
        lines["uncompressed"].cells[1].text == f"{100 * by_key(report.rows)['evocomp', 4]['difference_vs_full']:+.1f}"
    )


def judged_panel(ours: float, rival: float, images: int = 60, inside: float | None = None):
    """120 questions about 60 images; each method is correct on a number of questions from the first one on."""
    n = 2 * images
    questions = Questions([str(i // 2) for i in range(n)], ["x"] * n, ["1"] * n)

    def correct(share):
        return (np.arange(n) < share * n).astype(float)

    outcomes = [
        Outcome("full", 9, np.ones(n), group=REFERENCE),
        *(Outcome("evocomp", kept, correct(ours)) for kept in (4, 2)),
        Outcome("tome", 4, correct(ours)),
        Outcome("tome", 2, correct(rival)),
    ]
    if inside is not None:
        outcomes += [Outcome("fastv_inside", 2, correct(inside), needs_llm=True, group=INSIDE_LLM)]
    return make_report(outcomes, questions, resamples=400)


def test_the_verdict_says_where_ours_is_ahead_level_and_behind():
    first, ahead, level = verdict(judged_panel(0.8, 0.4))
    assert first.startswith("With 4 / 2 of 9 visual tokens, EvoComp reaches 80.0 / 80.0 % of the uncompressed accuracy")
    assert "better than every other method" in ahead and "at 2 kept tokens" in ahead
    assert level.startswith("At 4 kept tokens none of these methods is better") and "ToMe" in level
    *_, behind, after = verdict(judged_panel(0.4, 0.8, inside=0.9))
    assert behind == "At 2 kept tokens it is behind ToMe (p < 0.05)."
    assert after.endswith("FastV, inside the LLM is better at 2 kept tokens.")
    assert len(verdict(judged_panel(0.8, 0.4, inside=0.1))) == 3


@pytest.mark.parametrize(("images", "warned"), [(4, True), (29, True), (49, True), (50, False)])
def test_too_little_data_is_a_warning_in_the_place_of_a_ranking(images, warned, tmp_path):
    report = judged_panel(0.8, 0.2, images)
    assert bool(warnings(report)) == warned and (len(verdict(report)) == 1) == warned
    paths = write_report(report, tmp_path)
    for text in (paths["md"].read_text(), paths["html"].read_text(), terminal(report)):
        assert (f"Only {2 * images} questions about {images} images were evaluated" in text) == warned


def test_terminal_table_is_aligned():
    text = terminal(make_report(*panel(7), resamples=20))
    rows = [line for line in text.splitlines() if line.startswith(("EvoComp", "FastV", "downsampled image"))]
    assert len(rows) == 3 and len({len(line) for line in rows}) == 1
    assert text.splitlines()[0].endswith("  4 kept") and max(map(len, text.splitlines()[:-2])) < 100


class _Balance(HTMLParser):
    """Collects unclosed tags and all addresses that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text, self.seen = [], [], "", set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in ("meta", "img", "path", "use"):
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and not v.startswith(("data:", "#"))]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_needs_no_other_file_and_escapes_what_was_asked(tmp_path):
    sheet = tmp_path / "kept.png"
    sheet.write_bytes(b"\x89PNG not really")
    page = write_report(make_report(*panel(8), resamples=20), tmp_path, sheet)["html"].read_text()
    parser = _Balance()
    parser.feed(page)
    assert parser.open == [] and parser.fetched == []
    assert "question <" in parser.text and "question <" not in page
    assert "data:image/png;base64,iVBORyBub3QgcmVhbGx5" in page
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_an_old_report_stays_whole_when_writing_fails(tmp_path, monkeypatch):
    report = make_report(*panel(9), resamples=20)
    paths = write_report(report, tmp_path)
    before = paths["md"].read_text()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(page_module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(make_report(*panel(10), resamples=20), tmp_path)
    monkeypatch.undo()
    assert paths["md"].read_text() == before and len(os.listdir(tmp_path)) == 3


def test_roles_may_have_other_names():
    outcomes, questions = panel(11)
    names = {"evocomp": "mine", "full": "whole", "no_image": "blind", "downsampling": "small"}
    renamed = [Outcome(**(vars(o) | {"method": names.get(o.method, o.method)})) for o in outcomes]
    usual = summarise(outcomes, questions, resamples=30)
    other = summarise(renamed, questions, Roles("mine", "whole", "blind", "small"), resamples=30)
    for a, b in zip(usual, other, strict=True):
        assert {k: v for k, v in a.items() if k != "method"} == {k: v for k, v in b.items() if k != "method"}


def test_a_model_that_answers_nothing_rightly_has_a_report_too(tmp_path):
    """With an uncompressed accuracy of 0 there is no curve; everything else is written."""
    outcomes, questions = panel()
    outcomes = [replace(one, correct=np.zeros_like(one.correct)) for one in outcomes]
    write_report(make_report(outcomes, questions, resamples=50), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<table" in text
    assert "<svg" not in text and "nothing to compare" in text


def every_form(report):
    blocks = build_blocks(report)
    return terminal(report), markdown(report, blocks), page_module.page(report, blocks)


def test_too_few_images_are_told_in_every_form():
    few, enough = (make_report(*panel(pictures=count), resamples=50) for count in (7, 12))
    for text in every_form(few):
        assert "no two-sided p value can be below 0.016" in " ".join(text.split())
    for text in every_form(enough):
        assert "no two-sided p" not in text
    assert min(row["p_vs_evocomp"] for row in few.rows if row["p_vs_evocomp"] is not None) >= 2 / 2**7
    assert "sign-flip" in " ".join(how_made(few))
    assert "sign-flip" not in " ".join(how_made(make_report(*panel(pictures=40), resamples=50)))
