import builtins
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evocomp.labels.records import check_finite, decode, encode
from evocomp.labels.store import LabelStore
from evocomp.log import UserError

MADE_BY = {"model": "llava", "labels": {"q": 48, "p": 12}, "data": "abc"}


def read_chunk(store: LabelStore, round: int, chunk: int) -> list:
    """The records of one chunk, compared with the hash of a committed round."""
    committed = (store._folder(round) / "COMMIT.json").exists()
    return store._read_chunk(round, chunk, store._hashes(round) if committed else {})


def record(id: int) -> dict:
    """A record with every kind of field; arrays of different lengths per sample."""
    rng = np.random.default_rng(id)
    groups = id % 5 + 1
    return {
        "id": id,
        "kept": rng.integers(0, 99, groups).astype(np.int32),
        "population": rng.integers(0, 9, (3, groups)).astype(np.uint16),
        "losses": rng.random(3).astype(np.float32),
        "best": float(rng.random()),
        "evaluations": int(id * 10),
    }


def chunk(number: int) -> list[dict]:
    return [record(4 * number + k) for k in range(4)]


def equal(a: dict, b: dict) -> bool:
    same = a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, np.ndarray):
            same &= value.dtype == b[name].dtype and np.array_equal(value, b[name])
        else:
            same &= type(value) is type(b[name]) and value == b[name]
    return same


@pytest.fixture
def store(tmp_path):
    return LabelStore.open(tmp_path / "labels", MADE_BY)


def test_a_round_reads_back_as_written(store):
    for number in (2, 0, 1):
        store.write(3, number, chunk(number))
    assert store.rounds() == [] and not store.committed(3)
    store.commit(3, range(3))
    assert store.committed(3) and store.rounds() == [3] and store.chunks(3) == [0, 1, 2]
    records = LabelStore.open(store.path, MADE_BY).read(3)
    assert sorted(records) == list(range(12))
    assert all(equal(record(id), records[id]) for id in records)
    records[0]["kept"][0] = 7  # records may be written to
    names = sorted(path.name for path in store.path.rglob("*"))
    chunks = [f"chunk-00000{number}.safetensors" for number in range(3)]
    assert names == sorted(["COMMIT.json", "meta.json", "round-0003", *chunks])
    assert [r["id"] for r in read_chunk(store, 3, 1)] == [4, 5, 6, 7]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.floats(allow_nan=False)), min_size=0, max_size=5))
def test_records_survive_encoding(shapes):
    records = [
        {"id": i, "grid": np.full((a, b), i, dtype=np.int16), "row": np.zeros(b, dtype=bool), "x": x}
        for i, (a, b, x) in enumerate(shapes)
    ]
    decoded = decode(encode(records), "here")
    assert len(decoded) == len(records)
    assert all(equal(a, b) for a, b in zip(records, decoded, strict=True))


def test_bytes_do_not_depend_on_field_order_process_or_layout():
    records = chunk(1)
    shuffled = [dict(reversed(list(r.items()))) for r in records]
    for r in shuffled:
        r["population"] = np.asfortranarray(r["population"])
    content = encode(records)
    assert encode(shuffled) == content
    # another process, with another hash seed
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_store as t;"
    script += "print(t.sha256(t.encode(t.chunk(1))).hexdigest())"
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", script, os.path.dirname(__file__)]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == sha256(content).hexdigest()


def test_digest_does_not_depend_on_the_order_of_writing(tmp_path):
    digests = []
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        store = LabelStore.open(tmp_path / name, MADE_BY)
        for number in order:
            store.write(0, number, chunk(number))
        store.commit(0, range(3))
        digests.append(store.digest(0))
    assert digests[0] == digests[1]
    store = LabelStore.open(tmp_path / "c", MADE_BY)
    for number in range(3):
        store.write(0, number, chunk(number + (number == 2)))
    store.commit(0, range(3))
    assert store.digest(0) != digests[0]


def test_missing_chunks_are_listed_in_the_given_order(store):
    store.write(0, 1, chunk(1))
    assert store.has(0, 1) and not store.has(0, 0)
    assert store.missing(0, [3, 1, 0]) == [3, 0]
    with pytest.raises(UserError, match="lacks 2 chunks, first 0"):
        store.commit(0, range(3))
    assert not store.committed(0)


def test_an_incomplete_round_is_not_read(store):
    store.write(0, 0, chunk(0))
    with pytest.raises(UserError, match="not complete"):
        store.read(0)
    assert len(read_chunk(store, 0, 0)) == 4


