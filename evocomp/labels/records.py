"""Label records as safetensors bytes: no pickle, mapped by name, the same bytes for the same records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from evocomp.log import UserError

Record = dict[str, Any]
"""What is stored of one sample: an integer "id" and arrays or numbers, with the same fields in a chunk."""

ANEW = "delete this file and run the labelling again: it makes only what is missing"


def encode(records: list[Record]) -> bytes:
    """Records as safetensors bytes; the same records give the same bytes.

    A number is a column [n]. An array field x is x.data (all records' elements in a row), x.offsets [n+1]
    and, with several dimensions, x.shape [n, dimensions].
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
    # no metadata: safetensors keeps it in a hash map, whose order changes from process to process
    return safetensors.numpy.save(tensors)


def decode(content: bytes, path: Path) -> list[Record]:
    """Inverse of `encode`; `path` is for the error message."""
    tensors = tensors_of(content, path)
    records: list[Record] = [{"id": int(id)} for id in tensors["id"]]
    for name in sorted({name.split(".")[0] for name in tensors} - {"id"}):
        if name in tensors:
            for record, value in zip(records, tensors[name].tolist(), strict=True):
                record[name] = value
            continue
        # a copy: what safetensors gives cannot be written to, and torch warns of such arrays
        values = np.split(tensors[f"{name}.data"].copy(), tensors[f"{name}.offsets"][1:-1])
        shapes = tensors.get(f"{name}.shape")
        for row, (record, value) in enumerate(zip(records, values, strict=True)):
            record[name] = value if shapes is None else value.reshape(shapes[row])
    return records


def tensors_of(content: bytes, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a chunk; UserError when its bytes are not whole."""
    try:
        return safetensors.numpy.load(content)
    except SafetensorError as error:
        raise UserError(f"label chunk {path} is broken or cut short ({error}); {ANEW}") from None


MAY_BE_UNKNOWN = ("best_loss", "first_best", "first_mean", "losses")
"""Fields that are NaN in labels that were drawn and never scored (`labels.target=random`)."""


def check_finite(records: Sequence[Record]) -> None:
    """Raise UserError for a record with a number that is not finite: it would make the compressor NaN."""
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
    """Which of N = `tokens` visual tokens a record would keep: bool [N].

    A searched mask as it is; of credits the `keep` highest; of proposed masks the one with the lowest loss, or
    nothing if none was proposed.

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
