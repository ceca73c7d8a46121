"""Labels on disk: complete or absent, whatever is killed and whenever.

    DIR/meta.json                               what made the store
    DIR/round-0003/chunk-000007.safetensors     records of some samples, never changed once there
    DIR/round-0003/COMMIT.json                  written last: the round is complete

A file appears under its name only when all its bytes are on disk (temporary name, fsync, rename), so that
readers and writers need no locks. Chunks are keyed by samples and never by ranks: a round that several ranks
made, crashed in and resumed has the same bytes as one made by a single process.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from evocomp.files import is_full, sweep, write_whole
from evocomp.labels.records import ANEW, Record, check_finite, decode, encode, tensors_of
from evocomp.log import UserError, logger, warn_once

SCHEMA = 1


class LabelStore:
    """Label records by round and chunk. Make one with `LabelStore.open`.

    >>> import tempfile
    >>> store = LabelStore.open(tempfile.mkdtemp(), {"model": "nano"})
    >>> store.write(round=0, chunk=0, records=[{"id": 5, "kept": np.array([1, 4]), "best_loss": 0.25}])
    >>> store.commit(round=0, chunks=[0])
    >>> store.rounds(), store.read(0)[5]["kept"].tolist()
    ([0], [1, 4])
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str | Path, fingerprint: dict[str, Any], overwrite: bool = False) -> "LabelStore":
        """Open the store in folder `path`, or start one there.

        Args:
            path: the folder; shared by all ranks.
            fingerprint: what the labels depend on (model, data, label configuration, ...), JSON values.
            overwrite: throw away a store made by another fingerprint. One of this fingerprint is continued.

        Raises UserError when the folder holds a store of another fingerprint, or something else.
        """
        store = cls(Path(path))
        fingerprint = json.loads(json.dumps(fingerprint))
        try:
            store.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be a folder for the labels: {error.strerror}") from None
        # listed before meta.json is looked for: another rank may be starting the same store
        entries = [entry for entry in store.path.iterdir() if not entry.name.startswith("meta.json.tmp.")]
        found = store._meta()
        made_by = {"schema": SCHEMA, "fingerprint": fingerprint}
        if found is None and entries:
            raise UserError(f"{path} is neither empty nor a label store; choose another folder")
        if found is not None and {key: found[key] for key in made_by} == made_by:
            sweep([*store.path.glob("*.tmp.*"), *store.path.glob("round-*/*.tmp.*")])
            store._check_numpy(found)
            return store
        if found is not None:
            if not overwrite:
                there, here = _leaves(found), _leaves(made_by)
                differing = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
                raise _made_by_others(path, found, made_by, differing)
            for folder in store.path.glob("round-*"):
                store._remove(folder)
        store._replace(store.path / "meta.json", _json({**made_by, "numpy": np.__version__}))
        return store

    @classmethod
    def refuse_other(cls, path: str | Path, known: dict[str, Any]) -> None:
        """Raise `UserError` if `path` holds a store that differs in what is known of a fingerprint; writes nothing.

        Args:
            known: entries of a fingerprint; settings in them that are still to be decided are "auto".
        """
        found = cls(Path(path))._meta()
        if found is None:
            return
        here = {"schema": SCHEMA, "fingerprint": json.loads(json.dumps(known))}
        there = {**found, "fingerprint": {key: found["fingerprint"].get(key) for key in known}}
        if differing := [key for key, value in _leaves(here).items() if value not in ("auto", _leaves(there).get(key))]:
            raise _made_by_others(path, there, here, differing)

    # -- chunks

    def write(self, round: int, chunk: int, records: list[Record]) -> None:
        """Store a chunk. One that is there already stays as it is, for chunks are immutable."""
        self.put(round, chunk, encode(records))

    def put(self, round: int, chunk: int, content: bytes) -> None:
        """`write`, with the bytes that `content` gave in another store."""
        path = self._chunk(round, chunk)
        if path.exists():
            if path.read_bytes() != content:
                logger.warning("%s exists with other content; the first one is kept", path)
            return
        self._replace(path, content)

    def content(self, round: int, chunk: int) -> bytes:
        """A chunk's bytes."""
        return _content(self._chunk(round, chunk))

    def has(self, round: int, chunk: int) -> bool:
        """Whether the chunk is stored (its round need not be committed)."""
        return self._chunk(round, chunk).exists()

    def missing(self, round: int, chunks: Iterable[int]) -> list[int]:
        """Those of `chunks` that are not stored yet, in the given order."""
        # one listing: a look-up per chunk costs a round trip each on a network file system
        stored = set(self.stored(round))
        return [chunk for chunk in chunks if chunk not in stored]

    def stored(self, round: int) -> list[int]:
        """Chunk numbers that are stored, ascending; their round need not be committed."""
        paths = self._folder(round).glob("chunk-*")
        found = (re.fullmatch(r"chunk-(\d+)\.safetensors", path.name) for path in paths)
        return sorted(int(m[1]) for m in found if m)

    def _read_chunk(self, round: int, chunk: int, hashes: dict[str, str]) -> list[Record]:
        path = self._chunk(round, chunk)
        content = _content(path)
        if str(chunk) in hashes and hashes[str(chunk)] != _sha256(content):
            raise UserError(f"label chunk {path} is not what was committed; {ANEW}")
        records = decode(content, path)
        try:
            check_finite(records)
        except UserError as error:
            raise UserError(f"label chunk {path}: {error}; or {ANEW}") from None
        return records

    # -- rounds

    def commit(self, round: int, chunks: Iterable[int]) -> None:
        """Declare the round complete: all of `chunks` are there and whole. Called by one rank."""
        chunks = sorted(chunks)
        missing = self.missing(round, chunks)
        if missing:
            raise UserError(
                f"round {round} of label store {self.path} lacks {len(missing)} chunks, first {missing[0]}; "
                "run the labelling again: it makes only these"
            )
        hashes = {}
        for chunk in chunks:
            path = self._chunk(round, chunk)
            content = _content(path)
            tensors_of(content, path)
            hashes[str(chunk)] = _sha256(content)
        self._replace(self._folder(round) / "COMMIT.json", _json({"chunks": hashes}))

    def committed(self, round: int) -> bool:
        """Whether the round is complete: chunks are listed from 0 without a gap, and all of them are stored.

        No longer if somebody deleted one of its chunks. How many it must have, the labeller knows.
        """
        if not (self._folder(round) / "COMMIT.json").exists():
            return False
        listed = sorted(map(int, self._hashes(round)))
        return listed == list(range(len(listed))) and not self.missing(round, listed)

    def rounds(self) -> list[int]:
        """The complete rounds, ascending."""
        return [round for round in self.begun() if self.committed(round)]

    def begun(self) -> list[int]:
        """The rounds that have a folder, complete or not, ascending."""
        found = (re.fullmatch(r"round-(\d+)", folder.name) for folder in self.path.glob("round-*"))
        return sorted(int(m[1]) for m in found if m)

    def read(self, round: int) -> dict[int, Record]:
        """All records of a complete round by sample id."""
        records: dict[int, Record] = {}
        chunks = self.chunks(round)
        hashes = self._hashes(round)
        for chunk in chunks:
            for record in self._read_chunk(round, chunk, hashes):
                assert record["id"] not in records, f"sample {record['id']} is in two chunks of round {round}"
                records[record["id"]] = record
        return records

    def chunks(self, round: int) -> list[int]:
        """Chunk numbers of a complete round, ascending; for reading it piece by piece."""
        if not self.committed(round):
            raise UserError(
                f"round {round} of label store {self.path} is not complete; "
                "run the labelling again to finish it"
            )
        return sorted(map(int, self._hashes(round)))

    def digest(self, round: int) -> str:
        """SHA-256 over the bytes of all chunks of a complete round, in order."""
        total = hashlib.sha256()
        for chunk in self.chunks(round):
            total.update(_content(self._chunk(round, chunk)))
        return total.hexdigest()

    def remove(self, round: int) -> None:
        """Delete a round, complete or not."""
        self._remove(self._folder(round))

    def identity(self) -> int:
        """Differs between stores, also between equal ones on two disks: when the store was started [ns]."""
        return (self.path / "meta.json").stat().st_mtime_ns

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    # -- files

    def _folder(self, round: int) -> Path:
        return self.path / f"round-{round:04d}"

    def _chunk(self, round: int, chunk: int) -> Path:
        return self._folder(round) / f"chunk-{chunk:06d}.safetensors"

    def _meta(self) -> dict[str, Any] | None:
        path = self.path / "meta.json"
        if not path.exists():
            return None
        try:
            meta = json.loads(path.read_bytes())
            assert isinstance(meta["schema"], int) and isinstance(meta["numpy"], str)
            return {**meta, "fingerprint": dict(meta["fingerprint"])}
        except (ValueError, KeyError, TypeError, AssertionError):
            raise UserError(f"{path} is not readable; restore it or choose another folder") from None

    def _hashes(self, round: int) -> dict[str, str]:
        path = self._folder(round) / "COMMIT.json"
        try:
            return dict(json.loads(path.read_bytes())["chunks"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not readable; delete it and run the labelling again") from None

    def _check_numpy(self, meta: dict[str, Any]) -> None:
        if meta["numpy"] != np.__version__:
            warn_once(
                f"label store {self.path} was started with numpy {meta['numpy']}, this is {np.__version__}: "
                "random numbers, and so labels still to be made, may differ"
            )

    def _replace(self, path: Path, content: bytes) -> None:
        try:
            write_whole(path, content)
        except OSError as error:
            if is_full(error):
                raise UserError(
                    f"no space left for label store {self.path}; make room and run again: "
                    "the chunks that are finished are kept"
                ) from error
            raise

    def _remove(self, folder: Path) -> None:
        # the commit goes first: a removal that is cut short leaves an incomplete round, not a broken one
        (folder / "COMMIT.json").unlink(missing_ok=True)
        for path in folder.glob("*"):
            path.unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"label chunk {path} is missing; run the labelling again") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _leaves(made_by: dict[str, Any]) -> dict[str, Any]:
    """Schema and fingerprint as one flat dictionary of dotted keys."""

    def walk(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return flat

    return walk({"schema": made_by["schema"], **made_by["fingerprint"]}, "")


def _made_by_others(path: str | Path, found: dict[str, Any], made_by: dict[str, Any], keys: list[str]) -> UserError:
    there, here = (", ".join(f"{key}={_leaves(side).get(key)}" for key in keys[:3]) for side in (found, made_by))
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return UserError(
        f"label store {path} was made by {there}{more} (this run has {here}{more}); "
        "choose another folder or --labels.overwrite=true"
    )
