"""Accuracy on the selection split at each number of kept tokens, measured during training."""

import functools
import time
from collections.abc import Callable, Sequence
from functools import partial

import lightning as L
import numpy as np
import torch
from torchmetrics import MeanMetric

from evocomp.compressor.keep import selected_count, shown_tokens
from evocomp.data.example import Example
from evocomp.data.scoring import score_answer
from evocomp.log import logger
from evocomp.mllm.context import Shown, shown
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.training.batch import compressor_input
from evocomp.training.module import CompressorModule
from evocomp.training.strategy import whole

Choose = Callable[[int], list[Shown]]
"""Maps a number of kept tokens to the visual part of the LLM input of each sample."""

Selection = Callable[[Sequence[Features]], Choose]


class SelectionAccuracy(L.Callback):
    """Measures the accuracy of the frozen MLLM on the selection split with the compressor's kept tokens.

    After every epoch, for each number of kept tokens R, answers are scored by the same rules as in the report. Logged
    as `accuracy/kept_R`; `accuracy/mean` is their mean.

    Args:
        every: epochs between measurements; the last epoch is always measured.
        max_new_tokens: largest number of tokens of an answer.

    Attributes:
        answered, seconds: number of answers that this process has generated, and the time that they took.
    """

    def __init__(
        self,
        mllm: FrozenMLLM,
        examples: Sequence[Example],
        kept: Sequence[int],
        batch: int,
        every: int = 1,
        max_new_tokens: int = 8,
    ):
        self.mllm = mllm
        self.examples = list(examples)
        self.kept = tuple(kept)
        self.batch = batch
        self.every = every
        self.max_new_tokens = max_new_tokens
        self.seconds = 0.0
        self.answered = 0

    def on_train_epoch_end(self, trainer: L.Trainer, module: CompressorModule) -> None:
        if not self.examples or not self.is_due(trainer):
            return
        shares = self.accuracy(partial(self.by_compressor, whole(module)), self.kept, module.device)
        for count, share in zip(self.kept, shares, strict=True):
            module.log(f"accuracy/kept_{count}", share, rank_zero_only=False, sync_dist=False)
        module.log("accuracy/mean", float(np.mean(shares)), prog_bar=True, sync_dist=False)
        listed = "  ".join(f"{count}: {share:.3f}" for count, share in zip(self.kept, shares, strict=True))
        logger.info("epoch %d  validation accuracy by kept tokens  %s", trainer.current_epoch + 1, listed)

    def accuracy(self, selection: Selection, kept: Sequence[int], device: torch.device) -> list[float]:
        """Share of correct answers at each count in `kept`, over the questions of all ranks.

        A collective operation: all ranks call it.

        Args:
            selection: chooses the tokens.
            device: device of the job's collective operations.
        """
        mine = self.mine
        started = time.perf_counter()
        right = self.right_answers(mine, selection, kept)
        self.seconds += time.perf_counter() - started
        self.answered += len(mine) * len(kept)
        shares = []
        for count in right:
            share = MeanMetric().set_dtype(torch.float64).to(device)
            share.update(count / max(1, len(mine)), weight=len(mine))
            shares.append(share.compute().item())
        return shares

    @functools.cached_property
    def mine(self) -> list[Example]:
        """This process's share of the questions, without those whose images cannot be decoded.

        Each rank (or each group of ranks that shares a sharded MLLM) takes every world-th question.
        """
        share = self.examples[self.mllm.shard_group.index :: self.mllm.shard_group.count]
        return [example for example, _ in self.mllm.readable(share)]

    def is_due(self, trainer: L.Trainer) -> bool:
        """Whether accuracy is measured at the end of the current epoch."""
        epochs = trainer.current_epoch + 1
        last = epochs == trainer.max_epochs or trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        return last or epochs % self.every == 0

    def right_answers(self, examples: Sequence[Example], selection: Selection, kept: Sequence[int]) -> list[float]:
        """Number of correct answers at each count in `kept`, with the tokens that `selection` chooses."""
        right = [0.0] * len(kept)
        for start in range(0, len(examples), self.batch):
            part = examples[start : start + self.batch]
            features = self.mllm.features(part)
            choose = selection(features)
            for place, count in enumerate(kept):
                prompts = [(one, *shown) for one, shown in zip(features, choose(count), strict=True)]
                answers, _ = self.mllm.answer(prompts, self.max_new_tokens)
                right[place] += sum(score_answer(e, a) for e, a in zip(part, answers, strict=True))
        return right

    def by_compressor(self, module: CompressorModule, features: Sequence[Features]) -> Choose:
        """Tokens chosen by the compressor; a `Selection` when the module is bound with `partial`."""
        inputs = compressor_input(self.mllm, features)
        any_count = None if module.compressor.config.budget_input else module.score(inputs)

        config = module.compressor.config

        def choose(count: int) -> list[Shown]:
            budgets = [float(selected_count(count, len(one.visual), config)) for one in features]
            scores = module.score(inputs, budgets) if any_count is None else any_count
            pairs = zip(scores, features, strict=True)
            return [shown_tokens(torch.from_numpy(row), one.visual, count, config, one.priority) for row, one in pairs]

        return choose


def at_random(features: Sequence[Features]) -> Choose:
    """Random tokens as a baseline, the same for a question in every run; smaller sets are subsets of larger ones."""
    orders = [torch.from_numpy(np.random.default_rng(one.id).permutation(len(one.visual))) for one in features]
    pairs = list(zip(features, orders, strict=True))
    return lambda count: [shown(one.visual, order[:count].to(one.visual.device), 0) for one, order in pairs]
