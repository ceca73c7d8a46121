"""Training questions as batches of ids; features and labels are joined in the main process."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from evocomp import distributed
from evocomp.data.example import Example
from evocomp.labels.records import Record
from evocomp.log import UserError
from evocomp.mllm.hf import FrozenMLLM
from evocomp.training.batch import train_batch
from evocomp.training.sampler import ResumableSampler, Slots, epoch_order

_NOT_RESUMED = {"epoch": -1, "consumed": 0, "batches": 0}


class LabelledQuestions(L.LightningDataModule):
    """Training data of a compressor. `RefreshLabels` sets the current labels with `use`.

    Args:
        mllm: encodes images; not a submodule of any LightningModule.
        examples: the training questions.
        batch_size: questions per step and process.
        samples_per_epoch: questions per epoch, over all processes.
        seed: seed of the order of the questions.
        workers: data loader processes; they only return indices.
    """

    def __init__(
        self,
        mllm: FrozenMLLM,
        examples: Sequence[Example],
        batch_size: int,
        samples_per_epoch: int,
        seed: int = 0,
        workers: int = 0,
    ):
        super().__init__()
        self.mllm = mllm
        self.examples = {example.id: example for example in examples}
        self.batch_size = batch_size
        self.slots = samples_per_epoch
        self.seed = seed
        self.workers = workers
        self.records: dict[int, Record] = {}
        self.round = -1
        self._sampler: ResumableSampler | None = None
        self._resume_at = 0
        self._base = dict(_NOT_RESUMED)
        self._epoch = 0
        self._order = None

    def use(self, round: int, records: dict[int, Record], epoch: int) -> None:
        """Set the labels of an epoch; samples without a record are skipped."""
        if not records:
            raise UserError(f"round {round} of the label store has no usable label; see the labelling log above")
        self.round, self.records, self._epoch = round, records, epoch
        self._order = epoch_order(list(records), self.seed, epoch, self.slots)

    def train_dataloader(self) -> DataLoader:
        self._sampler = ResumableSampler(self.slots, distributed.rank(), distributed.world_size())
        self._sampler.consumed, self._resume_at = self._resume_at, 0
        if len(self._sampler) < self.batch_size:
            raise UserError(
                f"{self.slots} training questions are too few for a batch of optim.batch_size={self.batch_size} on each"
                f" of {distributed.world_size()} processes; label more questions or lower the batch size"
            )
        return DataLoader(
            Slots(self.slots),
            batch_size=self.batch_size,
            sampler=self._sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            collate_fn=torch.tensor,
            drop_last=True,
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Replace indices into the order of the epoch by the samples and labels at these indices."""
        if not isinstance(batch, torch.Tensor):
            return batch
        ids = [int(self._order[position]) for position in batch.tolist()]
        features = self.mllm.features([self.examples[id] for id in ids])
        return train_batch(self.mllm, features, [self.records[id] for id in ids], self.round)

    def state_dict(self) -> dict[str, int]:
        """Position of the job within the epoch; Lightning saves it with every checkpoint."""
        # `processed`, not `completed`: a checkpoint at the end of a batch is written between the two updates
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        # batches counted before a resume may have been made by another number of processes
        counted, consumed = self._base["batches"], self._base["consumed"]
        if self._base["epoch"] != self._epoch or counted > batches:
            counted, consumed = 0, 0
        together = self.batch_size * distributed.world_size()
        consumed += (batches - counted) * together
        # trainer.limit_train_batches may end an epoch early
        ended = self.slots - consumed < together or batches >= self.trainer.num_training_batches
        return {"epoch": self._epoch, "consumed": 0 if ended else consumed, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume_at = state["consumed"]
        if self._sampler is not None:
            # sharded strategies restore the state after the loader was made (the schedule needs its length)
            self._sampler.consumed, self._resume_at = self._resume_at, 0
        self._base = state if state["consumed"] else dict(_NOT_RESUMED)
