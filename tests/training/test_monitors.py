"""Accuracy on the selection split: what it measures is what the panel would."""

import pytest
import torch

from evocomp.config.load import load
from evocomp.evaluation.panel import Panel
from evocomp.training.build import build_compressor
from evocomp.training.module import CompressorModule
from evocomp.training.monitors import SelectionAccuracy


@pytest.mark.parametrize("sharp", [0, 24])
def test_right_answers_are_those_of_the_panel(nano, questions, sharp):
    config = load([], [f"compressor.sharp={sharp}"])
    torch.manual_seed(0)
    compressor = build_compressor(config, nano)
    assert compressor.config.sharp == sharp
    with torch.no_grad():  # a budget that matters
        for weight in compressor.budget.parameters():
            weight.normal_(0, 20)
    module = CompressorModule(compressor, config.loss, config.optim)
    some = questions[:40]
    panel = Panel(nano, some, max_new_tokens=4)
    given = SelectionAccuracy(nano, some, (32, 8), batch=16).count_right(module, some)
    assert given == [int(panel.compressor(compressor, kept).correct.sum()) for kept in (32, 8)]
