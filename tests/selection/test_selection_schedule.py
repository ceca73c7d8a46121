from evocomp.selection.schedule import Stage, layer_average


def test_average_counts_layers_one_by_one():
    stages = [Stage(1, 5), Stage(4, 2)]
    assert layer_average(9, stages, layers=6) == (9 + 5 + 5 + 5 + 2 + 2) / 6
    assert layer_average(9, [], layers=6) == 9
