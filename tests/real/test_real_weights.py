"""The shipped weights are complete, have the right shapes, and passed the gate."""

import json

import pytest
import torch
from safetensors.torch import load_file

from evocomp.log import UserError
from experiments.real.assemble import WEIGHTS, check_sums
from experiments.real.efficientnet import CHANNELS


def test_sums_of_shipped_files():
    check_sums(WEIGHTS)


def test_a_changed_file_is_noticed(tmp_path):
    (tmp_path / "SHA256SUMS").write_text((WEIGHTS / "SHA256SUMS").read_text())
    (tmp_path / "projector.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="check it out again"):
        check_sums(tmp_path)


def test_no_file_is_large():
    assert max(path.stat().st_size for path in WEIGHTS.rglob("*")) < 8 * 2**20


def test_shapes_are_those_of_the_576_token_model():
    eyes = load_file(WEIGHTS / "projector.safetensors")
    assert eyes["projector.linear_1.weight"].shape == (576, CHANNELS + 2 * 24)
    assert eyes["projector.linear_2.weight"].shape == (576, 576)
    assert (eyes["tower.scale"] > 0).all()
    lora = load_file(WEIGHTS / "lora" / "adapter_model.safetensors")
    assert len(lora) == 30 * 4 * 2  # layers, attention matrices, two factors
    assert all(16 in value.shape and torch.isfinite(value).all() for value in lora.values())


def test_recorded_gate_passed():
    gate = json.loads((WEIGHTS / "gate.json").read_text())
    assert gate["gap"] == pytest.approx(gate["loss_wrong_picture"] - gate["loss_right_picture"], abs=1e-3)
    assert gate["gap"] >= 1.0
    assert gate["by_kind"]["yes-no"]["accuracy"] >= 0.8
