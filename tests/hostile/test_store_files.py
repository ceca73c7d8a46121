"""Label stores that were damaged, mixed or made by somebody else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from one_line import refused

from evocomp.labels.records import encode
from evocomp.labels.store import LabelStore

MADE_BY = {"model": "nano", "seed": 0}


def records(*ids: int) -> list[dict]:
    return [{"id": id, "kept": np.arange(id % 3 + 1), "best_loss": 0.5} for id in ids]


@pytest.fixture
def store(tmp_path) -> LabelStore:
    one = LabelStore.open(tmp_path / "labels", MADE_BY)
    one.write(0, 0, records(1, 2))
    one.write(0, 1, records(3))
    return one


def chunk_of(store: LabelStore, number: int = 0) -> Path:
    return store.path / "round-0000" / f"chunk-{number:06d}.safetensors"


def test_every_flipped_byte_of_a_chunk_is_found_before_it_is_committed(store):
    path = chunk_of(store)
    whole = path.read_bytes()
    for at in range(8, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(lambda: store.commit(0, range(2)), path.name)
    assert not store.committed(0)
    path.write_bytes(whole)
    store.commit(0, range(2))
    assert store.read(0).keys() == {1, 2, 3}


def tensors(**arrays) -> bytes:
    return safetensors.numpy.save({name.replace("__", "."): np.array(value) for name, value in arrays.items()})


CONTENTS = {
    "empty": b"",
    "zeros": bytes(64),
    "pickle": b"\x80\x04\x95rubbish",
    "zip": b"PK\x03\x04" + bytes(60),
    "huge header": (2**60).to_bytes(8, "little") + b"{}",
    "deep header": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "no tensors": safetensors.numpy.save({}),
    "no ids": tensors(x=[1, 2]),
    "ids that are no integers": tensors(id=[0.5, 1.5]),
    "ids in two dimensions": tensors(id=[[1, 2]]),
    "a column of another length": tensors(id=[1, 2], best_loss=[0.5]),
    "data without offsets": tensors(id=[1, 2], kept__data=[1, 2, 3]),
    "offsets that go back": tensors(id=[1, 2], kept__data=[1, 2, 3], kept__offsets=[0, 5, 3]),
    "offsets of other records": tensors(id=[1, 2], kept__data=[1, 2, 3], kept__offsets=[0, 1, 2, 3]),
    "shapes that do not fit": tensors(id=[1], kept__data=[1, 2, 3], kept__offsets=[0, 3], kept__shape=[[2, 2]]),
    "a number that is none": tensors(id=[1], best_loss=[np.nan]),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_chunks_that_no_store_wrote_are_not_read(store, name):
    store.commit(0, range(2))
    chunk_of(store).write_bytes(CONTENTS[name])
    refused(lambda: store.read(0), "chunk-000000")
    (store.path / "round-0000" / "COMMIT.json").unlink()
    refused(lambda: store._read_chunk(0, 0, {}), "chunk-000000")


def test_a_foreign_chunk_is_not_committed(store):
    chunk_of(store, 1).write_bytes(encode(records(99)))
    refused(lambda: store.commit(0, range(2), samples=[[1, 2], [3]]), "labels of other samples")
    chunk_of(store, 1).write_bytes(encode(records(2)))
    store.commit(0, range(2))
    refused(lambda: store.read(0), "sample 2 is in two chunks")


COMMITS = [
    "",
    "[]",
    "null",
    "{}",
    '{"chunks": 3}',
    '{"chunks": [1]}',
    '{"chunks": {"x": "y"}}',
    '{"chunks": {"-1": "y"}}',
]
COMMITS += [
    '{"chunks": null}',
    "[" * 100_000,
    '{"chunks": {"' + "9" * 5000 + '": "y"}}',
    "\0",
    '{"chunks": {"٣": "y"}}',
]


@pytest.mark.parametrize("text", COMMITS)
def test_commits_that_are_none(store, text):
    (store.path / "round-0000" / "COMMIT.json").write_text(text)
    refused(lambda: store.read(0))


@pytest.mark.parametrize("listed", [[], [1], [0, 2], [0, 1, 2, 3]])
def test_a_commit_that_lists_other_chunks_is_not_believed(store, listed):
    store.commit(0, range(2))
    commit = store.path / "round-0000" / "COMMIT.json"
    commit.write_text(json.dumps({"chunks": {str(chunk): "x" for chunk in listed}}))
    if listed:
        refused(lambda: store.read(0))
    else:
        assert store.read(0) == {}  # an empty round; how many chunks it must have, the labeller knows


METAS = [
    "",
    "[]",
    "null",
    "{}",
    "3",
    "\0",
    "[" * 100_000,
    '{"schema": 1}',
    '{"schema": "1", "numpy": "2", "fingerprint": {}}',
]
METAS += ['{"schema": 1, "numpy": 2, "fingerprint": {}}', '{"schema": 1, "numpy": "2", "fingerprint": 3}']
METAS += [
    '{"schema": 1, "numpy": "2", "fingerprint": {"model": "other"}}',
    '{"schema": 9, "numpy": "2", "fingerprint": {}}',
]


@pytest.mark.parametrize("text", METAS)
def test_stores_of_others(store, text):
    (store.path / "meta.json").write_text(text)
    refused(lambda: LabelStore.open(store.path, MADE_BY))


@pytest.mark.parametrize(
    "name", ["x.tmp.y", "a.tmp.", ".tmp.", "chunk-x.safetensors", "a.tmp.b.c.d", "x.tmp.host.99999999999.1"]
)
def test_files_of_others_do_not_stop_a_store(store, name):
    for folder in (store.path, store.path / "round-0000"):
        (folder / name).write_text("mine")
    again = LabelStore.open(store.path, MADE_BY)
    assert (store.path / name).exists() and again.stored(0) == [0, 1]


@pytest.mark.parametrize("name", ["round-x", "round-99999999999999999999", "round-0000x", "round--1", "round-"])
def test_folders_of_others_are_no_rounds(store, name):
    (store.path / name).mkdir()
    assert store.begun() == [0] and LabelStore.open(store.path, MADE_BY).rounds() == []


@pytest.mark.parametrize("name", ["mine", "chunk-000002.safetensors", "mine.txt"])
def test_overwriting_deletes_nothing_where_others_have_put_something(store, name):
    if name.endswith(".txt"):
        (store.path / "round-0000" / name).write_text("mine")
    else:
        (store.path / "round-0000" / name).mkdir()
    before = sorted(str(path) for path in store.path.rglob("*"))
    refused(lambda: LabelStore.open(store.path, {**MADE_BY, "seed": 1}, overwrite=True), name)
    assert sorted(str(path) for path in store.path.rglob("*")) == before


HOLDER = """
import sys
from evocomp.labels.store import LabelStore
LabelStore.open(sys.argv[1], {})
print(1, flush=True)
input()
"""


def test_a_store_that_another_process_uses_is_not_overwritten(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "labels")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        refused(lambda: LabelStore.open(tmp_path / "labels", MADE_BY, overwrite=True), "another process is using")
        LabelStore.open(tmp_path / "labels", {})  # with the same settings they may share it
        other.kill()
    LabelStore.open(tmp_path / "labels", MADE_BY, overwrite=True)  # the lock of a killed process is gone


def test_a_writer_whose_store_was_overwritten_stops(store):
    LabelStore.open(store.path, {**MADE_BY, "seed": 1}, overwrite=True)
    refused(lambda: store.write(0, 2, records(4)), "overwritten or deleted by another process")
    refused(lambda: store.commit(0, []), "overwritten or deleted by another process")
    assert not list(store.path.glob("round-*"))


def test_a_store_that_was_deleted_is_named(store):
    import shutil

    shutil.rmtree(store.path)
    refused(lambda: store.write(0, 2, records(4)), "overwritten or deleted")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount")
def test_a_complete_store_on_a_read_only_disk_is_used(store):
    store.commit(0, range(2))
    mount = ["mount", "--bind", str(store.path), str(store.path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(store.path)], check=True)
        assert LabelStore.open(store.path, MADE_BY).read(0).keys() == {1, 2, 3}
        refused(lambda: LabelStore.open(store.path, MADE_BY).write(0, 2, records(4)), "cannot be written")
        refused(lambda: LabelStore.open(store.path, {**MADE_BY, "seed": 1}, overwrite=True), "labels")
        assert store.read(0).keys() == {1, 2, 3}
    finally:
        subprocess.run(["umount", str(store.path)], check=True)
