"""torch.compile traces the custom ops and the references without a graph break."""

import pytest
import torch
from kernel_checks import DEVICE

from evocomp.losses import build_loss
from evocomp.ops import score_separation, top_r_compact, vocabulary_argmax


def step(hidden, weight, bias, retained, valid):
    logits, separation = score_separation(hidden, weight, bias, retained, valid)
    parts = build_loss("ghm_cs")(logits, hidden, retained, valid)
    kept = top_r_compact(logits, 3, hidden, None, valid)
    nearest, cosine = vocabulary_argmax(kept.embeddings.flatten(0, 1).detach(), hidden[0].detach())
    return parts["loss"] + separation.sum() + kept.embeddings.square().sum(), kept.index, nearest, cosine


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_whole_graph_forward_and_backward(backend, generator, monkeypatch):
    monkeypatch.setenv("EVOCOMP_OPS", backend)
    torch.compiler.reset()
    hidden = torch.randn(2, 9, 8, generator=generator, device=DEVICE, requires_grad=True)
    weight = torch.randn(8, generator=generator, device=DEVICE, requires_grad=True)
    bias = torch.zeros(1, device=DEVICE, requires_grad=True)
    retained = torch.rand(2, 9, generator=generator, device=DEVICE) < 0.4
    valid = torch.rand(2, 9, generator=generator, device=DEVICE) < 0.9
    leaves = (hidden, weight, bias)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for plain, traced in zip(step(*leaves, retained, valid), compiled(*leaves, retained, valid), strict=True):
        torch.testing.assert_close(traced, plain)
    want = torch.autograd.grad(step(*leaves, retained, valid)[0], leaves)
    got = torch.autograd.grad(compiled(*leaves, retained, valid)[0], leaves)
    torch.testing.assert_close(got, want)
