"""Fills rounds of the label store from examples: resumable, with bytes that do not depend on ranks or interruptions."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from evocomp.data.example import Example
from evocomp.data.images import BrokenImage
from evocomp.distributed import StopRequest, WorkQueue, broadcast, gather, local_rank, rank
from evocomp.labels.records import Record, check_finite
from evocomp.labels.store import LabelStore
from evocomp.log import UserError, logger
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring.scorer import CandidateScorer

Scores = Callable[[Sequence[Features], Sequence[float] | None], list[np.ndarray]]
"""(features, token budgets or None) -> the compressor's scores [N] of each sample as numpy arrays."""

Encode = Callable[[Sequence[int]], list[Features]]


class Rounds(Protocol):
    """A kind of label: divides a round into chunks, and makes the records of a chunk."""

    def chunks(self, round: int, previous: dict[int, Record]) -> list[list[int]]:
        """Sample ids of each chunk. A pure function of the arguments and the settings."""
        ...

    def make(
        self,
        round: int,
        ids: Sequence[int],
        encode: Encode,
        previous: dict[int, Record],
        scores: Scores | None,
    ) -> Iterator[Record]:
        """Yield the records of a chunk. A pure function of the arguments and the settings."""
        ...

    def to_score(self, round: int, chunks: Sequence[Sequence[int]]) -> list[int]:
        """Number of samples of each chunk that the model scores; the others are copied from the previous round."""
        return [len(ids) for ids in chunks]


@dataclass
class LabelProgress:
    """Progress of a round. Losses in nats, times in seconds.

    total, done: number of questions to score, and of those finished by all processes. Records copied from the previous
    round are not counted.
    made, forwards, saved, loss_sum, seconds: counts of this process.
    """

    round: int
    total: int
    done: int = 0
    made: int = 0  # in this run, without those that the store already had
    forwards: int = 0
    saved: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    workers: int = 1  # processes or shard groups that label in parallel
    copying: bool = False  # whether the current chunk is copied from the previous round

    @property
    def mean_best(self) -> float:
        return self.loss_sum / max(1, self.made)

    @property
    def labels_per_second(self) -> float:
        """Rate of all processes, assuming that they are as fast as this one."""
        return self.workers * self.made / max(1e-9, self.seconds)

    @property
    def forwards_per_second(self) -> float:
        return self.forwards / max(1e-9, self.seconds)

    @property
    def seconds_left(self) -> float:
        """Estimated remaining time of this round."""
        return (self.total - self.done) / max(1e-9, self.labels_per_second)

    def line(self) -> str:
        """The progress as one line of text."""
        what = f"refresh {self.round}" if self.round else "labels"
        speed = f", {self.labels_per_second:.1f} per second" if self.made else ""
        return f"{what}: {self.done}/{self.total} questions{speed}"


class Interrupted(UserError):
    """Labelling was stopped on request. The store is consistent; the same command resumes it."""


