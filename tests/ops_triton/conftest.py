"""Kernels against their references: on a GPU, or on the CPU in Triton's interpreter.

The interpreter is selected when kernels are imported, so run this folder in a separate process:
``TRITON_INTERPRET=1 pytest tests/ops_triton``.
"""

import importlib.util
import os
import random

import pytest
import torch
from kernel_checks import DEVICE, GuardedMemory

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    if (INTERPRETING or torch.cuda.is_available()) and importlib.util.find_spec("triton"):
        return
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason="needs triton, and TRITON_INTERPRET=1 or a GPU"))


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch):
    monkeypatch.setenv("EVOCOMP_OPS", "triton")


@pytest.fixture
def generator() -> torch.Generator:
    """A new seed in every run, printed if the test fails."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return torch.Generator(DEVICE).manual_seed(seed)


@pytest.fixture
def guarded(monkeypatch):
    """Memory from torch.empty starts as NaN (integers: -7) between guard bands, checked after the test."""
    memory = GuardedMemory()
    monkeypatch.setattr(torch, "empty", memory.empty)
    yield memory
    monkeypatch.undo()
    assert memory.blocks, "the op allocated nothing with torch.empty: this test guards nothing"
    memory.check()
