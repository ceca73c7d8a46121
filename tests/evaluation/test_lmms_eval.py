"""A real lmms-eval run on a local task of scenes; the models are found by the entry point of pyproject.toml."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

from evocomp.compressor.model import EvoCompCompressor
from evocomp.data.scenes import SceneSpec, scene_examples
from evocomp.evaluation.lmms_eval import GenerationFailed, _loud
from evocomp.evaluation.panel import Panel
from evocomp.mllm.hf import ASSETS, FrozenMLLM

ROOT = Path(__file__).resolve().parents[2]
needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (pip install evocomp[eval])"
)

TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
task: evocomp_scenes
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.visual
doc_to_text: !function scenes.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
process_results: !function scenes.results
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
BROKEN = """
from evocomp.selection.divprune import DivPrune
def fail(*_):
    raise RuntimeError("no token is good")
DivPrune.select = fail
"""
FUNCTIONS = """
from PIL import Image
def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
def results(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""


@pytest.fixture(scope="module")
def scenes():
    return scene_examples(55, 0, 3, SceneSpec())[:20]


@pytest.fixture(scope="module")
def place(tmp_path_factory, scenes):
    """A task folder, and a folder that registers the entry point as pip does."""
    folder = tmp_path_factory.mktemp("lmms")
    rows = []
    for example in scenes:
        path = folder / f"{example.image_id}.png"
        Image.fromarray(example.image).save(path)
        rows.append({"image": str(path), "question": example.prompt, "answer": example.answer})
    (folder / "scenes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "scenes.yaml").write_text(TASK.format(file=folder / "scenes.jsonl"))
    (folder / "tasks" / "scenes.py").write_text(FUNCTIONS)
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    installed = folder / "site" / "evocomp_under_test-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: evocomp-under-test\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (installed / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines]) + "\n")
    return folder


def lmms_eval(place, out, model, arguments):
    paths = [str(ROOT), str(place / "site"), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"HF_HOME": str(place / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--batch_size", "1"]
    command += ["--tasks", "evocomp_scenes", "--include_path", str(place / "tasks"), "--output_path", str(out)]
    return subprocess.run([*command, "--device", "cpu"], env=env, capture_output=True, text=True, cwd=place)


def score(out):
    (path,) = out.rglob("*_results.json")
    return json.loads(path.read_text())["results"]["evocomp_scenes"]["exact,none"]


def expected(scenes, compressor, keep):
    """The same questions answered by this package's panel."""
    panel = Panel(FrozenMLLM.load("nano"), scenes)
    outcome = panel.full() if compressor is None else panel.compressor(compressor, keep)
    return sum(a == e.answer for a, e in zip(outcome.answers, scenes, strict=True)) / len(scenes)


@pytest.mark.slow
@needs_lmms_eval
def test_a_real_run(place, scenes, tmp_path):
    nano = f"pretrained={ASSETS / 'nano'}"
    torch.manual_seed(0)
    compressor = EvoCompCompressor.from_mllm(FrozenMLLM.load("nano").model)
    compressor.save_pretrained(tmp_path / "compressor")
    run = lmms_eval(
        place, tmp_path / "ours", "evocomp_llava_hf", f"{nano},compressor={tmp_path / 'compressor'},keep=24"
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    compressed = score(tmp_path / "ours")
    run = lmms_eval(place, tmp_path / "full", "evocomp_llava_hf", nano)
    full = score(tmp_path / "full")
    assert run.returncode == 0, run.stderr[-3000:]
    assert full == pytest.approx(expected(scenes, None, 0))
    assert compressed == pytest.approx(expected(scenes, compressor, 24))
    assert compressed < full  # a compressor with random weights keeps tokens that are not useful


@pytest.mark.slow
@needs_lmms_eval
def test_an_error_ends_the_run_without_a_score(place, tmp_path):
    """A selector that fails inside of `generate`."""
    nano = f"pretrained={ASSETS / 'nano'},method=divprune,keep=9"
    broken = place / "site" / "sitecustomize.py"
    broken.write_text(BROKEN)
    try:
        run = lmms_eval(place, tmp_path / "out", "evocomp_llava_hf", nano)
    finally:
        broken.unlink()
    assert run.returncode != 0
    assert "generate failed" in run.stderr and "no token is good" in run.stderr
    assert not list(tmp_path.rglob("*_results.json"))


def test_errors_of_generate_pass_handlers_of_exceptions():
    def generate():
        raise RuntimeError("no memory")

    with pytest.raises(GenerationFailed, match="RuntimeError: no memory"):
        try:
            _loud(generate)()
        except Exception:  # as lmms-eval's own models do
            pytest.fail("swallowed")
