"""The batch of a training step: encoded samples joined with their labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evocomp.labels.records import Record
from evocomp.log import UserError
from evocomp.mllm.features import Features, pad_right
from evocomp.mllm.hf import FrozenMLLM


@dataclass
class CompressorInput:
    """Inputs of the compressor: visual [B, N, D], prompt [B, T, D], and their masks (True: not padding)."""

    visual: Tensor
    visual_mask: Tensor | None
    prompt: Tensor
    prompt_mask: Tensor | None


@dataclass
class Population:
    """Masks of r tokens each that an earlier state of the compressor proposed for some rows of the batch.

    rows [b] of the batch; draws [b, K, r] in draw order; advantages [b, K]; old_log_prob [b, K].
    """

    rows: Tensor
    draws: Tensor
    advantages: Tensor
    old_log_prob: Tensor


@dataclass
class TrainBatch:
    """B samples with labels of one kind.

    Attributes:
        ids: sample ids [B].
        round: round of the label store that the labels are from.
        inputs: inputs of the compressor.
        targets: [B, N] in {0, 1} (hard labels) or credits; None if there are populations.
        populations: proposed masks, one `Population` for each mask size.
        budget: [B] number of tokens that the masks keep; None if the labels do not depend on the number of kept tokens.
    """

    ids: list[int]
    round: int
    inputs: CompressorInput
    targets: Tensor | None
    populations: list[Population] = field(default_factory=list)
    budget: Tensor | None = None

    def to(self, device: torch.device) -> "TrainBatch":
        """The same batch on another device."""
        return _move(self, device)


def question_ids(batch: Any) -> list[int]:
    """Ids [B] of the questions in a batch of a datamodule.

    Also a `collate_fn` for examples, which Lightning does not move to a device as they are:
    `DataLoader(examples, collate_fn=question_ids)`.

    Args:
        batch: ids as a tensor [B] or a sequence, examples, or a mapping with one of these under the key `id`.

    Raises:
        UserError: the batch is something else.

    >>> question_ids({"id": torch.tensor([5, 7]), "question": ["left?", "red?"]})
    [5, 7]
    """
    found = batch.get("id") if isinstance(batch, Mapping) else batch
    if isinstance(found, Tensor) and found.dtype == torch.int64:
        return found.flatten().tolist()
    if isinstance(found, list | tuple):
        ids = [getattr(one, "id", one) for one in found]
        if all(isinstance(id, int | np.integer) for id in ids):
            return [int(id) for id in ids]
    raise UserError(
        f"cannot tell the questions of a batch of type {type(batch).__name__}: give their ids, as a tensor, a list, or "
        "under the key `id` of a dictionary"
    )


def compressor_input(mllm: FrozenMLLM, features: Sequence[Features]) -> CompressorInput:
    """Pad samples to equal lengths; a mask is None if nothing is padded, which makes attention faster."""
    visual, visual_mask = pad_right([f.visual for f in features])
    prompt, prompt_mask = pad_right([mllm.prompt_embeds(f) for f in features])
    return CompressorInput(
        visual.float(),
        None if bool(visual_mask.all()) else visual_mask,
        prompt.float(),
        None if bool(prompt_mask.all()) else prompt_mask,
    )


def has_label(record: Record) -> bool:
    """Whether a record can be trained on: it cannot if all proposals of the sample had the same loss."""
    return "draws" not in record or record["draws"].size > 0


def train_batch(mllm: FrozenMLLM, features: Sequence[Features], records: Sequence[Record], round: int) -> TrainBatch:
    """Join encoded samples with their label records of a round."""
    batch = TrainBatch([f.id for f in features], round, compressor_input(mllm, features), None)
    shape = batch.inputs.visual.shape[:2]
    if "draws" in records[0]:
        batch.populations = _populations(records)
        batch.budget = torch.tensor([float(record["draws"].shape[-1]) for record in records])
        return batch
    targets = torch.zeros(shape)
    for row, record in enumerate(records):
        if "credits" in record:
            targets[row, : len(record["credits"])] = torch.from_numpy(record["credits"].astype(np.float32))
        else:
            targets[row, torch.from_numpy(record["kept"].astype(np.int64))] = 1.0
    batch.targets = targets
    return batch


def _populations(records: Sequence[Record]) -> list[Population]:
    by_size: dict[int, list[int]] = {}
    for row, record in enumerate(records):
        by_size.setdefault(record["draws"].shape[-1], []).append(row)
    found = []
    for rows in by_size.values():
        stack = {
            name: torch.from_numpy(np.stack([records[row][name] for row in rows]))
            for name in ("draws", "advantages", "log_prob")
        }
        found.append(
            Population(
                torch.tensor(rows), stack["draws"].long(), stack["advantages"].float(), stack["log_prob"].float()
            )
        )
    return found


def _move(value: Any, device: torch.device) -> Any:
    """The same structure with its tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [_move(item, device) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{name: _move(getattr(value, name), device) for name in value.__dataclass_fields__})
    return value
