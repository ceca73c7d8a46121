import pytest

from evocomp.selection.schedule import Stage, kept_for_average, layer_average


@pytest.mark.parametrize("average,kept", [(192, 166), (128, 98), (64, 30)])
def test_one_drop_before_layer_two(average, kept):
    assert kept_for_average(576, average, before_layer=2) == kept
    assert abs(layer_average(576, [Stage(2, kept)]) - average) < 0.5


def test_average_counts_layers_one_by_one():
    stages = [Stage(1, 5), Stage(4, 2)]
    assert layer_average(9, stages, layers=6) == (9 + 5 + 5 + 5 + 2 + 2) / 6
    assert layer_average(9, [], layers=6) == 9


def test_an_average_that_a_late_drop_cannot_reach():
    with pytest.raises(ValueError, match="before layer 8"):
        kept_for_average(576, 128, before_layer=8)
