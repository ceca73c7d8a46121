"""Every writer on a disk that is full: one line, and what was there stays."""

import errno
import os
import subprocess

import pytest
import torch
from one_line import refused, refused_by_command

from evocomp import cli
from evocomp.files import write_whole
from evocomp.labels.store import LabelStore
from evocomp.log import exit_code
from evocomp.runs.folder import write_json
from evocomp.training.checkpoint_files import CheckpointFiles


@pytest.fixture
def disk(tmp_path):
    """A disk of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk) -> None:
    try:
        with open(disk / "full", "wb") as file:
            for _ in range(1000):
                file.write(bytes(4096))
                file.flush()
    except OSError as error:
        assert error.errno == errno.ENOSPC


def names(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_checkpoints(disk):
    path = disk / "checkpoints" / "last.ckpt"
    state = {"state_dict": {"w": torch.arange(1000.0)}, "loops": {}}
    CheckpointFiles().save_checkpoint(state, path)
    before = path.read_bytes()
    big = {"state_dict": {"w": torch.zeros(100_000)}, "loops": {}}
    refused(lambda: CheckpointFiles().save_checkpoint(big, path), "no space left")
    assert path.read_bytes() == before and names(disk) == ["checkpoints", "checkpoints/last.ckpt"]
    loaded = CheckpointFiles().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["w"], state["state_dict"]["w"])


def test_a_checkpoint_of_a_run_folder_that_was_deleted(tmp_path):
    path = tmp_path / "gone" / "checkpoints" / "last.ckpt"
    refused(lambda: CheckpointFiles().save_checkpoint({}, path), "cannot be written (No such file or directory)")


def test_label_stores(disk):
    store = LabelStore.open(disk / "labels", {})
    store.write(0, 0, [{"id": 1, "best_loss": 0.5}])
    fill(disk)
    before = names(disk)
    refused(lambda: store.write(0, 1, [{"id": 2, "best_loss": 0.5}]), "no space left")
    refused(lambda: store.commit(0, [0]), "no space left")
    assert names(disk) == before


def test_drawn_scenes(disk, capsys):
    assert refused_by_command(capsys, ["data", "scenes", f"--out={disk / 'a'}", "--count=500"], "No space left")
    assert not (disk / "a" / "data.json").exists() and not list(disk.rglob("*.tmp.*"))


def test_small_files(disk, capsys):
    path = disk / "trained.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    fill(disk)
    assert exit_code(lambda: write_json(path, {"a": "x" * 9000}), "evocomp") == 2
    assert exit_code(lambda: write_whole(disk / "b", bytes(9000)), "evocomp") == 2
    assert "No space left" in capsys.readouterr().err
    assert path.read_bytes() == before and names(disk) == ["full", "trained.json"]


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO", "ENOENT", "ESTALE", "ENAMETOOLONG"])
def test_what_a_disk_says_is_one_line(code, capsys, monkeypatch):
    def fails(asked):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), "some/file")

    monkeypatch.setitem(cli.VERBS, "config", fails)
    line = refused_by_command(capsys, ["config", "--seed=1"], "some/file: ")
    assert "run the same command again" in line
