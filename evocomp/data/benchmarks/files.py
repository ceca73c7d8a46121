"""What the readers of benchmarks share: finding files, reading their rows, and getting at the pictures."""

import base64
import binascii
import csv
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evocomp.data.json_records import read_lines
from evocomp.log import UserError


def find(folder: Path, *patterns: str) -> Path:
    """The first file in `folder` or below it that matches a pattern; earlier patterns come first."""
    for pattern in patterns:
        found = sorted(path for path in folder.rglob(pattern) if path.is_file())
        if found:
            return found[0]
    raise UserError(f"{folder}: holds no file {' or '.join(patterns)}")


def find_all(folder: Path, *patterns: str) -> list[Path]:
    """All files of the first pattern that any matches."""
    for pattern in patterns:
        found = sorted(path for path in folder.rglob(pattern) if path.is_file())
        if found:
            return found
    raise UserError(f"{folder}: holds no file {' or '.join(patterns)}")


def read_tsv(path: Path) -> list[dict[str, Any]]:
    """Tab-separated rows with a header; empty cells, and pandas' `nan`, are None."""
    csv.field_size_limit(2**31 - 1)  # pictures stand in the cells
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if not rows or len(rows[0]) < 2:
        raise UserError(f"{path}: no tab-separated rows with a header")
    return [{key: None if value in ("", "nan", None) else value for key, value in row.items()} for row in rows]


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Raises UserError without pyarrow, which is not a requirement of this package."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: run `pip install pyarrow` to read parquet, or give a tsv or jsonl") from None
    return pyarrow.parquet.read_table(path).to_pylist()


def read_table(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Rows of tables of any of these kinds, by suffix."""
    readers = {".tsv": read_tsv, ".jsonl": read_lines, ".parquet": read_parquet}
    return [row for path in paths for row in readers[path.suffix](path)]


class PictureFolder:
    """Finds pictures by name in a benchmark's folder, whichever sub-folder they were unpacked to."""

    def __init__(self, folder: Path, below: Sequence[str]):
        self.folder = folder
        self.places = [folder / name for name in below] + [folder]

    def __call__(self, name: str) -> str:
        for place in self.places:
            if (place / name).is_file():
                return str(place / name)
        names = ", ".join(f"{place.relative_to(self.folder)}/" for place in self.places)
        raise UserError(f"{self.folder}: picture {name} is missing; looked in {names}")


class PackedPictures:
    """Pictures that come inside a table: unpacked once to a cache folder, as the bytes that they are.

    A table of thousands of pictures would not fit into memory as pixels. The folder is $EVOCOMP_CACHE, else
    ~/.cache/evocomp.
    """

    def __init__(self, table: Path):
        state = table.stat()
        key = hashlib.sha256(f"{table.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
        root = os.environ.get("EVOCOMP_CACHE") or Path.home() / ".cache" / "evocomp"
        self.table, self.folder = table, Path(root) / "pictures" / key

    def __call__(self, name: str, packed: Any) -> str:
        """Path of the picture `name`; `packed` is base64 text, or a record of bytes as in Hugging Face's
        tables."""
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{name}.{os.getpid()}.tmp")
            temporary.write_bytes(self._bytes(name, packed))
            temporary.replace(path)
        return str(path)

    def _bytes(self, name: str, packed: Any) -> bytes:
        if isinstance(packed, dict):
            packed = packed.get("bytes")
        if isinstance(packed, bytes):
            return packed
        try:
            return base64.b64decode(packed, validate=True)
        except (binascii.Error, ValueError, TypeError):
            raise UserError(f"{self.table}: the picture of row {name} is neither base64 nor bytes") from None


def letters(count: int) -> Iterator[str]:
    """A, B, C, ..."""
    return (chr(ord("A") + i) for i in range(count))