def test_chunks_are_immutable(store, caplog):
    store.write(0, 0, chunk(0))
    store.write(0, 0, chunk(0))
    assert not caplog.records
    store.write(0, 0, chunk(1))
    assert "other content" in caplog.text
    assert read_chunk(store, 0, 0)[0]["id"] == 0


def test_another_fingerprint_is_refused_unless_overwritten(store):
    store.write(0, 0, chunk(0))
    store.commit(0, [0])
    other = {**MADE_BY, "model": "qwen"}
    with pytest.raises(UserError) as error:
        LabelStore.open(store.path, other)
    message = str(error.value)
    assert "model=llava (this run has model=qwen)" in message and "--labels.overwrite=true" in message
    assert "data" not in message and "\n" not in message
    assert store.rounds() == [0]
    # overwrite does not delete labels of the same fingerprint, so that a restarted job resumes
    assert LabelStore.open(store.path, MADE_BY, overwrite=True).rounds() == [0]
    assert LabelStore.open(store.path, other, overwrite=True).rounds() == []
    with pytest.raises(UserError):
        LabelStore.open(store.path, MADE_BY)


def test_fingerprints_are_compared_as_json(tmp_path):
    LabelStore.open(tmp_path / "s", {"sizes": (8, 16)})
    LabelStore.open(tmp_path / "s", {"sizes": [8, 16]})


def test_another_schema_is_refused(store):
    meta = json.loads((store.path / "meta.json").read_text())
    (store.path / "meta.json").write_text(json.dumps({**meta, "schema": 0}))
    with pytest.raises(UserError, match=r"schema=0 \(this run has schema=1\)"):
        LabelStore.open(store.path, MADE_BY)


def test_another_numpy_version_is_logged(store, caplog):
    meta = json.loads((store.path / "meta.json").read_text())
    assert meta["numpy"] == np.__version__
    (store.path / "meta.json").write_text(json.dumps({**meta, "numpy": "1.0"}))
    LabelStore.open(store.path, MADE_BY)
    assert "numpy 1.0" in caplog.text


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tmp.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="neither empty nor a label store"):
            LabelStore.open(tmp_path, MADE_BY, overwrite)
    with pytest.raises(UserError, match="cannot be a folder for the labels"):
        LabelStore.open(tmp_path / "thesis.tmp.tex", MADE_BY)
    assert (tmp_path / "thesis.tmp.tex").exists()


def test_a_damaged_meta_file_is_an_error(store):
    (store.path / "meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json"):
        LabelStore.open(store.path, MADE_BY)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "header"])
def test_a_damaged_chunk_is_an_error(store, damage):
    for number in range(2):
        store.write(0, number, chunk(number))
    path = store.path / "round-0000" / "chunk-000001.safetensors"
    content = path.read_bytes()

    def harm():
        if damage == "gone":
            path.unlink()
        else:
            harmed = {"cut": content[:-7], "flip": content[:-1] + b"\x55", "header": b"\xff" * 99}[damage]
            path.write_bytes(harmed)

    if damage in ("cut", "header"):  # detected even before the commit stores hashes
        harm()
        with pytest.raises(UserError, match="chunk-000001.safetensors is broken or cut short"):
            read_chunk(store, 0, 1)
        with pytest.raises(UserError, match="chunk-000001.safetensors"):
            store.commit(0, range(2))
        path.write_bytes(content)
    store.commit(0, range(2))
    harm()
    if damage != "gone":
        for read in (lambda: store.read(0), lambda: read_chunk(store, 0, 1)):
            with pytest.raises(UserError, match="chunk-000001.safetensors was changed after it was committed"):
                read()
        assert store.committed(0)
        path.unlink()
    # the remedy in the error message: without the file the round is incomplete and can be completed
    assert not store.committed(0) and store.rounds() == [] and store.missing(0, range(2)) == [1]
    with pytest.raises(UserError, match="not complete"):
        store.read(0)
    with pytest.raises(UserError, match="chunk-000001.safetensors is missing"):
        read_chunk(store, 0, 1)
    store.write(0, 1, chunk(1))
    store.commit(0, range(2))
    assert len(store.read(0)) == 8


def test_a_full_disk_is_one_line_and_leaves_the_store_intact(store, monkeypatch):
    store.write(0, 0, chunk(0))
    before = sorted(p.name for p in store.path.rglob("*"))

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="no space left"):
            store.write(0, 1, chunk(1))
    assert sorted(p.name for p in store.path.rglob("*")) == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="no space left"):
            store.write(1, 0, chunk(1))  # a new round's folder
    assert store.rounds() == [] and not store.has(1, 0)
    assert store.missing(0, range(2)) == [1] and len(read_chunk(store, 0, 0)) == 4


