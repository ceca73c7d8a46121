import pytest
import torch

from evocomp.selection.k_token_merging import BlockMerger


def by_hand(merger: BlockMerger, block: torch.Tensor, k: int) -> torch.Tensor:
    """Mean of a block [n, D], n <= K, plus the MLP of the block padded with zeros, in float64."""
    weights = [parameter.double() for parameter in merger.parameters()]
    x = torch.cat([block.double(), block.new_zeros(k - len(block), block.shape[1]).double()]).flatten()
    x = (weights[0] @ x + weights[1]).clamp(min=0)
    x = (weights[2] @ x + weights[3]).clamp(min=0)
    return block.double().mean(0) + weights[4] @ x + weights[5]


@pytest.mark.parametrize("n", [12, 13, 15, 1])
def test_mean_of_each_block_and_three_layers_of_it(n, generator):
    torch.manual_seed(0)
    tokens, merger = torch.randn(2, n, 8, generator=generator), BlockMerger(8, 4)
    want = torch.stack([torch.stack([by_hand(merger, one[i : i + 4], 4) for i in range(0, n, 4)]) for one in tokens])
    assert torch.allclose(merger(tokens).double(), want, atol=1e-6)


@pytest.mark.parametrize(("block", "width"), [(2, 4), (3, 6), (4, 6), (9, 13)])
def test_widths_of_the_published_code(block, width):
    """Widths int(factor * K) * D and K * D, with factor 2 up to K = 3, else 1.5; no weight matrix is zero."""
    merger = BlockMerger(8, block)
    shapes = [tuple(parameter.shape) for parameter in merger.parameters() if parameter.ndim == 2]
    assert shapes == [(8 * width, 8 * block), (8 * block, 8 * width), (8, 8 * block)]
    assert all(bool(parameter.abs().max() > 0) for parameter in merger.parameters())


def test_positions_are_middles():
    assert BlockMerger(8, 4).positions(10).tolist() == [1, 5, 8]
    assert BlockMerger(8, 3).positions(7).tolist() == [1, 4, 6]


def test_learns_a_function_of_the_whole_block(generator):
    torch.manual_seed(0)
    merger = BlockMerger(4, 2)
    tokens = torch.randn(64, 6, 4, generator=generator)
    target = tokens[:, 0::2] - tokens[:, 1::2]  # independent of the mean
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


def test_a_block_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        BlockMerger(8, 0)