class Labeller:
    """Fills rounds of a label store.

    A round is a pure function of configuration, seed, examples, previous round and, for some kinds of label, the
    compressor's scores. Its bytes therefore depend neither on the number of processes nor on crashes.

    Args:
        mllm: the frozen model.
        scorer: computes losses of masks.
        rounds: the kind of label.
        store: store of the rounds; None for a labeller that only encodes examples and makes records.
        examples: the training examples.
        refreshed: store of rounds from 1 on, if they depend on a run's compressor and runs share `store`.
    """

    def __init__(
        self,
        mllm: FrozenMLLM,
        scorer: CandidateScorer,
        rounds: Rounds,
        store: LabelStore | None,
        examples: Sequence[Example],
        refreshed: LabelStore | None = None,
    ):
        self.mllm = mllm
        self.scorer = scorer
        self.rounds = rounds
        self.store = store
        self.refreshed = refreshed
        self.examples = {example.id: example for example in examples}
        self.waited = 0.0

    def ensure(
        self,
        round: int,
        scores: Scores | None = None,
        report: Callable[[LabelProgress], None] = lambda progress: None,
    ) -> dict[int, Record]:
        """Return the records of `round` by sample id, after making those that are missing from the store.

        Args:
            round: number of the round.
            scores: computes the compressor's scores, for rounds that depend on them.
            report: called after each sample.

        Raises:
            Interrupted: SIGTERM was received. The current chunk is discarded, finished chunks are kept.
            UserError: the previous round, from which this one is made, is missing and cannot be made again.
        """
        store = self.store_of(round)
        if not all(gather(self._is_complete(store, round))):  # nodes may have separate disks
            before = self.store_of(round - 1)
            if round > 1 and not any(gather(before.committed(round - 1))):
                raise UserError(
                    f"round {round - 1} of label store {before.path} is missing or corrupt and its inputs were "
                    "deleted; restore it, or start a new --run_dir"
                )
            previous = before.read(round - 1) if round else {}
            self._fill(store, round, previous, scores, report)
        records = store.read(round)
        if unknown := records.keys() - self.examples.keys():
            raise UserError(
                f"round {round} of label store {store.path} has labels of samples that are not in the data (first "
                f"{min(unknown)}); delete that round and run the labelling again"
            )
        return records

    def _is_complete(self, store: LabelStore, round: int) -> bool:
        """Whether the store's round is committed with all its chunks."""
        if not store.committed(round):
            return False
        before = self.store_of(round - 1)
        if round and not before.committed(round - 1):
            return True  # the previous round, which determines the number of chunks, is deleted
        expected = len(self.rounds.chunks(round, before.read(round - 1) if round else {}))
        listed = len(store.chunks(round))
        if listed > expected:
            raise UserError(
                f"round {round} of label store {store.path} is committed with {listed} chunks and must have "
                f"{expected}; delete that round and run the labelling again"
            )
        if listed < expected:
            logger.warning(
                "round %d of label store %s is committed with %d of %d chunks; making the others now",
                round,
                store.path,
                listed,
                expected,
            )
        return listed == expected

    def store_of(self, round: int) -> LabelStore:
        """The store that holds a round."""
        store = self.store if round <= 0 or self.refreshed is None else self.refreshed
        assert store is not None, "this labeller only encodes and makes records"
        return store

    def _fill(
        self,
        store: LabelStore,
        round: int,
        previous: dict[int, Record],
        scores: Scores | None,
        report: Callable[[LabelProgress], None],
    ) -> None:
        chunks = self.rounds.chunks(round, previous)
        stored = set().union(*gather(store.stored(round)))
        todo = [chunk for chunk in range(len(chunks)) if chunk not in stored]
        todo.sort(key=lambda chunk: -self._cost(chunks[chunk]))
        shared = _is_shared(store)
        to_score = self.rounds.to_score(round, chunks)
        progress = LabelProgress(round, sum(to_score), workers=self.mllm.shard_group.count)
        found = progress.done = progress.total - sum(to_score[chunk] for chunk in todo)
        queue = WorkQueue(f"round-{round}", lambda chunk: store.has(round, chunk), self.mllm.shard_group)
        with StopRequest() as request, self.scorer.after_each_batch(lambda: self._look(queue, request)):
            for chunk in queue(todo):
                # chunks are taken in order, so this or another process has taken those before this one
                before = found + sum(to_score[other] for other in todo[: todo.index(chunk)])
                progress.done, progress.copying = max(progress.done, before), not to_score[chunk]
                total = progress.total
                records = self._make_readable(round, chunks[chunk], previous, scores, progress, report)
                to_score[chunk] -= total - progress.total  # questions whose images do not decode
                check_finite(records)
                if self.mllm.shard_group.leads:
                    store.write(round, chunk, records)
        self.waited = queue.waited
        if not shared:
            _exchange(store, round, len(chunks))
        self._commit(store, round, chunks, queue, shared)

    def forget(self, rounds: Collection[int] | None = None) -> None:
        """Delete rounds from 1 on that are no longer needed, on every disk that holds them. All ranks must call it.

        rounds: the rounds to delete; None: all, including incomplete ones.
        """
        store = self.store_of(1)
        shared = _is_shared(store)
        if rank() == 0 or (not shared and local_rank() == 0):
            for round in store.begun():
                if round and (rounds is None or round in rounds):
                    store.remove(round)
        gather(None)  # no rank reads the store while it is being deleted

    def _look(self, queue: WorkQueue, request: StopRequest) -> None:
        """Send a heartbeat to the queue, and stop if any process of the shard group was asked to stop."""
        queue.beat()
        if any(self.mllm.shard_group.gather(request.asked)):
            raise Interrupted("stopped during labelling; finished chunks are stored, run the same command to resume")

    def _commit(
        self, store: LabelStore, round: int, chunks: Sequence[Sequence[int]], queue: WorkQueue, shared: bool
    ) -> None:
        """Rank 0 declares the round complete; each node does where stores are not shared."""
        count = len(chunks)
        if rank() == 0 or (not shared and local_rank() == 0):
            # directory listings of a network file system may be up to a minute old
            until = time.monotonic() + 90.0
            while store.missing(round, range(count)) and time.monotonic() < until:
                time.sleep(1.0)
            store.commit(round, range(count), chunks)
        queue.wait_for(lambda: store.committed(round))

    def _make_readable(
        self,
        round: int,
        ids: Sequence[int],
        previous: dict[int, Record],
        scores: Scores | None,
        progress: LabelProgress,
        report: Callable[[LabelProgress], None],
    ) -> list[Record]:
        """The records of a chunk, without questions whose image cannot be decoded.

        All images of a chunk are read before anything is scored, so starting the chunk again costs little. An image is
        broken for every process, so the chunk's bytes do not depend on which process makes it.
        """
        while True:
            before = replace(progress)
            try:
                return self._make(round, ids, previous, scores, progress, report)
            except BrokenImage:
                kept = self._readable(ids)
                vars(progress).update(vars(before))
                progress.total -= len(ids) - len(kept)
                ids = kept

    def _readable(self, ids: Sequence[int]) -> list[int]:
        """The ids whose image can be decoded. Raises UserError if that is true of all of them."""
        kept = [example.id for example, _ in self.mllm.readable(self.examples[id] for id in ids)]
        if len(kept) == len(ids):
            raise UserError(
                "an image could not be decoded at first and then could; check the disk or network that holds the images"
            )
        return kept

    def _make(
        self,
        round: int,
        ids: Sequence[int],
        previous: dict[int, Record],
        scores: Scores | None,
        progress: LabelProgress,
        report: Callable[[LabelProgress], None],
    ) -> list[Record]:
        started, before = time.perf_counter(), self.scorer.forwards
        records = []
        for record in self.rounds.make(round, ids, self.encode, previous, scores):
            records.append(record)
            if progress.copying:
                continue
            progress.done += 1
            progress.made += 1
            progress.seconds += time.perf_counter() - started
            progress.forwards += self.scorer.forwards - before
            progress.saved += int(record.get("saved", 0))
            progress.loss_sum += float(record.get("best_loss", np.nan))
            report(progress)
            started, before = time.perf_counter(), self.scorer.forwards
        return records

    def encode(self, ids: Sequence[int]) -> list[Features]:
        """Features of the samples with these ids."""
        return self.mllm.features([self.examples[id] for id in ids])

    def _cost(self, ids: Sequence[int]) -> int:
        """Relative cost of a chunk: the number of characters of its prompts and answers."""
        examples = [self.examples[id] for id in ids]
        return sum(len(e.prompt) + len(e.answer) + sum(map(len, sum(e.history, ()))) for e in examples)


def _is_shared(store: LabelStore) -> bool:
    """Whether all ranks use the same store on a shared file system."""
    return len(set(gather(store.identity()))) == 1


def _exchange(store: LabelStore, round: int, count: int) -> None:
    """Without a shared file system: copy to every store the chunks that it lacks, from a rank that has them."""
    stored = [set(chunks) for chunks in gather(store.stored(round))]
    for chunk in range(count):
        owners = [other for other, chunks in enumerate(stored) if chunk in chunks]
        if len(owners) < len(stored):
            content = store.content(round, chunk) if rank() == owners[0] else None
            store.put(round, chunk, broadcast(content, owners[0]))


def cut(ids: Sequence[int], size: int) -> list[list[int]]:
    """Split ids into chunks of `size`, in order."""
    return [list(ids[i : i + size]) for i in range(0, len(ids), size)]
