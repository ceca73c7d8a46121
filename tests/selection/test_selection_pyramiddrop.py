import pytest
import torch

from evocomp.selection.fastv import fastv
from evocomp.selection.llm_attention import last_query_attention
from evocomp.selection.pyramiddrop import (
    PyramidDrop,
    pyramiddrop_stages,
    pyramiddrop_stages_for_average,
)
from evocomp.selection.schedule import layer_average


def test_published_stages(cases, arrays):
    """A decoder of identity layers; the ranking layer uses half of its input as query and key, 4 heads of 16."""
    want = cases("pyramiddrop")[0]
    hidden = arrays["llm_hidden"]
    left = torch.arange(144)
    stages = pyramiddrop_stages(144, ratios=tuple(want["image_token_ratio_list"][1:]))
    for stage, truth in zip(stages, want["stages"], strict=True):
        rows = 0.5 * torch.cat([hidden[:5], hidden[5:149][left], hidden[149:]])
        heads = rows.unflatten(1, (4, 16)).transpose(0, 1)
        attention = last_query_attention(heads[:, -1], heads)
        assert stage.visual == truth["kept_count"]
        left = left[fastv(attention[:, 5 : 5 + len(left)], stage.visual)]
        assert left.tolist() == truth["expected_kept_sorted(image-relative)"]


def test_published_default_processes_270_tokens():
    assert layer_average(576, pyramiddrop_stages(576)) == 270
    assert [stage.visual for stage in pyramiddrop_stages(30)] == [15, 7, 3]


@pytest.mark.parametrize("average", [192, 128, 64])
def test_schedules_for_an_average(average):
    stages = pyramiddrop_stages_for_average(576, average)
    assert average - 1 < layer_average(576, stages) <= average
    assert 576 > stages[0].visual > stages[1].visual > stages[2].visual > 0


def test_an_average_that_late_drops_cannot_reach():
    with pytest.raises(ValueError, match="up to layer 8"):
        pyramiddrop_stages_for_average(576, 128, layers=(8, 16, 24))


def test_ranks_in_its_own_layer(drawn):
    attention = torch.zeros(2, 1, 12)
    attention[:, -1, 4 + 3] = 1
    inputs = drawn(0, 5, text=3, llm_attention={8: attention})
    assert PyramidDrop()(inputs, 1).indices.tolist() == [3]
