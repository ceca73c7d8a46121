"""From examples to a complete round of the label store: resumable, the same bytes however it was run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evocomp.data.example import Example
from evocomp.distributed import StopRequest, WorkQueue, broadcast, rank
from evocomp.labels.records import Record
from evocomp.labels.scorer import CandidateScorer
from evocomp.labels.store import LabelStore
from evocomp.log import UserError
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM

Scores = Callable[[Sequence[Features]], list[np.ndarray]]
"""The compressor's scores [N] of each sample, as plain arrays."""


class Labels(Protocol):
    """One kind of label: how a sample's record is made in the first and in later rounds."""

    def first(self, features: Features) -> Record: ...

    def again(self, features: Features, round: int, previous: Record, scores: np.ndarray | None) -> Record: ...


@dataclass
class LabelProgress:
    """How far a round is, for bars and curves. Losses in nats, times in seconds."""

    round: int
    total: int
    done: int = 0
    made: int = 0  # in this run; the others were found in the store
    forwards: int = 0
    saved: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0

    @property
    def mean_best(self) -> float:
        return self.loss_sum / max(1, self.made)

    @property
    def labels_per_second(self) -> float:
        return self.made / max(1e-9, self.seconds)

    @property
    def forwards_per_second(self) -> float:
        return self.forwards / max(1e-9, self.seconds)

    @property
    def seconds_left(self) -> float:
        return (self.total - self.done) / max(1e-9, self.labels_per_second)

    def line(self) -> str:
        """One line for a log."""
        return (
            f"labels, round {self.round}: {self.done}/{self.total}  {self.labels_per_second:.1f} labels/s  "
            f"{self.forwards_per_second:.0f} forwards/s  {self.saved} forwards saved  "
            f"mean best loss {self.mean_best:.4f}  {self.seconds_left:.0f} s left"
        )


class Interrupted(UserError):
    """A stop was asked for; the store is clean and the same command goes on from here."""


class Labeller:
    """Fills rounds of a label store.

    A round is a pure function of configuration, seed, example and previous round; chunks are cut from the examples
    in their order. So neither the number of processes nor a crash changes a byte.

    Args:
        mllm: the frozen model.
        labels: what kind of label to make.
        examples: what to label, in order.
        chunk_size: samples in a chunk.
    """

    def __init__(
        self,
        mllm: FrozenMLLM,
        scorer: CandidateScorer,
        labels: Labels,
        store: LabelStore,
        examples: Sequence[Example],
        chunk_size: int,
    ):
        self.mllm = mllm
        self.scorer = scorer
        self.labels = labels
        self.store = store
        self.chunks = [examples[i : i + chunk_size] for i in range(0, len(examples), chunk_size)]
        self.waited = 0.0

    def ensure(
        self,
        round: int,
        scores: Scores | None = None,
        report: Callable[[LabelProgress], None] = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[int, Record]:
        """The records of `round` by sample id; made first if they are not there. Does nothing twice.

        Args:
            scores: the compressor, if later rounds are to start from its scores.
            report: called after each sample.
            stop: asked after each sample; the chunk in hand is given up, finished ones stay.

        Raises:
            Interrupted: `stop` said so, or SIGTERM came.
        """
        if not self.store.committed(round):
            previous = self.store.read(round - 1) if round else {}
            self._fill(round, previous, scores, report, stop)
        return self.store.read(round)

    def _fill(self, round, previous, scores, report, stop) -> None:
        everything = range(len(self.chunks))
        todo = self.store.missing(round, everything)
        todo.sort(key=lambda chunk: -self._cost(chunk))
        todo = broadcast(todo)  # ranks look at different moments, but must count through one list
        progress = LabelProgress(round, sum(len(chunk) for chunk in self.chunks))
        progress.done = progress.total - sum(len(self.chunks[chunk]) for chunk in todo)
        queue = WorkQueue(f"{self.store.path}/{round}", lambda chunk: self.store.has(round, chunk))
        self.scorer.on_batch = queue.beat
        with StopRequest() as request:
            for chunk in queue(todo):
                records = self._make(chunk, round, previous, scores, progress, report,
                                     lambda: stop() or request.asked)
                self.store.write(round, chunk, records)
        self.waited = queue.waited
        if rank() == 0:
            self.store.commit(round, everything)
        self._await_commit(round)

    def _make(self, chunk, round, previous, scores, progress, report, stopped) -> list[Record]:
        examples = self.chunks[chunk]
        encoded = self.mllm.features(examples)
        ranked = scores(encoded) if scores is not None and round else [None] * len(encoded)
        records = []
        for features, ranking in zip(encoded, ranked, strict=True):
            if stopped():
                raise Interrupted("stopped in labelling; finished chunks are stored, the same command goes on")
            started, before = time.perf_counter(), self.scorer.forwards
            if round == 0:
                record = self.labels.first(features)
            else:
                record = self.labels.again(features, round, previous[features.id], ranking)
            records.append(record)
            progress.done += 1
            progress.made += 1
            progress.seconds += time.perf_counter() - started
            progress.forwards += self.scorer.forwards - before
            progress.saved += int(record.get("saved", 0))
            progress.loss_sum += float(record.get("best_loss", np.nan))
            report(progress)
        return records

    def _cost(self, chunk: int) -> int:
        """Longer prompts and answers cost more; the words are known without the model."""
        return sum(len(e.prompt) + len(e.answer) + sum(map(len, sum(e.history, ()))) for e in self.chunks[chunk])

    def _await_commit(self, round: int, patience: float = 600.0) -> None:
        started = time.time()
        while not self.store.committed(round):
            if time.time() - started > patience:
                raise UserError(f"rank 0 has not committed round {round} for {patience:.0f} s; look at its log")
            time.sleep(0.05)
