"""What one training step sees: encoded samples joined with their labels."""

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
    """What the compressor reads of B samples: visual [B, N, D], prompt [B, T, D], and which entries are real."""

    visual: Tensor
    visual_mask: Tensor | None
    prompt: Tensor
    prompt_mask: Tensor | None


@dataclass
class Population:
    """Masks that an earlier compressor proposed for some rows of the batch, all of size r.

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
        inputs: what the compressor reads.
        targets: [B, N] in {0, 1} (hard labels) or credits; None if there are populations.
        populations: proposed masks, by size.
        budget: [B] tokens that the masks keep; None if the labels are for all sizes.
    """

    ids: list[int]
    round: int
    inputs: CompressorInput
    targets: Tensor | None
    populations: list[Population] = field(default_factory=list)
    budget: Tensor | None = None


def compressor_input(mllm: FrozenMLLM, features: Sequence[Features]) -> CompressorInput:
    """Pad samples of unequal size; masks are None where nothing is padded (faster attention)."""
    visual, visual_mask = pad_right([f.visual for f in features])
    prompt, prompt_mask = pad_right([mllm.prompt_embeds(f) for f in features])
    return CompressorInput(
        visual.float(),
        None if bool(visual_mask.all()) else visual_mask,
        prompt.float(),
        None if bool(prompt_mask.all()) else prompt_mask,
    )


def has_label(record: Record) -> bool:
    """Whether there is something to learn from: samples whose proposals were all alike have nothing."""
    return "draws" not in record or record["draws"].size > 0


def train_batch(
    mllm: FrozenMLLM, features: Sequence[Features], records: Sequence[Record], round: int
) -> TrainBatch:
    """Join encoded samples with their records of a round."""
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
