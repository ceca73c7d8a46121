"""Accuracy on the selection split equals that of the panel."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from evocomp.config.load import load
from evocomp.evaluation.panel import Panel
from evocomp.training.build import build_compressor
from evocomp.training.module import CompressorModule
from evocomp.training.monitors import SelectionAccuracy, at_random


@pytest.mark.parametrize("sharp", [0, 24])
def test_right_answers_are_those_of_the_panel(nano, questions, sharp):
    config = load([], [f"compressor.sharp={sharp}"])
    torch.manual_seed(0)
    compressor = build_compressor(config, nano)
    assert compressor.config.sharp == sharp
    with torch.no_grad():  # a budget input that has an effect
        for weight in compressor.budget.parameters():
            weight.normal_(0, 20)
    module = CompressorModule(compressor, config.loss, config.optim)
    some = questions[:40]
    panel = Panel(nano, some, max_new_tokens=4)
    monitor = SelectionAccuracy(nano, some, (32, 8), batch=16, max_new_tokens=4)
    given = monitor.right_answers(some, partial(monitor.by_compressor, module), (32, 8))
    assert given == [int(panel.compressor(compressor, kept).correct.sum()) for kept in (32, 8)]


def test_answers_are_scored_and_cut_as_in_the_report(nano, questions):
    """Scoring rules of benchmarks, other spellings of an answer, disagreeing annotators; length of answers."""
    rules = [
        lambda e: replace(e, answer=e.answer.capitalize()),
        lambda e: replace(e, answer="Yes", extra={"scoring": "yes_no"}),
        lambda e: replace(e, extra={"scoring": "vqa_soft", "answers": [e.answer] * 2 + ["other"] * 8}),
    ]
    some = [rules[i % 3](e) for i, e in enumerate(questions[:29])]
    full = Panel(nano, some).full().correct.sum()
    (given,) = SelectionAccuracy(nano, some, (144,), batch=16).right_answers(some, at_random, (144,))
    assert given == pytest.approx(full) and given % 1, "with disagreeing annotators an answer is partly correct"
    lengths, answer = [], nano.answer
    nano.answer = lambda prompts, max_new_tokens: lengths.append(max_new_tokens) or answer(prompts, max_new_tokens)
    try:
        SelectionAccuracy(nano, some, (16,), batch=30, max_new_tokens=3).right_answers(some, at_random, (16,))
    finally:
        del nano.answer
    assert lengths == [3]
