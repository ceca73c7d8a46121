"""The combined optimizer compared with torch's two optimizers, and the schedule with its formula."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from evocomp.compressor.model import EvoCompCompressor
from evocomp.config.schema import OptimConfig
from evocomp.training.muon import newton_schulz
from evocomp.training.optim import MuonWithAdamW, build_optimizer, learning_rate, schedule


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Linear(6, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.layers(x).tanh())


def steps(model: nn.Module, optimizer, count: int, seed: int = 0, scheduler=None) -> None:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=rng)).square().mean().backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def joint(model: Toy) -> MuonWithAdamW:
    return build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1))


def test_it_is_torchs_muon_on_matrices_and_adamw_on_the_rest():
    ours, theirs = Toy(), Toy()
    steps(ours, joint(ours), 5)
    muon = torch.optim.Muon(
        [theirs.layers.weight], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [theirs.layers.bias, *theirs.head.parameters()], lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1
    )
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):
        theirs.zero_grad()
        theirs(torch.randn(8, 6, generator=rng)).square().mean().backward()
        muon.step()
        adamw.step()
    assert equal(ours, theirs) and not equal(ours, Toy())


def test_the_matrices_of_the_compressors_layers_are_muons(nano):
    compressor = EvoCompCompressor.from_mllm(nano.model, budget_input=True)
    optimizer = build_optimizer(compressor, OptimConfig())
    groups = {name: {id(p) for g in part.param_groups for p in g["params"]} for name, part in optimizer.parts.items()}
    assert not groups["muon"] & groups["adamw"]
    assert groups["muon"] | groups["adamw"] == {id(p) for p in compressor.parameters()}
    names = {id(p): name for name, p in compressor.named_parameters()}
    muon = {names[i].split(".")[-2] for i in groups["muon"]}
    assert muon == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_frozen_weights_are_left_out():
    model = Toy()
    model.layers.requires_grad_(False)
    before = copy.deepcopy(model.layers)
    optimizer = build_optimizer(model, OptimConfig(name="adamw"))
    assert isinstance(optimizer, torch.optim.AdamW)
    steps(model, optimizer, 2)
    assert equal(model.layers, before)


def test_its_state_survives_a_round_trip(tmp_path):
    whole = Toy()
    steps(whole, joint(whole), 3)
    first = Toy()
    optimizer = joint(first)
    steps(first, optimizer, 3)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    stored = torch.load(tmp_path / "a.pt", weights_only=True)
    second = Toy()
    again = joint(second)
    second.load_state_dict(stored["model"])
    again.load_state_dict(stored["optimizer"])
    steps(first, optimizer, 3, seed=1)
    steps(second, again, 3, seed=1)
    assert equal(first, second)
    # without the state the steps would differ
    third = Toy()
    third.load_state_dict(stored["model"])
    steps(third, joint(third), 3, seed=1)
    assert not equal(first, third)


def test_a_scheduler_reaches_both_parts_also_after_loading():
    model = Toy()
    optimizer = joint(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    steps(model, optimizer, 2, scheduler=scheduler)
    rates = [group["lr"] for part in optimizer.parts.values() for group in part.param_groups]
    assert rates == [pytest.approx(0.25e-2)] * 2
    again = joint(model)
    again.load_state_dict(optimizer.state_dict())
    other = torch.optim.lr_scheduler.LambdaLR(again, lambda step: 0.0)
    other.step()
    assert [group["lr"] for part in again.parts.values() for group in part.param_groups] == [0.0, 0.0]


def test_the_closure_is_run_with_gradients():
    model = Toy()
    optimizer = joint(model)

    def closure():
        assert torch.is_grad_enabled()
        loss = model(torch.ones(2, 6)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure).detach()) > 0


# ------------------------------------------------------------ learning rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (30, 1.0), (50, 1.0), (75, 0.505), (100, 0.01)],
)
def test_warm_up_plateau_and_fall(step, expected):
    assert learning_rate(step, total=100, warmup=10, flat=0.5) == pytest.approx(expected)


def test_no_warm_up_no_plateau_and_no_steps_are_possible():
    assert learning_rate(0, 10, warmup=0, flat=0.0) == 1.0
    assert learning_rate(10, 10, warmup=0, flat=1.0) == 1.0
    assert 0 < learning_rate(0, 0, warmup=0, flat=0.3) <= 1.0


def test_refreshes_may_have_a_schedule_of_their_own():
    config = OptimConfig(lr=2e-3, refresh_lr=1e-3, warmup_steps=2, flat=0.3)
    factor = schedule(config, total=40, first=20)
    first = [factor(step) for step in range(20)]
    second = [factor(step) for step in range(20, 40)]
    assert first == [learning_rate(step, 20, 2, 0.3) for step in range(20)]
    assert max(second) == pytest.approx(0.5) and second[0] == pytest.approx(0.25) and second[-1] < 0.1
    plain = schedule(OptimConfig(refresh_lr=0.0, warmup_steps=2), total=40, first=20)
    assert [plain(step) for step in range(40)] == [learning_rate(step, 40, 2, 0.3) for step in range(40)]


# ------------------------------------------------------------ Newton-Schulz without bfloat16


def iterated(matrix: np.ndarray, coefficients: tuple[float, float, float], steps: int) -> np.ndarray:
    """The quintic iteration in float64: X <- a X + b (X X^T) X + c (X X^T)^2 X."""
    a, b, c = coefficients
    x = matrix.astype(np.float64) / np.linalg.norm(matrix.astype(np.float64))
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(96, 96), (256, 96), (96, 256), (5, 1)])
def test_newton_schulz_is_the_iteration_in_float64(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    coefficients = (3.4445, -4.775, 2.0315)
    ours = newton_schulz(matrix, coefficients, 5, 1e-7)
    assert ours.dtype == torch.float32
    expected = iterated(matrix.numpy(), coefficients, 5)
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-4)
    # by definition: the polynomial is applied to each singular value, the singular vectors stay
    left, values, right = np.linalg.svd(matrix.numpy().astype(np.float64), full_matrices=False)
    values /= np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    np.testing.assert_allclose(ours.numpy(), (left * values) @ right, atol=2e-4)
    half = torch.optim._muon._zeropower_via_newtonschulz(matrix, coefficients, 5, 1e-7)
    assert np.abs(half.float().numpy() - expected).max() > 2e-4 or shape == (5, 1)


def test_without_bfloat16_it_is_torchs_muon_with_that_iteration(monkeypatch):
    ours, theirs = Toy(), Toy()
    full = OptimConfig(lr=1e-2, weight_decay=0.1, muon_dtype="float32")
    optimizer = build_optimizer(ours, full)
    steps(ours, optimizer, 5)
    half = Toy()
    steps(half, joint(half), 5)
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz)
    reference = joint(theirs)
    steps(theirs, reference, 5)
    assert type(reference.parts["muon"]) is torch.optim.Muon
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert not equal(ours, half)
    # each can load the state of the other
    again = joint(Toy())
    again.load_state_dict(optimizer.state_dict())
