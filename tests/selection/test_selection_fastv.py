import pytest
import torch

from evocomp.selection.fastv import FastV, fastv, fastv_kept
from evocomp.selection.schedule import Stage, layer_average


@pytest.mark.parametrize("case", [0, 1])
def test_published(case, cases, inputs144):
    want = cases("fastv")[case]
    kept = fastv_kept(144, want["R"])
    assert kept == want["kept_count"]
    indices = FastV(k=want["K"])(inputs144, kept).indices
    assert indices.tolist() == want["expected_kept_sorted(image-relative)"]
    lengths = want["seq_len_per_layer"]
    average = layer_average(144, [Stage(want["K"], kept)], layers=len(lengths))
    assert average == sum(lengths) / len(lengths) - 24


def test_rounding_is_pythons():
    assert [fastv_kept(n, 0.5) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]


def test_only_the_last_query_of_the_right_layer_counts(drawn):
    first, second = torch.zeros(2, 3, 12), torch.zeros(2, 3, 12)
    first[:, -1, 4 + 2], first[:, 0, 4 + 1] = 1, 5
    second[:, -1, 4 + 3] = 1
    inputs = drawn(0, 5, text=3, llm_attention={1: first, 2: second})
    assert FastV()(inputs, 1).indices.tolist() == [2]
    assert FastV(k=3)(inputs, 1).indices.tolist() == [3]


def test_heads_are_averaged():
    attention = torch.tensor([[0.6, 0.0, 0.4], [0.0, 0.3, 0.4]])
    assert fastv(attention, 1).tolist() == [2]
