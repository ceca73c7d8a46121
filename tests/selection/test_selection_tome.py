import pytest
import torch

from evocomp.selection.tome import ToMe, tome, tome_step


@pytest.mark.parametrize("case", [0, 1])
def test_published_step(case, cases, expected, arrays):
    want = cases("tome")[case]
    x = arrays["tokens"]
    values, sizes, row = tome_step(x, x, torch.ones(144), want["r_removed"])
    assert row.tolist() == want["expected_token_to_output_row"]
    assert sizes.tolist() == want["expected_sizes"]
    assert torch.allclose(values, expected["tome/" + want["array"]], atol=1e-4, rtol=0)


def test_published_loop(cases, expected, arrays, inputs144):
    want = cases("tome")[2]
    values, sizes, row = tome(arrays["tokens"], want["target"])
    assert row.tolist() == want["expected_token_to_output_row"]
    assert sizes.tolist() == want["expected_sizes"]
    assert torch.allclose(values, expected["tome/" + want["array"]], atol=1e-4, rtol=0)

    out = ToMe()(inputs144, want["target"])
    firsts = [want["expected_token_to_output_row"].index(i) for i in range(48)]
    order = sorted(range(48), key=lambda i: firsts[i])
    assert out.positions.tolist() == sorted(firsts)
    assert torch.equal(out.tokens, values[order])
    assert out.extra["sizes"].tolist() == [want["expected_sizes"][i] for i in order]


@pytest.mark.parametrize("n,r", [(1, 1), (2, 1), (7, 3), (31, 2), (40, 39), (33, 1)])
def test_every_row_is_the_mean_of_its_members(n, r, drawn):
    inputs = drawn(n, n)
    out = ToMe()(inputs, r)
    assert out.tokens.shape == (r, 10)
    for i in range(r):
        members = (out.extra["row"] == i).nonzero()[:, 0]
        assert out.extra["sizes"][i] == len(members)
        assert out.positions[i] == members.min()
        assert torch.allclose(out.tokens[i].double(), inputs.tokens[members].double().mean(0), atol=1e-5)


def test_equal_proposals_merge_the_earlier_pair():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert tome_step(x, x, torch.ones(4), 1)[2].tolist() == [1, 1, 0, 2]
