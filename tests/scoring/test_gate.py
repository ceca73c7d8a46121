"""Gate gradients against central differences, and gates of 0 and 1 against masks."""

import copy

import numpy as np
import pytest
import torch

from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring import gate as gate_module
from evocomp.scoring.answer_losses import AnswerLosses
from evocomp.scoring.gate import gate_gradient


@pytest.fixture(scope="module")
def exact(nano):
    """The nano MLLM in float64, which also encodes samples in float64."""
    return FrozenMLLM(copy.deepcopy(nano.model).double(), nano.processor, "nano64")


def loss_at(mllm, features, gate):
    """The loss that `gate_gradient` differentiates, recorded during the call."""
    caught = []
    real = gate_module.F.cross_entropy

    def catch(logits, targets):
        caught.append(float(real(logits.detach(), targets)))
        return real(logits, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_module.F, "cross_entropy", catch)
        gate_gradient(mllm, features, gate)
    return caught[0]


def test_gradient_equals_central_differences(exact, encoded):
    # the sample of largest loss: in others the slope is below the decoder's rounding errors (its norms are float32)
    features = max(encoded[:20], key=lambda f: loss_at(exact, f, torch.ones(len(f.visual))))
    gate = torch.rand(len(features.visual), generator=torch.Generator().manual_seed(1)) * 0.8 + 0.2
    gradient = gate_gradient(exact, features, gate)
    for token in gradient.abs().topk(5).indices.tolist():
        step = 1e-2
        up, down = gate.clone(), gate.clone()
        up[token] += step
        down[token] -= step
        slope = (loss_at(exact, features, up) - loss_at(exact, features, down)) / (2 * step)
        assert gradient[token].item() == pytest.approx(slope, rel=1e-2)


def test_gates_of_one_keep_all_tokens_and_gates_of_zero_give_the_mask(nano, encoded):
    losses = AnswerLosses(nano)
    for features in encoded[:6]:
        count = len(features.visual)
        everything = torch.arange(count)
        full = float(losses.candidates(features, everything[None])[0])
        assert loss_at(nano, features, torch.ones(count)) == pytest.approx(full, abs=1e-4)
        kept = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(count)[:16]))
        gate = torch.full((count,), 1e-30)
        gate[kept] = 1.0
        masked = float(losses.candidates(features, kept[None])[0])
        assert loss_at(nano, features, gate) == pytest.approx(masked, abs=1e-4)


def test_the_model_is_unchanged_afterwards(nano, encoded):
    gradient = gate_gradient(nano, encoded[0], torch.ones(len(encoded[0].visual)))
    assert gradient.shape == (144,) and gradient.isfinite().all() and gradient.abs().max() > 0
    assert all(p.grad is None for p in nano.model.parameters())


def test_a_gate_multiplies_the_attention_weight_of_its_token_for_other_queries(nano, encoded):
    features, seen = encoded[0], []
    hook = nano.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"][0, 0].detach()), with_kwargs=True
    )
    gate = torch.rand(len(features.visual), generator=torch.Generator().manual_seed(2)) + 0.1
    try:
        gate_gradient(nano, features, gate)
    finally:
        hook.remove()
    factors = seen[0].exp()  # factors of the unnormalised attention weights
    expected = torch.ones(len(factors), len(factors))
    expected[:, features.visual_at] = gate
    expected.fill_diagonal_(1.0)
    assert torch.allclose(factors, expected.tril(), atol=1e-6)
