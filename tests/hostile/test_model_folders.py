"""Compressor and MLLM folders whose weights or settings do not fit: refused, never initialised at random."""

import json
import shutil

import pytest
import torch
from one_line import refused
from safetensors.torch import load_file, save_file

from evocomp.compressor.config import EvoCompConfig
from evocomp.compressor.model import EvoCompCompressor
from evocomp.evaluation.run import read_compressor
from evocomp.inference.selectors import picker_for
from evocomp.mllm.hf import ASSETS, FrozenMLLM

DIGITS = 10**5000


def first(state: dict, change) -> dict:
    name = next(iter(sorted(name for name, value in state.items() if value.ndim == 2)))
    return {**state, name: change(state[name])}


def without(state: dict, number: int) -> dict:
    gone = sorted(state)[number]
    return {name: value for name, value in state.items() if name != gone}


WEIGHTS = {
    "one tensor less": lambda state: without(state, 0),
    "another tensor less": lambda state: without(state, -1),
    "only another tensor": lambda state: {"x": torch.zeros(1)},
    "no tensor": lambda state: {},
    "NaN": lambda state: {name: torch.full_like(value, torch.nan) for name, value in state.items()},
    "one NaN": lambda state: first(state, lambda w: torch.where(w == w.max(), torch.nan, w)),
    "one infinity": lambda state: first(state, lambda w: torch.where(w == w.max(), torch.inf, w)),
    "a row less": lambda state: first(state, lambda w: w[:-1].clone()),
    "transposed": lambda state: first(state, lambda w: w.T[: len(w) - 1].contiguous()),
    "another rank": lambda state: first(state, lambda w: w[None].clone()),
}


@pytest.fixture
def compressor(tmp_path):
    folder = tmp_path / "run" / "compressor"
    shutil.copytree(ASSETS / "nano_compressor", folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "nano"
    shutil.copytree(ASSETS / "nano", folder)
    return folder


@pytest.mark.parametrize("name", [*WEIGHTS, "a tensor more"])
def test_weights_of_a_compressor(compressor, name):
    change = WEIGHTS.get(name, lambda state: {**state, "x": torch.zeros(1)})
    save_file(change(load_file(compressor / "model.safetensors")), compressor / "model.safetensors", {"format": "pt"})
    refused(lambda: EvoCompCompressor.from_pretrained(compressor), "the compressor in")
    refused(lambda: read_compressor(compressor.parent), "the compressor in")


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_an_mllm(model_folder, name):
    path = model_folder / "model.safetensors"
    whole = path.read_bytes()
    try:
        save_file(WEIGHTS[name](load_file(path)), path, {"format": "pt"})
        refused(lambda: FrozenMLLM.load(str(model_folder)), "model.name=")
    finally:
        path.write_bytes(whole)


BYTES = {"empty": 0.0, "half": 0.5, "all but the last bytes": 0.9999}


@pytest.mark.parametrize("name", [*BYTES, "text", "gone"])
def test_files_that_are_cut_short(compressor, model_folder, nano, name):
    for folder, load in (
        (compressor, lambda: picker_for(compressor, nano.model)),
        (model_folder, lambda: FrozenMLLM.load(str(model_folder))),
    ):
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        try:
            if name == "gone":
                path.unlink()
            else:
                path.write_bytes(b"text" if name == "text" else whole[: int(BYTES[name] * len(whole))])
            refused(load)
        finally:
            path.write_bytes(whole)


NUMBERS = ["some", None, [], {}, float("nan"), float("inf"), -1, 1e30, DIGITS, True]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: str(value)[:12] if value != DIGITS else "digits")
@pytest.mark.parametrize("key", ["num_layers", "dither", "sharp", "hedge", "keep", "prune_layer"])
def test_numbers_of_a_compressor(key, value):
    refused(lambda: EvoCompConfig(**{key: value}), key)


@pytest.mark.parametrize("value", ["some", None, 3, [], "yes", 0.5])
@pytest.mark.parametrize("key", ["use_text", "budget_input", "balance_text"])
def test_switches_of_a_compressor(key, value):
    refused(lambda: EvoCompConfig(**{key: value}), key)


@pytest.mark.parametrize(
    "text",
    ["llama", 3, [], True, {}, {"model_type": "no_such"}, {"model_type": 3}, {"model_type": "llama", "hidden_size": 0}]
    + [{"model_type": "llama", "num_attention_heads": value} for value in (0, -1, "x", None, 1.5, 10**9)]
    + [{"model_type": "llama", "hidden_size": value} for value in (-4, "x", None, 10**9, [1])]
    + [{"model_type": "llama", "num_key_value_heads": value} for value in (0, -1, "x", [])],
    ids=str,
)
def test_text_configurations_of_a_compressor(text):
    refused(lambda: EvoCompConfig(text_config=text), "compressor configuration: text_config")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "[" * 100_000, '{"model_type": "llama"}', '{"model_type": 3}', "\0"]
    + ['{"model_type": "evocomp", "num_layers": 2}', '{"model_type": "evocomp", "sharp": "x"}'],
    ids=lambda text: text[:30],
)
def test_configuration_files_of_a_compressor(compressor, nano, text):
    path = compressor / "config.json"
    if "num_layers" in text or "sharp" in text:
        text = json.dumps({**json.loads(path.read_text()), **json.loads(text)})
    path.write_text(text)
    refused(lambda: picker_for(compressor, nano.model))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "[" * 100_000, "\0"], ids=lambda text: text[:5])
def test_configuration_files_of_an_mllm(model_folder, name, text):
    path = model_folder / name
    whole = path.read_bytes()
    try:
        path.write_text(text)
        refused(lambda: FrozenMLLM.load(str(model_folder)), "does not load")
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "name", [None, 3, "", [], {"a": 1}, b"nano", "no/such/folder", "x" * 5000, "a\0b", "../..", "\ud800"]
)
def test_names_of_an_mllm(name):
    refused(lambda: FrozenMLLM.load(name), "model.name=")


@pytest.mark.parametrize("dtype", ["float8", "int8", "float64", "", None, "__class__", 3, "load"])
def test_number_formats_of_an_mllm(dtype):
    refused(lambda: FrozenMLLM.load("nano", dtype=dtype), "model.dtype")
