"""Outputs of a finished run: small files with checksums, and the report as rows."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from evocomp.compressor.model import EvoCompCompressor
from evocomp.mllm.hf import FrozenMLLM
from experiments.real.assemble import check_sums
from experiments.real.results import joined, short_table, write_rows
from experiments.real.ship import ship


@pytest.fixture()
def finished(tmp_path):
    run = tmp_path / "run"
    compressor = EvoCompCompressor.from_mllm(FrozenMLLM.load("nano").model, budget_input=True)
    compressor.save_pretrained(run / "plus" / "compressor")
    (run / "plus" / "compressor" / "README.md").write_text("card")
    (run / "lora").mkdir()
    (run / "gate.json").write_text("{}")
    (run / "lora" / "adapter_config.json").write_text("{}")
    for name in ("projector", "lora/adapter_model"):
        save_file({"a": torch.zeros(2)}, run / f"{name}.safetensors")
    return run


def test_shipped_compressor_works_as_the_one_that_was_trained(finished, tmp_path):
    """Half the bytes, and the same scores up to float16 rounding."""
    ship(finished, tmp_path / "out")
    check_sums(tmp_path / "out")
    folders = (finished / "plus" / "compressor", tmp_path / "out" / "compressor")
    assert "_name_or_path" not in json.loads((folders[1] / "config.json").read_text())["text_config"]
    trained, shipped = (EvoCompCompressor.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders)
    stored = load_file(folders[1] / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    visual, prompt = torch.randn(2, 144, 96), torch.randn(2, 5, 96)
    with torch.inference_mode():
        expected, given = (one(visual, prompt, budget=8.0).logits for one in (trained, shipped))
    torch.testing.assert_close(given, expected, atol=2e-2, rtol=1e-2)


def test_a_large_file_is_refused(finished, tmp_path):
    save_file({"a": torch.zeros(3 * 2**20)}, finished / "projector.safetensors")
    with pytest.raises(ValueError, match="larger than"):
        ship(finished, tmp_path / "out")


def test_rows_and_table_hold_the_reports_numbers(tmp_path):
    full, ours = _row("full", 576, 0.9), _row("evocomp", 64, 0.8125, kinds={"count": 0.5})
    others = [_row("divprune", 64, 0.75, p=0.01), _row("hired", 64, None, why="no class token")]
    report = joined([[full, ours, others[0]], [full, ours, others[1]]])
    write_rows(json.loads(json.dumps(report)), tmp_path / "rows.csv")
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "rows.csv").open())}
    assert rows["evocomp"]["accuracy"] == "0.8125" and rows["evocomp"]["count"] == "0.5000"
    assert rows["hired"]["accuracy"] == "" and rows["hired"]["not_applicable"] == "no class token"
    lines = [line.split() for line in short_table(report).splitlines()]
    assert lines == [["64"], ["full", "0.900"], ["evocomp", "0.812"], ["divprune", "0.750", "p=0.010"], ["hired", "-"]]


def _row(method, kept, accuracy, kinds=None, p=None, why=None) -> dict:
    from evocomp.evaluation.outcome import Outcome
    from evocomp.evaluation.rows import _empty_row

    empty = _empty_row(Outcome(method, kept, [], not_applicable=why))
    return empty | {"accuracy": accuracy, "by_kind": kinds or {}, "p_vs_evocomp": p}
