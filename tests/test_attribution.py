"""The study of what a question is worth asks another question about the same image."""

from evocomp.config.schema import DataConfig
from evocomp.data.splits import test_questions as drawn_questions
from experiments.attribution import swapped


def test_the_other_question_is_about_the_same_image_and_asks_something_else():
    examples = drawn_questions(DataConfig(relation=True), 120, 9103)
    others = swapped(examples)
    asked = {}
    for example in examples:
        asked.setdefault(example.image_id, set()).add(example.prompt)
    for own, other in zip(examples, others, strict=True):
        assert (other.id, other.image_id, other.answer) == (own.id, own.image_id, own.answer)
        assert other.prompt in asked[own.image_id] and (other.prompt != own.prompt or len(asked[own.image_id]) == 1)
    assert sum(other.prompt != own.prompt for own, other in zip(examples, others, strict=True)) > 100


def test_a_lonely_question_stays():
    examples = drawn_questions(DataConfig(), 120, 9103)[:1]
    assert swapped(examples) == examples
