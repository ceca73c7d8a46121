"""Scores of answers by the benchmarks' published rules, against values computed by hand."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evocomp.data.example import Example
from evocomp.data.scoring import RULES, chosen_letter, normalise, score_answer


def example(answer: str, rule: str | None = None, choices=(), **extra) -> Example:
    extra = {**extra, **({"scoring": rule} if rule else {})}
    return Example(id=1, image="a.png", image_id="a", prompt="q", answer=answer, choices=choices, extra=extra)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The red circle.", "red circle"),
        ("  A  Dog ", "dog"),
        ("Two", "2"),
        ("ten", "10"),
        ("1,000", "1000"),
        ("1,000,000 people", "1000000 people"),
        ("3.5", "3.5"),
        ("e.g. this", "e g this"),
        ("it's", "it's"),
        ("10:30", "10:30"),
        ("x-ray", "x-ray"),
        ("red, green", "red green"),
        ("what?!", "what"),
        ("", ""),
    ],
)
def test_texts_are_normalised(text, expected):
    assert normalise(text) == expected
    assert normalise(normalise(text)) == normalise(text)


def test_exact_match_is_the_default_rule():
    assert score_answer(example("red"), "Red.") == 1.0
    assert score_answer(example("2"), "two") == 1.0
    assert score_answer(example("red"), "dark red") == 0.0
    assert score_answer(example("red"), "") == 0.0


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("yes", "Yes", 1),
        ("yes", "yes, there is a dog", 1),
        ("no", "No.", 1),
        ("no", "There is no dog. Yes, I am sure.", 1),
        ("no", "It is not there", 1),
        ("yes", "There is no dog", 0),
        ("no", "maybe", 0),  # any answer without a negation counts as yes, as in POPE's script
        ("yes", "nothing", 1),
    ],
)
def test_yes_no_answers(gold, answer, right):
    assert score_answer(example(gold, "yes_no"), answer) == right


CHOICES = ("a red dog", "a cat", "two cats", "the moon")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B: a cat", "B"),
        ("b", ""),  # a lower-case letter may be a word
        ("The answer is C", "C"),
        ("The answer is (C).", "C"),
        ("option: D", "D"),
        ("Answer: C", "C"),
        ("Answer is: (A)", "A"),
        ("I choose option B because it is so", "B"),
        ("The answer is a cat", "B"),
        ("E", ""),  # there are only four options
        ("a cat", "B"),
        ("A cat", "B"),  # an article, not option A
        ("A red dog.", "A"),
        ("Two cats", "C"),
        ("it is the moon, I think", "D"),
        ("a red dog and the moon", ""),
        ("", ""),
    ],
)
def test_option_letters_are_extracted(answer, letter):
    assert chosen_letter(answer, CHOICES) == letter
    gold = "D" if letter != "D" else "A"
    assert score_answer(example(letter or "Z", "multiple_choice", CHOICES), answer) == float(bool(letter))
    assert score_answer(example(gold, "multiple_choice", CHOICES), answer) == 0.0


said_by_annotators = st.sampled_from(["red", "blue", "two", "2", "the red"])


@given(st.lists(said_by_annotators, min_size=2, max_size=10), st.sampled_from(["red", "2"]))
def test_vqa_is_the_mean_over_annotators_left_out(answers, said):
    """VQA's definition: the mean over all subsets of n - 1 annotators of min(1, number of equal answers / 3)."""
    plain = [{"the red": "red", "two": "2"}.get(a, a) for a in answers]
    subsets = list(itertools.combinations(plain, len(plain) - 1))
    expected = sum(min(1.0, subset.count(said) / 3) for subset in subsets) / len(subsets)
    assert score_answer(example("red", "vqa_soft", answers=answers), said) == pytest.approx(expected)


def test_vqa_with_one_annotator_is_exact():
    assert score_answer(example("red", "vqa_soft", answers=["Red"]), "red") == 1.0
    assert score_answer(example("red", "vqa_soft"), "blue") == 0.0


def test_one_of_the_accepted_answers():
    asked = example("4", "one_of", answers=["4", "four apples"])
    assert [score_answer(asked, text) for text in ("Four", "four apples.", "5")] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("rule", RULES)
@given(text=st.text(max_size=30))
def test_any_text_has_a_score(rule, text):
    assert 0.0 <= score_answer(example("A", rule, CHOICES, answers=["x", "y", "A"]), text) <= 1.0
