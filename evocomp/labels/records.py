"""Encodes label records as safetensors: no pickle, and the same bytes for the same records."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from evocomp.log import UserError

Record = dict[str, Any]
"""Stored label of one sample: an integer "id", and arrays or numbers. All records of a chunk have the same fields."""

ANEW = "delete this file and run the labelling again: it makes only what is missing"


def encode(records: list[Record]) -> bytes:
    """Records as safetensors bytes; the same records give the same bytes.

    A number field is stored as a tensor [n]. An array field x is stored as x.data (the elements of all records,
    concatenated), x.offsets [n+1] and, if it has several dimensions, x.shape [n, dimensions].
    """
    tensors = {"id": np.array([record["id"] for record in records], dtype=np.int64)}
    names = sorted(records[0].keys() - {"id"}) if records else []
    for record in records:
        assert sorted(record.keys() - {"id"}) == names, "the records of a chunk have the same fields"
    for name in names:
        assert "." not in name, f"field names have no dots: {name}"
        values = [np.asarray(record[name]) for record in records]
        kinds = {(value.dtype, value.ndim) for value in values}
        assert len(kinds) == 1, f"field {name} has several types or numbers of dimensions: {kinds}"
        if values[0].ndim == 0:
            tensors[name] = np.stack(values)
            continue
        tensors[f"{name}.data"] = np.concatenate([value.ravel() for value in values])
        tensors[f"{name}.offsets"] = np.cumsum([0] + [value.size for value in values], dtype=np.int64)
        if values[0].ndim > 1:
            tensors[f"{name}.shape"] = np.array([value.shape for value in values], dtype=np.int64)
    # one entry of metadata only: safetensors keeps it in a hash map, whose order changes from process to process
    return safetensors.numpy.save(tensors, {CHECKSUM: _checksum(tensors)})


def decode(content: bytes, path: Path) -> list[Record]:
    """Inverse of `encode`; `path` is for the error message. Raises UserError for a file that `encode` did not write."""
    tensors = tensors_of(content, path)
    try:
        return _records(tensors)
    except (KeyError, ValueError, IndexError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"label chunk {path} does not hold label records ({reason}); {ANEW}") from None


def _records(tensors: dict[str, np.ndarray]) -> list[Record]:
    records: list[Record] = [{"id": int(id)} for id in tensors["id"]]
    for name in sorted({name.split(".")[0] for name in tensors} - {"id"}):
        if name in tensors:
            for record, value in zip(records, tensors[name].tolist(), strict=True):
                record[name] = value
            continue
        offsets = tensors[f"{name}.offsets"]
        if offsets[0] != 0 or offsets[-1] != len(tensors[f"{name}.data"]) or np.any(np.diff(offsets) < 0):
            raise ValueError(f"offsets of {name}")
        # a copy: what safetensors gives cannot be written to, and torch warns of such arrays
        values = np.split(tensors[f"{name}.data"].copy(), offsets[1:-1]) if len(offsets) > 1 else []
        shapes = tensors.get(f"{name}.shape")
        for row, (record, value) in enumerate(zip(records, values, strict=True)):
            record[name] = value if shapes is None else value.reshape(shapes[row])
    return records


CHECKSUM = "sha256"
"""Metadata of a chunk: SHA-256 of its tensors, so that damage is found before the round is committed."""


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(safetensors.numpy.save(tensors)).hexdigest()


def tensors_of(content: bytes, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a chunk; UserError when its bytes are not whole or not those that were written."""
    try:
        tensors = safetensors.numpy.load(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"label chunk {path} is broken or cut short ({reason}); {ANEW}") from None
    ids = tensors.get("id")
    if ids is None or ids.dtype != np.int64 or ids.ndim != 1:
        raise UserError(f"label chunk {path} does not hold label records (no column of ids); {ANEW}")
    # chunks of earlier versions have no checksum
    if metadata and metadata.get(CHECKSUM) != _checksum(tensors):
        raise UserError(f"label chunk {path} is damaged: its checksum is another one; {ANEW}")
    return tensors


MAY_BE_UNKNOWN = ("best_loss", "first_best", "first_mean", "losses")
"""Fields that are NaN in random labels, which are never scored (`labels.target=random`)."""


def check_finite(records: Sequence[Record]) -> None:
    """Raise UserError for a record with a NaN or infinite number, which would make the compressor's weights NaN."""
    for record in records:
        scored = record.get("evaluations", 1) != 0
        for name, value in record.items():
            numbers = np.asarray(value)
            if numbers.dtype.kind != "f" or np.isfinite(numbers).all() or (name in MAY_BE_UNKNOWN and not scored):
                continue
            raise UserError(
                f"the label of sample {record['id']} is not finite ({name}); the model's losses overflow or it is "
                "damaged: try model.dtype=float32 and labels.dtype=model"
            )


def kept_by(record: Record, tokens: int, keep: int) -> np.ndarray:
    """Mask of the N = `tokens` visual tokens that a record keeps: bool [N].

    For a search label, its mask; for credits, the `keep` highest; for proposed masks, the one with the lowest loss, or
    no token if there are no proposals.

    >>> kept_by({"id": 1, "credits": np.array([0.1, 0.9, 0.4])}, tokens=3, keep=2).tolist()
    [False, True, True]
    """
    chosen = np.zeros(tokens, dtype=bool)
    if "kept" in record:
        chosen[record["kept"].astype(np.int64)] = True
    elif "credits" in record:
        chosen[np.argsort(-record["credits"].astype(np.float64), kind="stable")[:keep]] = True
    elif len(record["draws"]):
        chosen[record["draws"][int(np.argmax(record["advantages"]))].astype(np.int64)] = True
    return chosen
