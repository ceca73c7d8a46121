"""From examples to a complete round of the label store: resumable, the same bytes however it was run."""

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
        """Records of a chunk, one after another; a pure function of its arguments and the settings."""
        ...

    def to_score(self, round: int, chunks: Sequence[Sequence[int]]) -> list[int]:
        """How many samples of each chunk take the model; the others are copied from the round before."""
        return [len(ids) for ids in chunks]


@dataclass
class LabelProgress:
    """How far a round is, for bars and curves. Losses in nats, times in seconds.

    total, done: questions to score, and those done by all processes; what is only copied from the round before is not
    counted.
    made, forwards, saved, loss_sum, seconds: of this process.
    """

    round: int
    total: int
    done: int = 0
    made: int = 0  # in this run; the others were found in the store
    forwards: int = 0
    saved: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    workers: int = 1  # that label side by side
    copying: bool = False  # the chunk in hand is copied

    @property
    def mean_best(self) -> float:
        return self.loss_sum / max(1, self.made)

    @property
    def labels_per_second(self) -> float:
        """Of all processes, if the others are as fast as this one."""
        return self.workers * self.made / max(1e-9, self.seconds)

    @property
    def forwards_per_second(self) -> float:
        return self.forwards / max(1e-9, self.seconds)

    @property
    def seconds_left(self) -> float:
        """Of this round."""
        return (self.total - self.done) / max(1e-9, self.labels_per_second)

    def line(self) -> str:
        """What is being done, for people."""
        what = f"refresh {self.round}" if self.round else "labels"
        speed = f", {self.labels_per_second:.1f} per second" if self.made else ""
        return f"{what}: {self.done}/{self.total} questions{speed}"


class Interrupted(UserError):
    """A stop was asked for; the store is clean and the same command goes on from here."""


class Labeller:
    """Fills rounds of a label store.

    A round is a pure function of configuration, seed, examples, previous round and (where it starts from them) the
    compressor's scores. So neither the number of processes nor a crash changes a byte.

    Args:
        mllm: the frozen model.
        rounds: what kind of label to make.
        store: where rounds go; None for one that only encodes and makes records.
        examples: what to label.
        refreshed: where rounds from 1 on go, if they depend on a run's compressor and `store` is shared by runs.
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
        """The records of `round` by sample id; made first if they are not there. Does nothing twice.

        Args:
            scores: the compressor, if later rounds are to start from its scores.
            report: called after each sample.

        Raises:
            Interrupted: SIGTERM came; the chunk in hand is given up, finished ones stay.
            UserError: the round before, from which this one is made, is not there and cannot be made again.
        """
        store = self.store_of(round)
        if not all(gather(self._is_complete(store, round))):  # a node's own disk may lack what another's holds
            before = self.store_of(round - 1)
            if round > 1 and not any(gather(before.committed(round - 1))):
                raise UserError(
                    f"round {round - 1} of label store {before.path} is gone or broken, and what it was made from is "
                    "no longer there: restore it, or begin anew in another --run_dir"
                )
            previous = before.read(round - 1) if round else {}
            self._fill(store, round, previous, scores, report)
        return store.read(round)

    def _is_complete(self, store: LabelStore, round: int) -> bool:
        """Whether the store's round is committed, and with as many chunks as it has."""
        if not store.committed(round):
            return False
        before = self.store_of(round - 1)
        if round and not before.committed(round - 1):
            return True  # what says how many it must have is gone
        expected = len(self.rounds.chunks(round, before.read(round - 1) if round else {}))
        listed = len(store.chunks(round))
        if listed < expected:
            logger.warning(
                "round %d of label store %s is committed with %d of %d chunks; the others are made now",
                round,
                store.path,
                listed,
                expected,
            )
        return listed >= expected

    def store_of(self, round: int) -> LabelStore:
        """Where a round lies."""
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
                # chunks are taken in order: those before this one are this process's or another's
                before = found + sum(to_score[other] for other in todo[: todo.index(chunk)])
                progress.done, progress.copying = max(progress.done, before), not to_score[chunk]
                records = self._make_readable(round, chunks[chunk], previous, scores, progress, report)
                check_finite(records)
                if self.mllm.shard_group.leads:
                    store.write(round, chunk, records)
        self.waited = queue.waited
        if not shared:
            _exchange(store, round, len(chunks))
        self._commit(store, round, len(chunks), queue, shared)

    def forget(self, rounds: Collection[int] | None = None) -> None:
        """Delete rounds from 1 on that are not needed any more, on every disk that holds them. All ranks call it.

        rounds: which; None: all, begun ones too.
        """
        store = self.store_of(1)
        shared = _is_shared(store)
        if rank() == 0 or (not shared and local_rank() == 0):
            for round in store.begun():
                if round and (rounds is None or round in rounds):
                    store.remove(round)
        gather(None)  # nobody looks into a store that is being emptied

    def _look(self, queue: WorkQueue, request: StopRequest) -> None:
        """Report progress to the queue, and stop if any process of the shard group was asked to."""
        queue.beat()
        if any(self.mllm.shard_group.gather(request.asked)):
            raise Interrupted("stopped in labelling; finished chunks are stored, the same command goes on")

    def _commit(self, store: LabelStore, round: int, count: int, queue: WorkQueue, shared: bool) -> None:
        """Rank 0 declares the round complete; each node does where stores are not shared."""
        if rank() == 0 or (not shared and local_rank() == 0):
            # listings of a network file system may be a minute old
            until = time.monotonic() + 90.0
            while store.missing(round, range(count)) and time.monotonic() < until:
                time.sleep(1.0)
            store.commit(round, range(count))
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
        """The records of a chunk, without those of questions whose images do not decode.

        A chunk's images are all read before anything is scored, so beginning again costs little; and what is broken is
        so for every process, so the chunk's bytes stay those that any other would make.
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
        """Those whose images decode; at least one less."""
        kept = [example.id for example, _ in self.mllm.readable(self.examples[id] for id in ids)]
        if len(kept) == len(ids):
            raise UserError("an image decoded at one time and not at another: the disk or the network is failing")
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
        """Features of samples by id."""
        return self.mllm.features([self.examples[id] for id in ids])

    def _cost(self, ids: Sequence[int]) -> int:
        """Longer prompts and answers cost more; their texts are known without the model."""
        examples = [self.examples[id] for id in ids]
        return sum(len(e.prompt) + len(e.answer) + sum(map(len, sum(e.history, ()))) for e in examples)


def _is_shared(store: LabelStore) -> bool:
    """Whether all ranks see one and the same store."""
    return len(set(gather(store.identity()))) == 1


def _exchange(store: LabelStore, round: int, count: int) -> None:
    """Without a shared file system: every store gets the chunks that it lacks from a rank that has them."""
    stored = [set(chunks) for chunks in gather(store.stored(round))]
    for chunk in range(count):
        owners = [other for other, chunks in enumerate(stored) if chunk in chunks]
        if len(owners) < len(stored):
            content = store.content(round, chunk) if rank() == owners[0] else None
            store.put(round, chunk, broadcast(content, owners[0]))


def cut(ids: Sequence[int], size: int) -> list[list[int]]:
    """Chunks of `size` ids, in order."""
    return [list(ids[i : i + size]) for i in range(0, len(ids), size)]
