"""From examples to a complete round of the label store: resumable, the same bytes however it was run."""

import time
from collections.abc import Callable, Iterator, Sequence
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

Scores = Callable[[Sequence[Features], Sequence[float] | None], list[np.ndarray]]
"""The compressor's scores [N] of each sample, for budgets where it reads them, as plain arrays."""

Encode = Callable[[Sequence[int]], list[Features]]


class Rounds(Protocol):
    """One kind of label: what a round consists of, and how the records of one of its chunks are made."""

    def chunks(self, round: int, previous: dict[int, Record]) -> list[list[int]]:
        """Sample ids of each chunk; a pure function of its arguments and the settings."""
        ...

    def make(
        self,
        round: int,
        ids: Sequence[int],
        encode: Encode,
        previous: dict[int, Record],
        scores: Scores | None,
    ) -> Iterator[Record]:
        """Records of a chunk, one after another."""
        ...


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

    A round is a pure function of configuration, seed, examples, previous round and (where it starts from them) the
    compressor's scores. So neither the number of processes nor a crash changes a byte.

    Args:
        mllm: the frozen model.
        rounds: what kind of label to make.
        examples: what to label.
    """

    def __init__(
        self,
        mllm: FrozenMLLM,
        scorer: CandidateScorer,
        rounds: Rounds,
        store: LabelStore,
        examples: Sequence[Example],
    ):
        self.mllm = mllm
        self.scorer = scorer
        self.rounds = rounds
        self.store = store
        self.examples = {example.id: example for example in examples}
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
        chunks = self.rounds.chunks(round, previous)
        todo = self.store.missing(round, range(len(chunks)))
        todo.sort(key=lambda chunk: -self._cost(chunks[chunk]))
        todo = broadcast(todo)  # ranks look at different moments, but must count through one list
        progress = LabelProgress(round, sum(len(ids) for ids in chunks))
        progress.done = progress.total - sum(len(chunks[chunk]) for chunk in todo)
        queue = WorkQueue(f"{self.store.path}/{round}", lambda chunk: self.store.has(round, chunk))
        self.scorer.on_batch = queue.beat
        with StopRequest() as request:
            for chunk in queue(todo):
                records = self._make(
                    round, chunks[chunk], previous, scores, progress, report, lambda: stop() or request.asked
                )
                self.store.write(round, chunk, records)
        self.waited = queue.waited
        if rank() == 0:
            self.store.commit(round, range(len(chunks)))
        self._await_commit(round)

    def _make(self, round, ids, previous, scores, progress, report, stopped) -> list[Record]:
        started, before = time.perf_counter(), self.scorer.forwards
        records = []
        for record in self.rounds.make(round, ids, self._encode, previous, scores):
            if stopped():
                raise Interrupted("stopped in labelling; finished chunks are stored, the same command goes on")
            records.append(record)
            progress.done += 1
            progress.made += 1
            progress.seconds += time.perf_counter() - started
            progress.forwards += self.scorer.forwards - before
            progress.saved += int(record.get("saved", 0))
            progress.loss_sum += float(record.get("best_loss", np.nan))
            report(progress)
            started, before = time.perf_counter(), self.scorer.forwards
        return records

    def _encode(self, ids: Sequence[int]) -> list[Features]:
        return self.mllm.features([self.examples[id] for id in ids])

    def _cost(self, ids: Sequence[int]) -> int:
        """Longer prompts and answers cost more; their texts are known without the model."""
        examples = [self.examples[id] for id in ids]
        return sum(len(e.prompt) + len(e.answer) + sum(map(len, sum(e.history, ()))) for e in examples)

    def _await_commit(self, round: int, patience: float = 600.0) -> None:
        started = time.time()
        while not self.store.committed(round):
            if time.time() - started > patience:
                raise UserError(f"rank 0 has not committed round {round} for {patience:.0f} s; look at its log")
            time.sleep(0.05)


def cut(ids: Sequence[int], size: int) -> list[list[int]]:
    """Chunks of `size` ids, in order."""
    return [list(ids[i : i + size]) for i in range(0, len(ids), size)]
