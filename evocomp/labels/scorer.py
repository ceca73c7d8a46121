"""Candidate masks to losses, in pieces that fit the memory, with a count of what was spent."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.scoring import AnswerLosses


class CandidateScorer:
    """Scores masks under the frozen MLLM: where more than 99 % of all compute goes.

    Args:
        mllm: the frozen model.
        batch: sequences in one forward, at most.
        dtype: number format of the LLM while scoring, if not the model's own.

    Attributes:
        forwards: (mask, question) pairs scored so far.
        seconds: wall time spent scoring.
    """

    def __init__(self, mllm: FrozenMLLM, batch: int = 64, dtype: str | None = None):
        self.mllm = mllm
        self.losses = AnswerLosses(mllm, getattr(torch, dtype) if dtype else None)
        self.batch = batch
        self.forwards = 0
        self.seconds = 0.0
        self.on_batch: Callable[[], None] = lambda: None

    def __call__(self, features: Features, kept: np.ndarray) -> np.ndarray:
        """Candidates of one sample: kept token indices [Q, R], ascending -> losses float32 [Q]."""
        return self._in_parts(kept, lambda part: self.losses.candidates(features, part), pairs=1)

    def shared(self, features: Sequence[Features], kept: np.ndarray) -> np.ndarray:
        """The same masks for all questions about a picture: kept [Q, R] -> losses float32 [J, Q]."""
        losses = self._in_parts(kept, lambda part: self.losses.shared(features, part), pairs=len(features))
        return np.ascontiguousarray(losses.T)

    def each(self, features: Sequence[Features], kept: np.ndarray) -> np.ndarray:
        """Masks of several samples, each its own: kept [B, K, R] -> losses float32 [B, K]."""
        together = max(1, self.batch // kept.shape[1])
        parts = []
        for start in range(0, len(features), together):
            some = features[start : start + together]
            own = kept[start : start + together]
            score = partial(self.losses.batch, some)
            parts.append(self._in_parts(own, score, pairs=own.shape[1], size=len(own)))
        return np.concatenate(parts)

    def full(self, features: Features) -> float:
        """Answer loss with every visual token kept."""
        return float(self(features, np.arange(len(features.visual))[None])[0])

    def _in_parts(
        self, kept: np.ndarray, score: Callable[[Tensor], Tensor], pairs: int, size: int | None = None
    ) -> np.ndarray:
        started = time.perf_counter()
        indices = torch.from_numpy(np.ascontiguousarray(kept, dtype=np.int64)).to(self.mllm.device)
        losses = []
        for part in indices.split(size or self.batch):
            losses.append(score(part))
            self.on_batch()
        self.forwards += len(kept) * pairs
        result = torch.cat(losses).float().cpu().numpy()
        self.seconds += time.perf_counter() - started
        return result
