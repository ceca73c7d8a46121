"""The batch of a training step: encoded samples joined with their labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from evocomp.labels.records import Record
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


def train_batch(
    mllm: FrozenMLLM, features: Sequence[Features], records: Sequence[Record], round: int
) -> TrainBatch:
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
