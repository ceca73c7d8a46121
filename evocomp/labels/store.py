"""Label store on disk. A process that is killed at any time leaves no partial file under its final name.

    DIR/meta.json                               fingerprint of the settings, model and data that made the store
    DIR/round-0003/chunk-000007.safetensors     records of some samples, never changed
    DIR/round-0003/COMMIT.json                  written last, when the round is complete

A file appears under its name only when all its bytes are on disk (temporary name, fsync, rename), so that
readers and writers of one store need no locks; a lock keeps a store that is in use from being overwritten with other
settings. Chunks are keyed by samples and never by ranks: a round that several ranks
made, crashed in and resumed has the same bytes as one made by a single process.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evocomp.files import is_full, sweep, write_whole
from evocomp.labels.lock import alone, hold
from evocomp.labels.records import ANEW, Record, check_finite, decode, encode, tensors_of
from evocomp.log import UserError, logger, warn_once

SCHEMA = 1


class LabelStore:
    """Label records by round and chunk. Open one with `LabelStore.open`.

    >>> import tempfile
    >>> store = LabelStore.open(tempfile.mkdtemp(), {"model": "nano"})
    >>> store.write(round=0, chunk=0, records=[{"id": 5, "kept": np.array([1, 4]), "best_loss": 0.25}])
    >>> store.commit(round=0, chunks=[0])
    >>> store.rounds(), store.read(0)[5]["kept"].tolist()
    ([0], [1, 4])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made_by: dict[str, Any] | None = None  # known once the store was opened

    @classmethod
    def open(cls, path: str | Path, fingerprint: dict[str, Any], overwrite: bool = False) -> "LabelStore":
        """Open the store in folder `path`, or create one there.

        Args:
            path: the folder; shared by all ranks.
            fingerprint: what the labels depend on (model, data, label configuration, ...), JSON values.
            overwrite: throw away a store made by another fingerprint. One of this fingerprint is continued.

        Raises UserError when the folder holds a store of another fingerprint, or something else, or another process is
        using the store that is to be thrown away.
        """
        store = cls(Path(path))
        fingerprint = json.loads(json.dumps(fingerprint))
        try:
            store.path.mkdir(parents=True, exist_ok=True)
            # listed before meta.json is looked for: another rank may be starting the same store
            entries = [entry for entry in store.path.iterdir() if not entry.name.startswith("meta.json.tmp.")]
        except OSError as error:
            raise UserError(f"{path} cannot be a folder for the labels: {error.strerror}") from None
        found = store._meta()
        store._made_by = {"schema": SCHEMA, "fingerprint": fingerprint}
        if found is None and entries:
            raise UserError(f"{path} is neither empty nor a label store; choose another folder")
        if found is None:
            store._start()
        elif not store._is_made_by_this(found):
            if not overwrite:
                there, here = _leaves(found), _leaves(store._made_by)
                differing = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
                raise _made_by_others(path, found, store._made_by, differing)
            store._overwrite()
        else:
            sweep([*store.path.glob("*.tmp.*"), *store.path.glob("round-*/*.tmp.*")])
            store._check_numpy(found)
        hold(store.path)
        store._check_is_mine()  # another process may have overwritten it just now
        return store

    def _is_made_by_this(self, found: dict[str, Any]) -> bool:
        assert self._made_by is not None, "the store was not opened"
        return {key: found[key] for key in self._made_by} == self._made_by

    def _start(self) -> None:
        assert self._made_by is not None, "the store was not opened"
        self._replace(self.path / "meta.json", _json({**self._made_by, "numpy": np.__version__}))

    def _overwrite(self) -> None:
        """Throw away rounds that were made with other settings, unless another process is using them."""
        with alone(self.path):
            folders = [folder for folder in self.path.glob("round-*") if folder.is_dir()]
            # before anything is deleted
            for folder in folders:
                self._check_removable(folder)
            for folder in folders:
                self._remove(folder)
            self._start()

    def _check_is_mine(self) -> None:
        """Raise `UserError` if the store was overwritten with other settings since it was opened."""
        found = self._meta() if self._made_by is not None else None
        if self._made_by is not None and (found is None or not self._is_made_by_this(found)):
            raise UserError(
                f"label store {self.path} was overwritten or deleted by another process; choose another folder "
                "(labels.dir) for one of the two"
            )

    @classmethod
    def refuse_other(cls, path: str | Path, known: dict[str, Any]) -> None:
        """Raise `UserError` if `path` holds a store that differs in the known part of a fingerprint; writes nothing.

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
        """Store a chunk. An existing chunk is not replaced, because chunks are immutable."""
        self.put(round, chunk, encode(records))

    def put(self, round: int, chunk: int, content: bytes) -> None:
        """`write`, with the bytes that `content` gave in another store."""
        self._check_is_mine()
        path = self._chunk(round, chunk)
        if path.exists():
            if _content(path) != content:
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
        """The chunks that are not stored yet, in the given order."""
        # list the folder once: on a network file system a look-up per chunk would cost a round trip each
        stored = set(self.stored(round))
        return [chunk for chunk in chunks if chunk not in stored]

    def stored(self, round: int) -> list[int]:
        """Numbers of the stored chunks, ascending; their round need not be committed."""
        paths = self._folder(round).glob("chunk-*")
        found = (re.fullmatch(r"chunk-(\d{6,9})\.safetensors", path.name) for path in paths)
        return sorted(int(m[1]) for m in found if m)

    def _read_chunk(self, round: int, chunk: int, hashes: dict[str, str]) -> list[Record]:
        path = self._chunk(round, chunk)
        content = _content(path)
        if str(chunk) in hashes and hashes[str(chunk)] != _sha256(content):
            raise UserError(f"label chunk {path} was changed after it was committed; {ANEW}")
        records = decode(content, path)
        try:
            check_finite(records)
        except UserError as error:
            raise UserError(f"label chunk {path}: {error}; or {ANEW}") from None
        return records

    # -- rounds

    def commit(self, round: int, chunks: Iterable[int], samples: Sequence[Collection[int]] | None = None) -> None:
        """Declare the round complete: all of `chunks` are there and whole. Called by one rank.

        Args:
            samples: for each chunk number the samples that it may hold; None: any.

        Raises:
            UserError: a chunk is missing, damaged or holds other samples.
        """
        self._check_is_mine()
        chunks = sorted(chunks)
        missing = self.missing(round, chunks)
        if missing:
            raise UserError(
                f"round {round} of label store {self.path} lacks {len(missing)} chunks, first {missing[0]}; "
                "run the labelling again to make only these"
            )
        hashes = {}
        for chunk in chunks:
            path = self._chunk(round, chunk)
            content = _content(path)
            ids = tensors_of(content, path)["id"].tolist()
            if samples is not None and not set(ids) <= set(samples[chunk]):
                raise UserError(f"label chunk {path} holds labels of other samples; {ANEW}")
            hashes[str(chunk)] = _sha256(content)
        self._replace(self._folder(round) / "COMMIT.json", _json({"chunks": hashes}))

    def committed(self, round: int) -> bool:
        """Whether the round is committed with chunks numbered from 0 without a gap, all of which are stored.

        It is False after a chunk was deleted. The labeller checks the number of chunks.
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
        found = (re.fullmatch(r"round-(\d{4,9})", folder.name) for folder in self.path.glob("round-*"))
        return sorted(int(m[1]) for m in found if m)

    def read(self, round: int) -> dict[int, Record]:
        """All records of a complete round by sample id."""
        records: dict[int, Record] = {}
        chunks = self.chunks(round)
        hashes = self._hashes(round)
        for chunk in chunks:
            for record in self._read_chunk(round, chunk, hashes):
                if record["id"] in records:
                    raise UserError(
                        f"sample {record['id']} is in two chunks of round {round} of label store {self.path}; delete "
                        "that round and run the labelling again"
                    )
                records[record["id"]] = record
        return records

    def chunks(self, round: int) -> list[int]:
        """Numbers of the chunks of a complete round, ascending, for reading it chunk by chunk."""
        if not self.committed(round):
            raise UserError(
                f"round {round} of label store {self.path} is not complete; run the labelling again to finish it"
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
        """Identifies the store among all ranks' stores, even copies on separate disks: its time of creation [ns]."""
        return (self.path / "meta.json").stat().st_mtime_ns

    def size(self) -> int:
        """Size on disk [bytes]."""
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
        except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError):
            raise UserError(f"{path} is not readable; restore it or choose another folder") from None

    def _hashes(self, round: int) -> dict[str, str]:
        path = self._folder(round) / "COMMIT.json"
        try:
            hashes = dict(json.loads(path.read_bytes())["chunks"])
            if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in hashes):
                raise ValueError
            return hashes
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path} is not readable; delete it and run the labelling again") from None

    def _check_numpy(self, meta: dict[str, Any]) -> None:
        if meta["numpy"] != np.__version__:
            warn_once(
                f"label store {self.path} was created with numpy {meta['numpy']}, but {np.__version__} is installed; "
                "random numbers, and therefore labels that are still missing, may differ"
            )

    def _replace(self, path: Path, content: bytes) -> None:
        try:
            write_whole(path, content)
        except OSError as error:
            if is_full(error):
                raise UserError(
                    f"no space left for label store {self.path}; free some space and run again: "
                    "finished chunks are kept"
                ) from error
            raise UserError(
                f"label store {self.path} cannot be written ({error.strerror}); mend this, or choose another folder "
                "(labels.dir)"
            ) from error

    def _check_removable(self, folder: Path) -> None:
        """Raise `UserError` if the folder of a round holds what no label store writes."""
        for path in folder.iterdir():
            if path.is_dir() or not re.fullmatch(r"(COMMIT\.json|chunk-\d+\.safetensors)(\.tmp\..+)?", path.name):
                raise UserError(f"{path} does not belong to a label store; move it away, or choose another folder")

    def _remove(self, folder: Path) -> None:
        if not folder.exists():
            return
        self._check_removable(folder)
        try:
            # the commit goes first: a removal that is cut short leaves an incomplete round, not a broken one
            (folder / "COMMIT.json").unlink(missing_ok=True)
            for path in folder.glob("*"):
                path.unlink(missing_ok=True)
            folder.rmdir()
        except OSError as error:
            raise UserError(f"{folder} of the label store cannot be deleted ({error.strerror})") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"label chunk {path} is missing; run the labelling again") from None
    except OSError as error:
        raise UserError(f"label chunk {path} cannot be read ({error.strerror})") from None


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
        f"label store {path} was made with {there}{more} (this run has {here}{more}); "
        "choose another folder or --labels.overwrite=true"
    )
