import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.log import UserError
from evocomp.losses.ghm import GHMC, exact_density, exact_ghm_loss
from evocomp.ops import ghm_histogram

# results of GHMC in mmdet 3.3.0 in fp32; data/ghmc.json describes how they were made
DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "ghmc.json").read_text())["cases"]
ARRAYS = dict(np.load(DATA / "ghmc_expected.npz"))
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def array(name):
    return torch.from_numpy(ARRAYS[name])


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"b{c['bins']}-m{c['momentum']}")
def test_non_empty_rule_is_the_published_code(case):
    loss = GHMC(bins=case["bins"], rule="non_empty", momentum=case["momentum"])
    targets = array(f"{case['data']}_labels")
    for step in case["steps"]:
        logits = array(step["logits"]).clone().requires_grad_()
        assert ghm_histogram(logits, targets, bins=case["bins"]).tolist() == step["bin_counts"]
        value = loss(logits, targets)
        value.backward()
        torch.testing.assert_close(value, torch.tensor(step["loss"]), **TOLERANCE)
        torch.testing.assert_close(logits.grad, array(step["grad_array"]), rtol=1e-4, atol=1e-6)
        if step["acc_sum_after"] is not None:
            torch.testing.assert_close(loss.running_counts, torch.tensor(step["acc_sum_after"]))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"b{c['bins']}-m{c['momentum']}")
def test_paper_rule_is_the_papers_formula(case):
    loss = GHMC(bins=case["bins"], rule="paper")
    value = loss(array(case["steps"][0]["logits"]), array(f"{case['data']}_labels"))
    expected = case["cross_check_step1"]["paper_rule_sum_i BCE_i/GD_i, GD=count*bins"]
    torch.testing.assert_close(value, torch.tensor(expected), **TOLERANCE)


def test_running_counts_are_saved_and_fixed_in_evaluation(generator):
    logits, targets = torch.randn(50, generator=generator), torch.rand(50, generator=generator)
    loss = GHMC(momentum=0.5)
    loss(logits, targets)
    resumed = GHMC(momentum=0.5)
    resumed.load_state_dict(loss.state_dict())
    before = resumed.running_counts.clone()
    assert before.sum() > 0
    first = resumed.eval()(logits * 2, targets)
    assert torch.equal(resumed.running_counts, before)
    assert torch.equal(first, resumed.train()(logits * 2, targets))
    assert not torch.equal(resumed.running_counts, before)
    assert not GHMC().state_dict()


def brute_force_density(norm, eps):
    """The window density as defined in the paper, with an n x n matrix."""
    inside = (norm[None] > norm[:, None] - eps) & (norm[None] < norm[:, None] + eps)
    length = (norm + eps).clamp_max(1) - (norm - eps).clamp_min(0)
    return inside.sum(1) / length


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.sampled_from([0.01, 0.05, 0.3, 1.0]), st.booleans())
def test_exact_density_is_the_brute_force_window(seed, n, eps, repeated):
    generator = torch.Generator().manual_seed(seed)
    norm = torch.rand(n, generator=generator, dtype=torch.float64)
    if repeated:  # many equal values, both ends, and pairs exactly eps apart
        norm = (norm * 20).round() / 20
    torch.testing.assert_close(exact_density(norm, eps), brute_force_density(norm, eps))


def test_exact_loss_is_the_published_sum(generator):
    logits = torch.randn(3, 17, generator=generator, dtype=torch.float64)
    targets = (torch.rand(3, 17, generator=generator) < 0.3).double()
    valid = torch.rand(3, 17, generator=generator) < 0.7
    x, y = logits[valid], targets[valid]
    density = brute_force_density((x.sigmoid() - y).abs(), 0.05)
    n = len(x)
    expected = sum(n / density * F.binary_cross_entropy_with_logits(x, y, reduction="none")) / n
    logits[~valid] = torch.nan
    logits.requires_grad_()
    loss = exact_ghm_loss(logits, targets, valid)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad[valid], (x.sigmoid() - y) / density)
    assert (logits.grad[~valid] == 0).all()


def test_exact_gradcheck(generator):
    # gradient norms away from both ends, where the clipped length of the window is constant
    logits = torch.rand(12, generator=generator, dtype=torch.float64).mul(2).sub(1).requires_grad_()
    targets = (torch.rand(12, generator=generator) < 0.5).double()
    assert torch.autograd.gradcheck(lambda x: exact_ghm_loss(x, targets, eps=0.05), logits)


def test_histogram_and_exact_agree_on_an_even_density():
    # norms spread evenly over [0, 1]: both densities are n everywhere, so both losses are the plain mean
    norm = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    targets = torch.zeros_like(norm)
    logits = torch.logit(norm)
    mean = F.binary_cross_entropy_with_logits(logits, targets)
    for loss in (GHMC(bins=10), GHMC(form="exact", eps=0.05)):
        torch.testing.assert_close(loss(logits, targets), mean, rtol=1e-3, atol=0)


def test_histogram_approaches_exact_with_finer_bins(generator):
    # a linear density of norms on [0, 1], by inverting its distribution function
    norm = torch.rand(200_000, generator=generator, dtype=torch.float64).mul(8).add(1).sqrt().sub(1) / 2
    logits, targets = torch.logit(norm), torch.zeros_like(norm)
    # limit for many bins: sum BCE / GD -> integral of BCE(g) dg = integral of -log(1 - g) dg = 1
    for loss, gap in ((GHMC(form="exact", eps=0.005), 1e-3), (GHMC(bins=100), 1e-3)):
        assert abs(loss(logits, targets) - 1) < gap
    coarse = abs(GHMC(bins=2)(logits, targets) - 1)
    assert coarse > 0.05  # so the test distinguishes coarse from fine bins


@pytest.mark.parametrize("momentum", [0.0, 0.75])
@pytest.mark.parametrize("rule", ["paper", "non_empty"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(1, 25), min_size=2, max_size=4))
def test_mean_over_ranks_is_the_joined_batch(rule, momentum, seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    logits = (torch.randn(n, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    targets = torch.rand(n, generator=generator, dtype=torch.float64)
    joined = GHMC(rule=rule, momentum=momentum)(logits, targets)
    shards = list(zip(logits.split(sizes), targets.split(sizes), strict=True))

    sent = []
    for shard in shards:  # the counts that every rank passes to the all-reduce
        GHMC(rule=rule, reduce_counts=lambda c: sent.append(c) or c)(*shard)
    assert all(c.dtype == torch.int64 for c in sent)
    total = sum(sent)
    ranks = [GHMC(rule=rule, momentum=momentum, reduce_counts=lambda _: total)(*shard) for shard in shards]
    mean = sum(ranks) / len(ranks)  # DDP averages gradients
    torch.testing.assert_close(mean, joined)
    got, want = torch.autograd.grad(mean, logits)[0], torch.autograd.grad(joined, logits)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"form": "window"}, "histogram or exact"),
        ({"rule": "mean"}, "paper, non_empty"),
        ({"form": "exact", "momentum": 0.5}, "form=histogram"),
        ({"form": "exact", "reduce_counts": lambda c: c}, "form=histogram"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        GHMC(**options)
