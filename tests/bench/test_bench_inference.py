"""The latency benchmark at its smallest sizes: its parts compute what they are meant to time."""

import csv

import pytest
import torch

from evocomp.bench import inference, record
from evocomp.log import UserError


@pytest.fixture(scope="module")
def prompts():
    return inference.Prompts(inference.build("nano", torch.device("cpu")), 2, torch.device("cpu"))


@torch.inference_mode()
def test_prefill_and_decode_are_the_models_own_logits(prompts):
    model = prompts.model
    expected = model(**prompts.inputs).logits[:, -1]
    logits, _ = prompts.prefill(model, prompts.count)()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    longer = {**prompts.inputs, "input_ids": torch.cat([prompts.ids, prompts.ids[:, :1]], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    step = prompts.decode(model, prompts.count)
    expected = model(**longer).logits[:, -1]
    for _ in range(3):  # the cache is cropped, so every call computes the same
        torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_another_attention_kernel_shares_the_weights(prompts):
    other = inference._sharing_weights(prompts.model)
    other.set_attn_implementation("eager")
    assert prompts.model.config._attn_implementation == "sdpa"
    assert next(other.parameters()) is next(prompts.model.parameters())
    inference._close(prompts.prefill(prompts.model, 9)(), prompts.prefill(other, 9)())


def test_break_even():
    assert inference.break_even({10: 2.0, 100: 0.5}) == pytest.approx(10 + 90 * 0.5 / 1.5)
    assert inference.break_even({10: 0.9, 100: 0.5}) is None
    assert inference.break_even({10: 2.0, 100: 1.0}) == 100
    # the largest crossing is returned
    assert inference.break_even({10: 0.9, 50: 1.25, 100: 0.5}) == pytest.approx(50 + 50 * 0.2 / 1.2)


def test_rows(monkeypatch):
    monkeypatch.setattr("evocomp.bench.timing.MIN_SAMPLE_SECONDS", 0.001)
    rows = inference.run(repeats=1, sizes=("nano",), batches=(1,), answers=(2,))
    benches = {row["bench"] for row in rows}
    assert {"attention kernel", "ViT and projector", "selector", "prefill", "decode, one token"} < benches
    kept = [row["kept"] for row in rows if row["bench"] == "generate"]
    assert kept == [16, 48, 96, 144]
    memory = next(row for row in rows if row["bench"] == "generate, peak memory")
    assert memory["baseline_mib"] > memory["ours_mib"] > 0
    text = record.table(rows)
    assert "break-even" in text and "(" in text


def test_rows_are_appended_with_new_columns(tmp_path):
    path = tmp_path / "x.csv"
    record.append(path, [{"bench": "a", "ratio": 1}])
    record.append(path, [{"bench": "b", "kept": 3}])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["bench"], r["ratio"], r["kept"]) for r in rows] == [("a", "1", ""), ("b", "", "3")]
    assert not list(tmp_path.glob("*.tmp"))


def test_unknown_benchmarks_are_refused(monkeypatch):
    monkeypatch.setitem(record.KINDS, "training", "no_such_module")
    with pytest.raises(UserError, match="has no such benchmark"):
        record.run_bench("training")
    with pytest.raises(UserError, match="choose one of"):
        record.run_bench("speed")
