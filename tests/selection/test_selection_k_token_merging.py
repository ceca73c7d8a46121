import pytest
import torch

from evocomp.selection.k_token_merging import BlockMerger


@pytest.mark.parametrize("n", [12, 13, 15, 1])
def test_starts_as_the_mean_of_each_block(n, generator):
    tokens = torch.randn(2, n, 8, generator=generator)
    merged = BlockMerger(8, 4)(tokens)
    want = torch.stack([tokens[:, i : i + 4].double().mean(1) for i in range(0, n, 4)], dim=1)
    assert torch.allclose(merged.double(), want, atol=1e-6)


def test_positions_are_middles():
    assert BlockMerger(8, 4).positions(10).tolist() == [1, 5, 8]
    assert BlockMerger(8, 3).positions(7).tolist() == [1, 4, 6]


def test_learns_a_function_of_the_whole_block(generator):
    torch.manual_seed(0)
    merger = BlockMerger(4, 2)
    tokens = torch.randn(64, 6, 4, generator=generator)
    target = tokens[:, 0::2] - tokens[:, 1::2]  # the mean says nothing about it
    optimiser = torch.optim.Adam(merger.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        loss = (merger(tokens) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_samples_and_blocks_do_not_see_each_other(generator):
    torch.manual_seed(0)
    merger = BlockMerger(8, 4)
    torch.nn.init.normal_(merger.residual[-1].weight)
    tokens = torch.randn(3, 10, 8, generator=generator)
    alone = torch.stack([merger(sample) for sample in tokens])
    assert torch.allclose(merger(tokens), alone, atol=1e-6)
    changed = tokens.clone()
    changed[:, 4:8] += 1
    same = (merger(changed) == merger(tokens)).all(-1)
    assert same.tolist() == [[True, False, True]] * 3


def test_a_block_of_none_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        BlockMerger(8, 0)
