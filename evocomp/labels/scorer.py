"""Losses of candidate masks under the frozen MLLM: where more than 99 % of all compute goes."""

import time
from collections.abc import Callable

import numpy as np
import torch

from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM


class CandidateScorer:
    """Scores candidates of one sample in batches of equal length, answer positions only.

    Args:
        mllm: the frozen model.
        batch: candidates in one forward, at most.

    Attributes:
        forwards: candidates scored so far.
        seconds: wall time spent on them.
    """

    def __init__(self, mllm: FrozenMLLM, batch: int = 64):
        self.mllm = mllm
        self.batch = batch
        self.forwards = 0
        self.seconds = 0.0
        self.on_batch: Callable[[], None] = lambda: None

    @torch.inference_mode()
    def __call__(self, features: Features, kept: np.ndarray) -> np.ndarray:
        """Mean answer loss [nats] of each mask: kept token indices [Q, R] -> float32 [Q]."""
        started = time.perf_counter()
        indices = torch.from_numpy(np.ascontiguousarray(kept, dtype=np.int64)).to(self.mllm.device)
        losses = []
        for part in indices.split(self.batch):
            losses.append(self.mllm.candidate_losses(features, part))
            self.on_batch()
        self.forwards += len(kept)
        result = torch.cat(losses).float().cpu().numpy()
        self.seconds += time.perf_counter() - started
        return result

    def full(self, features: Features) -> float:
        """Answer loss with every visual token kept."""
        return float(self(features, np.arange(len(features.visual))[None])[0])
