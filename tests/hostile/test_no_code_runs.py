"""Folders that somebody else made hold code: none of it runs, and each is refused in one line."""

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from one_line import refused
from transformers import AutoConfig

from evocomp.compressor.model import EvoCompCompressor
from evocomp.data.conversations import read_conversations
from evocomp.inference.selectors import picker_for
from evocomp.labels.store import LabelStore
from evocomp.mllm.hf import ASSETS, FrozenMLLM
from evocomp.runs.checkpoints import read_checkpoint
from evocomp.runs.folder import last_checkpoint
from evocomp.training.checkpoint_files import CheckpointFiles
from evocomp.training.refresh_labels import _round_of


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(path)))
    assert path.exists(), "the canary sings"
    path.unlink()
    yield path
    assert not path.exists()


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Canary(canary))


def saved(canary: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": {}, "loops": {}, "callbacks": Canary(canary)}, file)
    return file.getvalue()


def saved_without_zip(canary: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": Canary(canary)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


FORMS = [pickled, saved, saved_without_zip]


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints(form, canary, tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    path.write_bytes(form(canary))
    refused(lambda: last_checkpoint(tmp_path), "checkpoint")
    refused(lambda: CheckpointFiles().load_checkpoint(path, weights_only=False), "checkpoint")
    assert _round_of(path) == 0


def test_a_folder_of_shards_is_no_checkpoint(canary, tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.mkdir(parents=True)
    for name in (".metadata", "meta.pt"):
        (path / name).write_bytes(pickled(canary))
    refused(lambda: last_checkpoint(tmp_path), "is a folder")
    refused(lambda: read_checkpoint(path), "is a folder")
    assert _round_of(path) == 0


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", bytes(5000), b"\x80\x02}q\x00."])
def test_checkpoints_that_are_none(content, tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    path.write_bytes(content)
    refused(lambda: last_checkpoint(tmp_path), "no checkpoint in")


CODE = "import pathlib\npathlib.Path({path!r}).touch()\nclass X: pass\n"


def with_code(folder: Path, canary: Path, *names: str) -> Path:
    """The folder's configurations name a module beside them that touches the canary."""
    (folder / "code.py").write_text(CODE.format(path=str(canary)))
    for name in names:
        path = folder / name
        if not path.exists():
            continue
        config = json.loads(path.read_text())
        classes = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
        config["auto_map"] = {kind: "code.X" for kind in (*classes, "AutoImageProcessor")}
        path.write_text(json.dumps(config))
    return folder


CONFIGS = ("config.json", "processor_config.json", "tokenizer_config.json", "preprocessor_config.json")


def test_an_mllm_with_code_of_its_own(canary, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "nano", folder)
    with_code(folder, canary, *CONFIGS)
    try:
        FrozenMLLM.load(str(folder))  # its known classes do
    except Exception as error:
        assert type(error).__name__ == "UserError", error
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    refused(lambda: FrozenMLLM.load(str(folder)), "does not load")


def test_an_mllm_with_pickled_weights(canary, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "nano", folder)
    (folder / "model.safetensors").unlink()
    for form in FORMS:
        (folder / "pytorch_model.bin").write_bytes(form(canary))
        refused(lambda: FrozenMLLM.load(str(folder)), "does not load")


def test_a_compressor_with_code_or_a_pickle(nano, canary, tmp_path):
    folder = tmp_path / "compressor"
    shutil.copytree(ASSETS / "nano_compressor", folder)
    with_code(folder, canary, "config.json")
    EvoCompCompressor.from_pretrained(folder)  # the class is known, so the code beside it is not looked at
    AutoConfig.from_pretrained(folder, trust_remote_code=False)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.bin", "adapter_model.bin"):
        (folder / name).write_bytes(saved(canary))
    refused(lambda: picker_for(folder, nano.model), "cannot be read")


def test_an_adapter_with_a_pickle(nano, canary, tmp_path):
    from evocomp.compressor.lora import add_lora, save_lora

    compressor = EvoCompCompressor.from_mllm(nano.model, layer=0).float()
    folder = tmp_path / "adapter"
    save_lora(add_lora(compressor, r=2), folder)
    picker_for(folder, nano.model)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(saved(canary))
    refused(lambda: picker_for(folder, nano.model), "cannot be read")


@pytest.mark.parametrize("form", FORMS)
def test_label_stores_and_data(form, canary, tmp_path):
    store = LabelStore.open(tmp_path / "labels", {})
    store.write(0, 0, [])
    store.commit(0, [0])
    for name in ("chunk-000000.safetensors", "COMMIT.json"):
        (tmp_path / "labels" / "round-0000" / name).write_bytes(form(canary))
        refused(lambda: store.read(0))
    (tmp_path / "labels" / "meta.json").write_bytes(form(canary))
    refused(lambda: LabelStore.open(tmp_path / "labels", {}))
    (tmp_path / "data.json").write_bytes(form(canary))
    refused(lambda: read_conversations(tmp_path))
