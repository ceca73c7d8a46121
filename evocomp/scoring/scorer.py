"""Scores candidate masks in batches that fit the memory, and counts forward passes and time."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from evocomp.config.schema import ScorerConfig
from evocomp.log import UserError
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring.answer_losses import AnswerLosses
from evocomp.scoring.gate import gate_gradient
from evocomp.scoring.memory import Room

Score = Callable[[slice, Tensor], Tensor]
"""(slice of the rows, those rows) -> their losses."""


class CandidateScorer:
    """Scores masks under the frozen MLLM. This takes more than 99 % of the compute of labelling.

    Args:
        mllm: the frozen model.
        batch: maximum number of sequences in one forward pass.
        dtype: dtype of the LLM while scoring; None: that of the model.
        settings: which optimizations to use.

    Attributes:
        forwards: (mask, question) pairs scored so far.
        seconds: wall time spent scoring.
    """

    def __init__(
        self, mllm: FrozenMLLM, batch: int = 64, dtype: str | None = None, settings: ScorerConfig | None = None
    ):
        self.mllm = mllm
        self.shard_group = mllm.shard_group
        self.settings = settings or ScorerConfig()
        if self.shard_group.size > 1:
            # these need more forward passes for some masks than for others, but all shards must run equally many
            self.settings = replace(self.settings, shared_prefix="never", prefix_reuse="never")
        self.losses = AnswerLosses(mllm, getattr(torch, dtype) if dtype else None, self.settings)
        self.batch = batch
        self.room = Room(mllm, self.losses.dtype.itemsize)
        self.room.budget = min(self.shard_group.gather(self.room.budget))
        self.forwards = 0
        self.seconds = 0.0
        self._after_batch: Callable[[], None] | None = None

    def __call__(self, features: Features, kept: np.ndarray, flips: bool = False, context: int = 0) -> np.ndarray:
        """Losses float32 [Q] of one sample's candidate masks.

        Args:
            features: the sample.
            kept: [Q, R] indices of the kept visual tokens, ascending.
            flips: the masks differ from one another in few tokens (a search that changes one token at a time).
            context: number of context tokens in addition to the kept tokens; see `evocomp.mllm.context`. Must be 0
                with `flips`.
        """
        reuse = self.settings.prefix_reuse
        flips = flips and (reuse == "always" or (reuse == "auto" and self._reuse_pays(self.mllm.device)))
        tokens, answers = self._length([features], kept)
        return self._in_parts(
            kept, lambda _, own: self.losses.candidates(features, own, flips, context), tokens + context, answers
        )

    def shared(self, features: Sequence[Features], kept: np.ndarray) -> np.ndarray:
        """Losses of the same masks for all questions about an image: kept [Q, R] -> losses float32 [J, Q]."""
        answers = sum(len(one.answer_ids) for one in features)
        end = features[0].picture_end
        tokens = end - len(features[0].visual) + kept.shape[-1] + answers
        tokens += sum(len(one.prompt_ids) - end for one in features)
        losses = self._in_parts(
            kept, lambda some, masks: self.losses.shared(features, masks), tokens, answers, questions=len(features)
        )
        return np.ascontiguousarray(losses.T)

    def each(self, features: Sequence[Features], kept: np.ndarray, context: int = 0) -> np.ndarray:
        """Losses float32 [B, K] of several samples, each with its own masks: kept [B, K, R].

        One forward pass takes as many samples as fit, so that small models and short sequences also use the device
        fully. `context`: number of context tokens in addition to the kept tokens.
        """
        masks = kept.shape[1]
        tokens, answers = self._length(features, kept)
        if self._at_once(tokens + context, answers) < masks:
            return np.stack([self(one, own, context=context) for one, own in zip(features, kept, strict=True)])
        return self._in_parts(
            kept,
            lambda some, own: self.losses.batch(features[some], own, context),
            tokens + context,
            answers,
            questions=masks,
            sequences=masks,
        )

    def gate_gradient(self, features: Features, gate: np.ndarray) -> np.ndarray:
        """Gradient float32 [N] of the answer loss with respect to gates [N]; see `evocomp.scoring.gate.gate_gradient`.

        Counted as three forward passes over all tokens, the approximate cost of a forward and a backward pass.
        """
        if self.shard_group.size > 1:
            raise UserError(
                "search.strategy=gradient_seeded does not support sharded models; set model.shard=1, or choose another "
                "strategy"
            )
        started = time.perf_counter()
        gradient = gate_gradient(self.mllm, features, torch.from_numpy(gate)).float().cpu().numpy()
        self.forwards += 3
        self.losses.sequences += 3
        self.losses.tokens += 3 * (len(features.prompt_ids) + len(features.answer_ids) - 1)
        self.seconds += time.perf_counter() - started
        return gradient

    def full(self, features: Features) -> float:
        """Answer loss with every visual token kept."""
        return float(self(features, np.arange(len(features.visual))[None])[0])

    @contextmanager
    def after_each_batch(self, call: Callable[[], None]) -> Iterator[None]:
        """Within the block, call `call` after each forward pass; an exception that it raises ends the scoring.

        Raises:
            RuntimeError: the scorer is already within such a block.
        """
        if self._after_batch is not None:
            raise RuntimeError("this scorer already calls something after each batch")
        self._after_batch = call
        try:
            yield
        finally:
            self._after_batch = None

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within the block, the counters of forwards, seconds, sequences and tokens do not change."""
        counts = (self.forwards, self.seconds, self.losses.sequences, self.losses.tokens)
        try:
            yield
        finally:
            self.forwards, self.seconds, self.losses.sequences, self.losses.tokens = counts

    def _batch_done(self) -> None:
        if self._after_batch is not None:
            self._after_batch()

    @staticmethod
    def _reuse_pays(device: torch.device) -> bool:
        """Whether caching the common prefix of masks that differ in one token saves time.

        It is 1.16x as fast on an H100, but 0.8x to 1.06x on CPUs, where attention over cached keys needs a mask and
        copies of the keys.
        """
        return device.type == "cuda"

    @staticmethod
    def _length(features: Sequence[Features], kept: np.ndarray) -> tuple[int, int]:
        """Number of tokens of the longest sequence, and of the longest answer."""
        answers = max(len(one.answer_ids) for one in features)
        text = max(len(one.prompt_ids) - len(one.visual) for one in features)
        return text + kept.shape[-1] + answers, answers

    def _at_once(self, tokens: int, answers: int) -> int:
        """Number of sequences in one forward pass."""
        if not self.settings.batched:
            return 1
        heads = answers if self.settings.answers_only else tokens
        return min(self.batch, self.room.sequences(tokens, heads)) if self.settings.fit_memory else self.batch

    def _in_parts(
        self,
        kept: np.ndarray,
        score: Score,
        tokens: int,
        answers: int,
        questions: int = 1,
        sequences: int = 1,
    ) -> np.ndarray:
        """Score in batches; each row expands to `sequences` sequences of `tokens` tokens, `answers` of them answers.

        Each row counts as `questions` forward passes.
        """
        started = time.perf_counter()
        indices = torch.from_numpy(np.ascontiguousarray(kept, dtype=np.int64)).to(self.mllm.device)
        if self.shard_group.size > 1:
            size = max(1, self._at_once(tokens, answers) // sequences)
            result = self._among_members(indices, score, size, questions)
        else:
            result = self._alone(indices, score, tokens, answers, sequences)
            self.forwards += len(kept) * questions
        self.seconds += time.perf_counter() - started
        return result

    def _alone(self, indices: Tensor, score: Score, tokens: int, answers: int, sequences: int) -> np.ndarray:
        """Score on one process; after an out-of-memory error, continue with half the batch size."""
        losses: list[Tensor] = []
        done = 0
        while done < len(indices):
            size = max(1, self._at_once(tokens, answers) // sequences)
            some = slice(done, min(done + size, len(indices)))
            try:
                losses.append(score(some, indices[some]))
            except torch.OutOfMemoryError:
                self.room.lower((some.stop - some.start) * sequences, tokens, answers)
                continue
            done = some.stop
            self._batch_done()
        return torch.cat(losses).float().cpu().numpy()

    def _among_members(self, indices: Tensor, score: Score, size: int, questions: int) -> np.ndarray:
        """Distribute the batches over the shard group; every member runs the same number of forward passes."""
        starts = range(0, len(indices), size)
        mine: dict[int, np.ndarray] = {}
        for turn in range(0, len(starts), self.shard_group.size):
            # every member must take part in gathering the weights, so one without a batch scores the last one again
            start = starts[min(turn + self.shard_group.member, len(starts) - 1)]
            some = slice(start, min(start + size, len(indices)))
            losses = score(some, indices[some]).float().cpu().numpy()
            if turn + self.shard_group.member < len(starts):
                mine[start] = losses
                self.forwards += len(losses) * questions
            self._batch_done()
        parts = {start: losses for part in self.shard_group.gather(mine) for start, losses in part.items()}
        return np.concatenate([parts[start] for start in starts])
