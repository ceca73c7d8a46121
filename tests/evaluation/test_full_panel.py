"""`evocomp eval --panel full` on a run folder: every method has a row, or the reason why it has none."""

import shutil

import pytest
import torch

from evocomp.compressor.model import EvoCompCompressor
from evocomp.config import load as config_files
from evocomp.config.schema import DataConfig, EvalConfig, RunConfig
from evocomp.evaluation.outcome import WITH_CONTEXT
from evocomp.evaluation.request import FULL
from evocomp.evaluation.rivals.staged import INSIDE_LLM, STAGED
from evocomp.evaluation.run import evaluate_run
from evocomp.log import UserError
from evocomp.mllm.hf import FrozenMLLM


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig(
        data=DataConfig(test_samples=14), eval=EvalConfig(kept=(16, 4), resamples=50, sheet=3), threads=1
    )
    config_files.save(config, folder / "config.yaml")
    torch.manual_seed(0)
    EvoCompCompressor.from_mllm(FrozenMLLM.load("nano").model, sharp=0.2).save_pretrained(folder / "compressor")
    return folder


def test_every_rival_has_a_row(run_folder):
    rows = evaluate_run(run_folder, panel="full")
    methods = {row["method"] for row in rows}
    staged = {method.label for method in STAGED}
    expected = {"full", "no_image", "wrong_image", "downsampling", "random", "evocomp", "k_token_merging"}
    given = {row["method"] for row in rows if row["group"] == WITH_CONTEXT}
    free = ("random_tokens", "uniform_stride", "cls_attention", "divprune")
    assert given == {"evocomp", *(f"{name}+context" for name in free)}
    assert methods == expected | set(FULL) | staged | given
    without = {row["method"] for row in rows if row["not_applicable"]}
    assert without == {"k_token_merging"}  # there is no training
    inside = {row["method"] for row in rows if row["group"] == INSIDE_LLM}
    assert inside == staged
    for row in rows:
        if row["method"] in staged:
            assert row["kept_average"] > row["kept"] and "layer" in row["note"]
    assert (run_folder / "report.html").is_file()


def test_another_source_needs_a_place_of_its_own(run_folder):
    with pytest.raises(UserError, match="give --out"):
        evaluate_run(run_folder, source="pope:data/pope")


def test_a_panel_of_named_rivals(run_folder, tmp_path):
    rows = evaluate_run(run_folder, out=tmp_path, panel="divprune,fastv")
    methods = {row["method"] for row in rows}
    assert {"divprune", "fastv", "random", "full"} < methods and not methods & {"tome", "fastv_inside"}
    with pytest.raises(UserError, match="'no_such' is unknown; choose basic, full, "):
        evaluate_run(run_folder, panel="divprune,no_such")
    with pytest.raises(UserError, match="cdpruner.*MLLMs do not contain CLIP's text tower"):
        evaluate_run(run_folder, panel="divprune,cdpruner")


def test_only_a_report_on_the_same_is_replaced(run_folder, tmp_path):
    quick = {"panel": "uniform_stride", "questions": 7}
    evaluate_run(run_folder, out=tmp_path / "new", **quick)
    before = (tmp_path / "new" / "report.json").read_text()
    with pytest.raises(UserError, match="new contains a report of another run or on other questions; choose another"):
        evaluate_run(run_folder, out=tmp_path / "new", seed=5, **quick)
    assert (tmp_path / "new" / "report.json").read_text() == before
    evaluate_run(run_folder, out=tmp_path / "new", **quick | {"panel": "divprune"})
    assert "divprune" in (tmp_path / "new" / "report.json").read_text()
    with pytest.raises(UserError, match="contains other files; choose another folder"):
        evaluate_run(run_folder, out=tmp_path, **quick)
    with pytest.raises(UserError, match="give --out"):
        evaluate_run(run_folder, out=run_folder, **quick)


def test_broken_weights_are_named(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    weights = tmp_path / "run" / "compressor" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="the weights in .*compressor cannot be read"):
        evaluate_run(tmp_path / "run")
