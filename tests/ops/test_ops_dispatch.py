import logging

import pytest
import torch

from evocomp.log import UserError
from evocomp.ops import dispatch


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("EVOCOMP_OPS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._announce.cache_clear()


def on(device, dtype=torch.float32):
    class Stub:
        pass

    stub = Stub()
    stub.device, stub.dtype = torch.device(device), dtype
    return stub


def test_the_cpu_uses_the_reference_and_logs_it_once(caplog):
    with caplog.at_level(logging.INFO, logger="evocomp"):
        assert [dispatch.choose(torch.zeros(1)) for _ in range(3)] == ["reference"] * 3
    assert [r.message for r in caplog.records] == ["ops: reference on cpu"]


@pytest.mark.parametrize("installed,expected", [(True, "triton"), (False, "reference")])
def test_cuda_uses_the_kernel_if_triton_is_installed(installed, expected, monkeypatch):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: installed)
    assert dispatch.choose(on("cuda")) == expected
    assert dispatch.choose(on("cuda", torch.float64)) == "reference"


def test_a_slower_kernel_runs_only_if_forced(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    with caplog.at_level(logging.INFO, logger="evocomp"):
        assert dispatch.choose(on("cuda"), slower="vocabulary_argmax") == "reference"
    assert [r.message for r in caplog.records] == ["vocabulary_argmax: reference on cuda"]
    monkeypatch.setenv("EVOCOMP_OPS", "triton")
    assert dispatch.choose(on("cuda"), slower="vocabulary_argmax") == "triton"


def test_forced_reference_wins_on_cuda(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    monkeypatch.setenv("EVOCOMP_OPS", "reference")
    assert dispatch.choose(on("cuda")) == "reference"


@pytest.mark.parametrize(
    "installed,tensor,message",
    [
        (False, on("cuda"), "pip install"),
        (True, on("cpu"), "TRITON_INTERPRET=1"),
        (True, on("cuda", torch.float64), "float64"),
    ],
)
def test_a_forced_kernel_that_cannot_run_is_an_error(installed, tensor, message, monkeypatch):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: installed)
    monkeypatch.setenv("EVOCOMP_OPS", "triton")
    with pytest.raises(UserError, match=message):
        dispatch.choose(tensor)


def test_forced_kernel_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    monkeypatch.setenv("EVOCOMP_OPS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose(torch.zeros(1)) == "triton"


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("EVOCOMP_OPS", "cuda")
    with pytest.raises(UserError, match="reference or triton"):
        dispatch.choose(torch.zeros(1))
