"""What is watched while a compressor trains: accuracy on the selection split at each kept count."""

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
"""Kept count -> what the LLM reads of the pictures of some samples."""

Selection = Callable[[Sequence[Features]], Choose]


class SelectionAccuracy(L.Callback):
    """After every epoch: share of the selection questions that the frozen MLLM answers rightly when it sees the
    compressor's top r tokens, for each r, by the questions' own rules of scoring as in the report. Logged as
    `accuracy/kept_R`; `accuracy/mean` is their mean.

    Args:
        every: epochs between measurements; the last epoch is always measured, whatever ends the run.
        max_new_tokens: longest answer.

    Attributes:
        answered, seconds: answers that this process has asked for, and the time that they took.
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
        """Share of right answers at each of the counts `kept`, over the questions of all ranks, which call it together.

        Args:
            selection: what chooses the tokens.
            device: where collectives of this job work.
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
        """This process's share of the questions, without those whose images do not decode.

        Ranks (or those that hold the MLLM together) take every world-th question and sum up.
        """
        share = self.examples[self.mllm.shard_group.index :: self.mllm.shard_group.count]
        return [example for example, _ in self.mllm.readable(share)]

    def is_due(self, trainer: L.Trainer) -> bool:
        """Whether the epoch that now ends is one to measure after."""
        epochs = trainer.current_epoch + 1
        last = epochs == trainer.max_epochs or trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        return last or epochs % self.every == 0

    def right_answers(self, examples: Sequence[Example], selection: Selection, kept: Sequence[int]) -> list[float]:
        """Right answers at each of the counts `kept`, with the tokens that `selection` chooses."""
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
        """The compressor's choice, as a `Selection` once the module is bound."""
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
    """The floor: tokens drawn evenly, the same for a question in every run; smaller sets lie in larger ones."""
    orders = [torch.from_numpy(np.random.default_rng(one.id).permutation(len(one.visual))) for one in features]
    pairs = list(zip(features, orders, strict=True))
    return lambda count: [shown(one.visual, order[:count].to(one.visual.device), 0) for one, order in pairs]
