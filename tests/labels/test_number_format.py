"""`auto` dtypes are measured once, saved, and never measured again for the same run or store."""

import json
from dataclasses import replace

import pytest
import torch

from evocomp.config import load as config_files
from evocomp.config.load import load
from evocomp.labels import number_format
from evocomp.labels.number_format import resolve_dtypes
from evocomp.training.build import label_only, run
from tests.training.test_run import PLUS, QUICK


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measurement by a fixed result and counts its calls."""
    asked = []

    def say(name: str):
        monkeypatch.setattr(number_format, "_faster", lambda: asked.append(name) or name)
        return asked

    return say


def settings(folder, *more) -> list[str]:
    auto = ["labels.dtype=auto", "optim.muon_dtype=auto", "labels.refresh=none"]
    return [*QUICK, *PLUS, f"run_dir={folder}", "logger=none", "trainer.max_epochs=1", *auto, *more]


@pytest.mark.parametrize(("faster", "labels"), [("bfloat16", "bfloat16"), ("float32", "model")])
def test_auto_chooses_the_faster_dtype(tmp_path, measured, faster, labels):
    measured(faster)
    config = resolve_dtypes(load(settings=settings(tmp_path)), tmp_path)
    assert (config.labels.dtype, config.optim.muon_dtype) == (labels, faster)
    assert resolve_dtypes(config, tmp_path) is config


def test_explicit_dtypes_are_not_measured(tmp_path, measured):
    asked = measured("bfloat16")
    config = load(settings=settings(tmp_path, "labels.dtype=float32", "optim.muon_dtype=float32"))
    assert resolve_dtypes(config, tmp_path) is config and not asked


@pytest.mark.parametrize("own", ["model.dtype=bfloat16", "model.shard=2"])
def test_half_precision_and_sharded_models_keep_their_dtype(tmp_path, measured, own):
    measured("bfloat16")
    assert resolve_dtypes(load(settings=settings(tmp_path, own)), tmp_path).labels.dtype == "model"


def test_a_run_saves_and_keeps_the_chosen_dtype(tmp_path, measured):
    measured("bfloat16")
    folder = tmp_path / "run"
    config = load(settings=settings(folder))
    assert run(config)
    saved = config_files.load([folder / "config.yaml"])
    assert (saved.labels.dtype, saved.optim.muon_dtype) == ("bfloat16", "bfloat16")
    meta = json.loads((folder / "labels" / "meta.json").read_text())
    assert meta["fingerprint"]["labels"]["dtype"] == "bfloat16"
    asked = measured("float32")
    asked.clear()
    (folder / "trained.json").unlink()  # an interrupted run is resumed on another machine
    assert run(config) and not asked
    assert config_files.load([folder / "config.yaml"]) == saved


def test_training_keeps_the_dtype_of_existing_labels(tmp_path, measured):
    measured("bfloat16")
    config = load(settings=settings(tmp_path / "run"))
    label_only(config)
    measured("float32")
    assert run(config)
    saved = config_files.load([tmp_path / "run" / "config.yaml"])
    assert (saved.labels.dtype, saved.optim.muon_dtype) == ("bfloat16", "float32")
    # labels that will be overwritten do not determine the dtype
    again = replace(config, labels=replace(config.labels, overwrite=True, dir=str(tmp_path / "run" / "labels")))
    assert resolve_dtypes(again, tmp_path / "other").labels.dtype == "model"


def test_a_run_older_than_the_settings_keeps_its_behaviour(tmp_path, measured):
    asked = measured("float32")
    config = load(settings=settings(tmp_path))
    text = config_files.to_yaml(replace(config, labels=replace(config.labels, dtype="bfloat16")))
    (tmp_path / "config.yaml").write_text("".join(line for line in text.splitlines(True) if "muon_dtype" not in line))
    found = resolve_dtypes(config, tmp_path)
    assert (found.labels.dtype, found.optim.muon_dtype) == ("bfloat16", "auto") and not asked


def test_the_measurement_returns_the_faster_dtype(monkeypatch):
    threads = torch.get_num_threads()
    for costs, expected in (((1.0, 0.5), "bfloat16"), ((1.0, 0.9), "float32"), ((1.0, 60.0), "float32")):
        # float32 and bfloat16 alternate; the clock is read at the start and end of each
        ticks = iter([x for _ in range(number_format.REPEATS) for cost in costs for x in (0.0, cost)])
        monkeypatch.setattr(number_format.time, "perf_counter", lambda ticks=ticks: next(ticks))
        number_format.faster_on_cpu.cache_clear()
        assert number_format.faster_on_cpu() == expected
    number_format.faster_on_cpu.cache_clear()
    assert torch.get_num_threads() == threads
