import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, DoesNothing, assert_accurate, between_bands, strided
from torch.utils._python_dispatch import TorchDispatchMode

from evocomp.ops import ghm_bce, ghm_histogram
from evocomp.ops.ghm_bce import reference

SHAPES = [(1, 1), (1, 37), (3, 577), (2, 1024), (5, 411)]
RULES = ["paper", "non_empty"]


@pytest.fixture(params=["one program", "many"])
def programs(request, monkeypatch):
    """Run tests with a single program, as for small batches, and with several programs, as for large ones."""
    monkeypatch.setattr(_module(), "BLOCK_ALONE", 1024)  # several iterations of its loops
    if request.param == "many":
        monkeypatch.setattr(_module(), "ALONE", 0)


def example(generator, shape, dtype=torch.float32, bins=10):
    """Logits whose gradient norms are not near bin edges, where rounding would determine the bin."""
    logits = (torch.randn(shape, generator=generator, device=DEVICE) * 3).to(dtype)
    targets = (torch.rand(shape, generator=generator, device=DEVICE) < 0.3).float()
    place = (logits.double().sigmoid() - targets).abs() * bins
    logits[(place - place.round()).abs() < 1e-3] = 0.5  # norms .38 and .62: inside bins of 10 and of 30
    valid = torch.rand(shape, generator=generator, device=DEVICE) < 0.7
    return logits, targets, valid


def eager(logits, targets, valid, counts, rule):
    """An eager implementation with torch functions in the dtype of the logits; gradient by autograd."""
    targets = targets.to(logits.dtype)
    with torch.no_grad():
        index = ((logits.float().sigmoid() - targets.float()).abs() * len(counts)).long()
        regions = len(counts) if rule == "paper" else (counts > 0).sum()
        weight = (1 / (counts * regions))[index.clamp_max(len(counts) - 1)].to(logits.dtype)
        weight = weight if valid is None else torch.where(valid, weight, 0)
    return F.binary_cross_entropy_with_logits(logits, targets, weight=weight, reduction="sum")


def check(logits, targets, valid, bins, rule):
    counts = ghm_histogram(logits, targets, valid, bins)
    assert torch.equal(counts, reference.ghm_histogram(logits.double(), targets, valid, bins))
    values, slopes = [], []
    for x, function in (
        (logits, lambda x: ghm_bce(x, targets, valid, bins, rule=rule)),
        (logits, lambda x: eager(x, targets, valid, counts, rule)),
        (logits.double(), lambda x: reference.ghm_bce(x, targets, valid, counts, rule)),
    ):
        x = x.detach().requires_grad_()
        value = function(x)
        slopes.append(torch.autograd.grad(value, x, torch.tensor(0.7).to(value))[0])
        values.append(value.detach())
    assert slopes[0].dtype == logits.dtype
    assert_accurate(*values)
    assert_accurate(*slopes)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bins", [1, 10, 31])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient(shape, bins, rule, generator, guarded, programs):
    logits, targets, valid = example(generator, shape, bins=bins)
    check(between_bands(logits), between_bands(targets), None, bins, rule)
    valid.view(-1)[0] = True
    check(between_bands(logits), between_bands(targets), between_bands(valid), bins, rule)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits(dtype, generator, guarded, programs):
    logits, targets, valid = example(generator, (3, 577), dtype)
    check(logits, targets, valid, 10, "paper")


def test_strides_bool_targets_and_nan_padding(generator, programs):
    logits, targets, valid = example(generator, (4, 130))
    expected = ghm_bce(logits[valid], targets[valid])
    logits[~valid] = torch.nan
    logits, targets, valid = strided(logits).requires_grad_(), strided(targets.bool()), strided(valid)
    loss = ghm_bce(logits, targets, valid)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad.isfinite().all() and (logits.grad[~valid] == 0).all()


def test_given_counts_of_a_larger_batch(generator, programs):
    logits, targets, valid = example(generator, (2, 300))
    counts = ghm_histogram(logits, targets, valid) * 3 + 5
    for given in (counts, counts.float() / 7):  # integers from ranks, running means from momentum
        torch.testing.assert_close(
            ghm_bce(logits, targets, valid, counts=given),
            reference.ghm_bce(logits, targets, valid, given, "paper"),
        )


def test_nothing_valid_and_all_equal(generator, programs):
    logits, targets, valid = example(generator, (2, 37))
    for rule in RULES:
        assert ghm_bce(logits, targets, torch.zeros_like(valid), rule=rule) == 0
    same = torch.full_like(logits, 0.5)
    check(same, torch.ones_like(same), None, 10, "non_empty")


def test_a_nan_logit_makes_a_nan_loss_and_no_crash(programs):
    logits = torch.tensor([0.5, torch.nan], device=DEVICE, requires_grad=True)
    loss = ghm_bce(logits, torch.ones(2, device=DEVICE))
    loss.backward()
    assert loss.isnan() and logits.grad[1].isnan()


def test_extreme_logits(generator, programs):
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.5], device=DEVICE)
    check(logits, torch.tensor([1.0, 0, 0, 1, 1], device=DEVICE), None, 10, "paper")


def test_same_bits_twice_and_inputs_untouched(generator, programs):
    logits, targets, valid = example(generator, (7, 577))
    before = [x.clone() for x in (logits, targets, valid)]
    assert torch.equal(ghm_bce(logits, targets, valid), ghm_bce(logits, targets, valid))
    assert all(torch.equal(a, b) for a, b in zip(before, (logits, targets, valid), strict=True))


def test_operator_registration(generator):
    kernel = _module()
    logits, targets, valid = example(generator, (2, 37))
    counts = ghm_histogram(logits, targets, valid)
    torch.library.opcheck(kernel._ghm_histogram, (logits, targets, valid, 10))
    torch.library.opcheck(kernel._ghm_bce, (logits.requires_grad_(), targets, valid, counts, 10, "paper"))
    torch.library.opcheck(kernel._ghm_bce, (logits, targets, None, None, 10, "non_empty"))


def test_a_training_batch_is_one_launch_and_a_gradient_one_product(monkeypatch):
    """Host overhead dominates, so nothing is zeroed before the launch, and nothing summed or converted after it."""
    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(grid)

    for name in ("_histogram_kernel", "_loss_kernel"):
        monkeypatch.setattr(_module(), name, Recorder())
    logits = torch.zeros(32, 2880, device=DEVICE, requires_grad=True)
    targets, valid = torch.zeros(32, 2880, device=DEVICE), torch.ones(32, 2880, dtype=torch.bool, device=DEVICE)
    with Operators() as forward:
        loss = ghm_bce(logits, targets, valid)
    with Operators() as backward:
        torch.autograd.grad(loss, logits)
    assert launched == [(1,)]
    views_and_memory = {"empty", "view", "detach", "alias"}
    assert forward.names - views_and_memory == set()
    assert backward.names - views_and_memory == {"ones_like", "mul"}


class Operators(TorchDispatchMode):
    """Names of the aten operators that are called within the block."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_histogram_that_does_nothing_fails_the_check(generator, monkeypatch):
    monkeypatch.setattr(_module(), "_histogram_kernel", DoesNothing())
    with pytest.raises(AssertionError):
        check(*example(generator, (2, 37)), 10, "paper")


def test_a_loss_that_does_nothing_fails_the_check(generator, guarded, monkeypatch, programs):
    monkeypatch.setattr(_module(), "_loss_kernel", DoesNothing())
    with pytest.raises(AssertionError):
        check(*example(generator, (2, 37)), 10, "paper")


def _module():
    from evocomp.ops.ghm_bce import triton

    return triton