def test_a_really_full_disk(store, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda path, mode="r": real("/dev/full", mode))
    with pytest.raises(UserError, match="no space left"):
        store.write(0, 0, chunk(0))
    monkeypatch.undo()
    assert not store.has(0, 0)


def test_remove_and_size(store):
    empty = store.size()
    store.write(1, 0, chunk(0))
    store.commit(1, [0])
    assert store.size() > empty
    store.remove(1)
    store.remove(7)
    assert store.size() == empty and store.rounds() == []


def test_an_empty_chunk_and_an_empty_round(store):
    store.write(0, 0, [])
    store.commit(0, [0])
    store.commit(1, [])
    assert store.read(0) == {} and store.read(1) == {}


def test_records_with_different_fields_are_refused():
    with pytest.raises(AssertionError, match="same fields"):
        encode([{"id": 0, "a": 1}, {"id": 1, "b": 1}])
    with pytest.raises(AssertionError, match="several types"):
        encode([{"id": 0, "a": np.zeros(1)}, {"id": 1, "a": np.zeros((1, 1))}])


WRITER = """
    import os, sys, time
    sys.path.insert(0, sys.argv[2])
    import test_store as t
    store = t.LabelStore.open(sys.argv[1], t.MADE_BY)
    real = os.fsync
    number = 0
    def fsync(fd):
        real(fd)
        if number == 5:
            # the kill must hit this state: bytes on disk, but not yet under the final name
            print("writing", flush=True)
            time.sleep(60)
    os.fsync = fsync
    for number in range(40):
        store.write(0, number, t.chunk(number))
    store.commit(0, range(40))
"""


def test_a_killed_writer_leaves_complete_chunks_and_resumes_with_the_same_bytes(tmp_path):
    reference = LabelStore.open(tmp_path / "reference", MADE_BY)
    for number in range(40):
        reference.write(0, number, chunk(number))
    reference.commit(0, range(40))

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(WRITER), tmp_path / "killed", os.path.dirname(__file__)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert writer.stdout.readline() == "writing\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()

    left = list((tmp_path / "killed").rglob("*.tmp.*"))
    store = LabelStore.open(tmp_path / "killed", MADE_BY)
    assert left and not list(store.path.rglob("*.tmp.*")), "the half-written file is swept"
    missing = store.missing(0, range(40))
    assert missing == list(range(5, 40)) and not store.committed(0)
    for number in range(5):
        assert all(equal(a, b) for a, b in zip(read_chunk(store, 0, number), chunk(number), strict=True))
    for number in reversed(missing):
        store.write(0, number, chunk(number))
    store.commit(0, range(40))
    assert store.digest(0) == reference.digest(0)


def test_the_sweep_spares_live_writers_and_other_hosts(store):
    folder = store.path / "round-0000"
    folder.mkdir()
    host = socket.gethostname()
    live = folder / f"chunk-000000.safetensors.tmp.{host}.{os.getpid()}.1"
    elsewhere = folder / "chunk-000001.safetensors.tmp.node7.example.org.1.1"
    ancient = folder / "chunk-000002.safetensors.tmp.node7.example.org.1.1"
    for path in (live, elsewhere, ancient):
        path.write_bytes(b"x")
    os.utime(ancient, (0, 0))
    LabelStore.open(store.path, MADE_BY)
    assert live.exists() and elsewhere.exists() and not ancient.exists()


def test_several_processes_may_open_a_new_store_at_once(tmp_path):
    script = "import sys; sys.path.insert(0, sys.argv[2]); import test_store as t;"
    script += "[t.LabelStore.open(f'{sys.argv[1]}/{k}', t.MADE_BY) for k in range(100)]"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, tmp_path, os.path.dirname(__file__)]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, error = process.communicate()
        assert process.returncode == 0, error.decode()


def test_only_labels_that_were_never_scored_may_lack_losses():
    unknown = np.array([np.nan], np.float32)
    check_finite([{"id": 1, "evaluations": 0, "best_loss": unknown}, {"id": 2, "losses": np.zeros(3)}])
    refused = [{"best_loss": unknown}, {"evaluations": 3, "losses": unknown}, {"evaluations": 0, "credits": unknown}]
    for record in refused:
        with pytest.raises(UserError, match="label of sample 7 is not finite"):
            check_finite([{"id": 7, **record}])
