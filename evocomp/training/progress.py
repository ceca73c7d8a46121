"""Progress of a run: labels, refreshes, training, validation and evaluation, with the total time left."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np

from evocomp.config.schema import RunConfig
from evocomp.data.example import Example
from evocomp.labels.estimate import candidate_forwards
from evocomp.labels.labeller import LabelProgress
from evocomp.labels.random_credit import mask_sizes
from evocomp.log import in_words, logger
from evocomp.progress import Progress, Stage
from evocomp.scoring.scorer import CandidateScorer
from evocomp.training.module import CompressorModule
from evocomp.training.monitors import SelectionAccuracy

UNKNOWN_SPEED = 1e10
"""Speed [FLOP/s] that is assumed until some work has been timed."""

AT_ONCE_SECONDS = 0.01
"""Records that arrive within a shorter time than this were scored in one batch."""


class Settled:
    """Progress of a round without the questions of the current batch, whose time is only known when it ends.

    The questions of a chunk may be scored in one batch: its first record then arrives after the time of the whole
    batch, and the others arrive immediately after it.
    """

    def __init__(self):
        self.last = self._settled = LabelProgress(round=0, total=0)

    @property
    def round(self) -> int:
        """The round of the last state, or -1."""
        return self.last.round if self.last.total else -1

    def without_the_last(self, state: LabelProgress) -> LabelProgress:
        """Progress up to the start of the current batch; up to the end if the round is complete."""
        if state.round != self.round:
            self.last = replace(state, done=state.done - 1, made=0, seconds=0.0)
            self._settled = self.last
        if state.seconds - self.last.seconds > AT_ONCE_SECONDS:
            self._settled = self.last
        self.last = replace(state)
        if state.done == state.total:
            self._settled = self.last
        return self._settled


class RunProgress(L.Callback):
    """Shows the progress of a run from the first label to the last training step, with the time left.

    The duration of work that has not been timed yet is estimated from its FLOP count and the speed of labelling; the
    duration of the evaluation is estimated from validation.

    Args:
        scorer: scorer of the candidate masks; it counts the tokens that the frozen LLM has processed.
        questions: questions of the training split.
        monitor: measures accuracy during training; the time of its answers predicts the time of the evaluation.
        answers: number of (question, selector) pairs of the evaluation that follows; 0 = none follows.

    It must come after the callbacks that it times in the list of callbacks.
    """

    def __init__(
        self,
        config: RunConfig,
        scorer: CandidateScorer,
        questions: Sequence[Example],
        monitor: SelectionAccuracy,
        answers: int = 0,
    ):
        self.config = config
        self.scorer = scorer
        self.questions = questions
        self.monitor = monitor
        labelled = config.labels.labelled_at_first(len(questions))
        self.stages = {
            "labels": Stage(total=labelled),
            "refresh": Stage(),
            "training": Stage(),
            "validation": Stage(),
            "evaluation": Stage(total=answers),
        }
        self.progress = Progress(**self.stages)
        self._trainer: L.Trainer | None = None
        self._flops: dict[str, float] = {}  # FLOP per unit of each stage
        self._epochs = 0
        self._tokens_before = 0
        self._labels = Settled()
        self._before_round = (0.0, 0.0)
        self._mark = 0.0

    # ------------------------------------------------------------ what there is to do

    def on_fit_start(self, trainer: L.Trainer, module: CompressorModule) -> None:
        self._trainer = trainer
        self._tokens_before = self.scorer.losses.tokens
        self._flops = self._arithmetic(sum(p.numel() for p in module.compressor.parameters()))
        self._guess(UNKNOWN_SPEED)

    def _plan(self) -> None:
        """Set the totals, which Lightning knows once training is set up, and the work done before a resume."""
        if self._epochs or self._trainer is None:
            return
        trainer, labels = self._trainer, self.config.labels
        batches = int(trainer.num_training_batches)
        total = trainer.max_epochs * batches
        if trainer.max_steps > 0:
            total = min(total, trainer.max_steps * trainer.accumulate_grad_batches)
        self._epochs = -(-total // batches)
        steps = min(total, trainer.global_step * trainer.accumulate_grad_batches)
        self.stages["training"].total, self.stages["training"].done = total, steps
        for epochs, field in ((range(self._epochs), "total"), (range(trainer.current_epoch), "done")):
            rounds = {labels.round_of(epoch) for epoch in epochs} - {0}
            setattr(self.stages["refresh"], field, len(rounds) * self._questions_of_a_refresh())
            setattr(self.stages["validation"], field, sum(map(self._is_measured, epochs)))
        if trainer.global_step:
            self.stages["labels"].done = self.stages["labels"].total

    def _questions_of_a_refresh(self) -> int:
        labels = self.config.labels
        if labels.refresh == "on_policy":
            return min(len(self.questions), labels.samples_per_refresh)
        return labels.labelled_at_first(len(self.questions))

    def _is_measured(self, epoch: int) -> bool:
        due = epoch + 1 == self._epochs or not (epoch + 1) % self.config.eval.monitor_every
        return bool(self.monitor.examples) and due

    def _arithmetic(self, weights: int) -> dict[str, float]:
        """FLOP per unit of each stage: 2 per weight and token for a forward pass, 6 with the backward pass.

        Args:
            weights: number of weights of the compressor.
        """
        labels, mllm = self.config.labels, self.scorer.mllm
        sample = mllm.features(self.questions[:1])[0]
        tokens, text = len(sample.visual), len(sample.text_at) + len(sample.answer_ids)
        layers = 2.0 * sum(p.numel() for p in mllm.decoder.layers.parameters())
        compressor = 2.0 * weights * (tokens + text)
        kept, proposed = np.mean(self.config.eval.kept), np.mean(mask_sizes(labels.proposal_sizes, tokens))
        masks = float(candidate_forwards(self.config, 1))
        if labels.refresh == "on_policy" and labels.probes:  # some questions are dropped after `probes` masks
            masks = (labels.probes + labels.proposals) / 2
        answer = layers * (text + kept)
        return {
            "labels": candidate_forwards(self.config) * answer,
            "refresh": masks * layers * (text + proposed),
            "training": 3 * compressor * self.config.optim.batch_size,
            "validation": len(self.monitor.examples) * len(self.config.eval.kept) * (answer + compressor),
            "evaluation": answer,
        }

    def _guess(self, speed: float, workers: int = 1) -> None:
        """Set the expected seconds per unit of each stage. speed: FLOP/s of one process."""
        for name, flops in self._flops.items():
            shared = workers if name in ("labels", "refresh", "validation") else 1
            self.stages[name].guess = flops / speed / shared

    # ------------------------------------------------------------ what is being done

    def label(self, state: LabelProgress) -> None:
        """Update the progress; called after each labelled question."""
        self._plan()
        if state.round == 0:
            spent = self._layers() * (self.scorer.losses.tokens - self._tokens_before)
            self._guess(max(1.0, spent) / max(1e-9, state.seconds), state.workers)
        if state.round != self._labels.round:
            self._book(self._labels.last)  # the end of the previous round
            stage = self.stages["refresh" if state.round else "labels"]
            self._before_round = (stage.timed, stage.seconds)
        settled = self._labels.without_the_last(state)
        self._book(settled)
        if state.round == 0 and state.done == state.total:
            logger.info("labels: %d questions in %s", state.total, in_words(state.seconds))
        number = f" of {self.config.labels.round_of(self._epochs - 1)}:" if state.round else ":"
        self.progress.show(settled.line().replace(":", number, 1))

    def _book(self, state: LabelProgress) -> None:
        """Copy the progress of a round into its stage."""
        stage = self.stages["refresh" if state.round else "labels"]
        stage.done = max(0, state.round - 1) * state.total + state.done
        stage.timed = self._before_round[0] + state.workers * state.made
        stage.seconds = self._before_round[1] + state.seconds

    def _layers(self) -> float:
        return 2.0 * sum(p.numel() for p in self.scorer.mllm.decoder.layers.parameters())

    def on_train_batch_start(self, trainer: L.Trainer, module: CompressorModule, batch: Any, batch_idx: int) -> None:
        self._plan()
        if batch_idx == 0 or not self._mark:
            self._mark = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: CompressorModule, outputs, batch, batch_idx) -> None:
        training = self.stages["training"]
        training.advance(1, self._lap())
        if not self.stages["labels"].timed and not self.stages["refresh"].timed:  # all labels were read from the store
            self._guess(self._flops["training"] * training.timed / training.seconds)
        loss = trainer.callback_metrics.get("train/loss")
        shown = f", loss {float(loss):.3f}" if loss is not None else ""
        self.progress.show(f"training: epoch {trainer.current_epoch + 1} of {self._epochs}{shown}")

    def on_train_epoch_end(self, trainer: L.Trainer, module: CompressorModule) -> None:
        seconds, validation = self._lap(), self.stages["validation"]
        if self._is_measured(trainer.current_epoch):
            validation.advance(1, seconds)
            self.stages["evaluation"].guess = self.monitor.seconds / max(1, self.monitor.answered)

    def on_train_end(self, trainer: L.Trainer, module: CompressorModule) -> None:
        self.progress.close()

    def on_exception(self, trainer: L.Trainer, module: CompressorModule, exception: BaseException) -> None:
        self.progress.close()

    def _lap(self) -> float:
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before


def report_labels(progress: Progress) -> Callable[[LabelProgress], None]:
    """Function that shows the progress of labelling when no training follows; its stage is `labels`."""

    stage, labels = progress.stages["labels"], Settled()

    def report(state: LabelProgress) -> None:
        settled = labels.without_the_last(state)
        stage.total, stage.done = settled.total, settled.done
        stage.timed, stage.seconds = settled.workers * settled.made, settled.seconds
        progress.show(settled.line())

    return report
