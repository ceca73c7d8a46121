"""Random input: whatever comes, it is taken or refused by a `UserError`."""

import json
import shutil

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evocomp.compressor.config import EvoCompConfig
from evocomp.config import options
from evocomp.config.load import load
from evocomp.data.conversations import read_conversations
from evocomp.inference.selectors import picker_for
from evocomp.labels.store import LabelStore
from evocomp.log import UserError
from evocomp.mllm.hf import ASSETS

pytestmark = pytest.mark.slow
FUZZ = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(FUZZ, max_examples=300)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["${", "???", "<image>", "a.png", "../..", "\ud800", "human", "gpt", 10**400])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
KEYS = st.sampled_from([setting.key for setting in options.settings()])


def survives(call) -> None:
    try:
        call()
    except UserError as error:
        assert "\n" not in str(error)


@FUZZ
@given(text=st.text() | VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=False)))
def test_configuration_files(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, errors="surrogatepass")
    survives(lambda: load([path]))


@FUZZ
@given(key=KEYS | st.text(max_size=12), value=st.text(max_size=30) | VALUES.map(str))
def test_settings(key, value):
    survives(lambda: load(settings=[f"{key}={value}"]))


TURN = (
    st.fixed_dictionaries({}, optional={"from": SCALARS, "value": VALUES, "role": SCALARS, "content": VALUES}) | VALUES
)
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "id": VALUES,
        "image": VALUES,
        "images": VALUES,
        "kind": VALUES,
        "conversations": st.lists(TURN, max_size=4) | VALUES,
        "messages": VALUES,
    },
)


@FUZZ
@given(content=st.lists(RECORD, max_size=3).map(json.dumps) | st.text() | VALUES.map(json.dumps))
def test_data(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "a.png").touch()
    (folder / "data.json").write_text(content, errors="surrogatepass")
    survives(lambda: read_conversations(folder))


@FUZZ
@given(data=st.data())
def test_stores(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz-labels"
    shutil.rmtree(folder, ignore_errors=True)
    store = LabelStore.open(folder, {})
    store.write(0, 0, [{"id": 1, "best_loss": 0.5, "kept": np.arange(3)}])
    store.commit(0, [0])
    name = data.draw(st.sampled_from(["meta.json", "round-0000/COMMIT.json", "round-0000/chunk-000000.safetensors"]))
    path = folder / name
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.binary(max_size=9))
    path.write_bytes(data.draw(st.sampled_from([whole[:at], whole[:at] + change + whole[at + len(change) :], change])))
    survives(lambda: LabelStore.open(folder, {}).read(0))
    survives(lambda: LabelStore.open(folder, {"seed": 1}, overwrite=True))


@FUZZ
@given(key=st.sampled_from(sorted(EvoCompConfig().to_dict())), value=VALUES)
def test_configurations_of_a_compressor(key, value):
    survives(lambda: EvoCompConfig(**{"text_config": None, key: value}) if key != "dtype" else None)


@FEW
@given(data=st.data())
def test_compressor_folders(nano, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz-compressor"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ASSETS / "nano_compressor", folder)
    path = folder / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, min(len(whole) - 1, 3000)))
    change = data.draw(st.binary(min_size=1, max_size=9))
    path.write_bytes(data.draw(st.sampled_from([whole[:at], whole[:at] + change + whole[at + len(change) :]])))
    survives(lambda: picker_for(folder, nano.model))
