"""The LightningModule of the compressor: a loss on stored label records. It does not contain the MLLM."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from evocomp.compressor.config import EvoCompConfig
from evocomp.compressor.lora import add_lora
from evocomp.compressor.model import EvoCompCompressor
from evocomp.config.schema import LossConfig, OptimConfig
from evocomp.log import UserError
from evocomp.losses import build_loss, policy_loss
from evocomp.mllm.weights import has_finite_weights
from evocomp.training.batch import CompressorInput, TrainBatch, question_ids
from evocomp.training.optim import build_optimizer, schedule
from evocomp.training.strategy import shard

NEUTRAL_BUDGET = 16.0  # the budget for which the compressor's budget input is zero


class CompressorModule(L.LightningModule):
    """Trains a compressor on hard masks, credits, or populations with advantages.

    A batch is a `TrainBatch`, or anything that `question_ids` understands if `RefreshLabels` is among the callbacks.

    Args:
        compressor: the model to train, or its configuration for a new one. Checkpoints hold no other weights.
        loss, optim: settings, also as dictionaries.
        refresh_start: first epoch with refreshed labels, for `optim.refresh_lr`; 0: labels are not refreshed.
        lora: `{"r": rank, "alpha": scale}` for a `compressor` given as a configuration; a model has its own.

    Attributes:
        batch_of: makes a batch of question ids [B], without those that have no label; set by `RefreshLabels`.

    `load_from_checkpoint(path)` needs no other argument: the hyperparameters are stored as plain types.
    """

    def __init__(
        self,
        compressor: EvoCompCompressor | EvoCompConfig | Mapping[str, Any],
        loss: LossConfig | Mapping[str, Any] | None = None,
        optim: OptimConfig | Mapping[str, Any] | None = None,
        refresh_start: int = 0,
        lora: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        loss = loss if isinstance(loss, LossConfig) else LossConfig(**(loss or {}))
        optim = optim if isinstance(optim, OptimConfig) else OptimConfig(**(optim or {}))
        self.refresh_start = refresh_start
        self.compressor = compressor if isinstance(compressor, nn.Module) else _new_compressor(compressor, lora)
        self.loss_config = loss
        self.optim_config = optim
        self.batch_of: Callable[[list[int]], TrainBatch | None] | None = None
        plain = {**_settings_of(self.compressor), "loss": asdict(loss), "optim": asdict(optim)}
        self.save_hyperparameters({**plain, "refresh_start": refresh_start}, logger=False)
        self.supervised = build_loss(
            loss.name,
            alpha=loss.alpha,
            form=loss.form,
            bins=loss.bins,
            eps=loss.eps,
            temperature=loss.temperature,
            reduce_counts=self._sum_over_ranks if loss.form == "histogram" else None,
        )

    @property
    def lr(self) -> float:
        """Peak learning rate, under the name that Lightning's `Tuner` looks for."""
        return self.optim_config.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optim_config = replace(self.optim_config, lr=float(value))
        self.hparams["optim"] = asdict(self.optim_config)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self.compressor, self.device_mesh)

    def forward(self, inputs: CompressorInput, budget: Tensor | float | None = None):
        return self.compressor(inputs.visual, inputs.prompt, inputs.prompt_mask, inputs.visual_mask, budget=budget)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        if not isinstance(batch, TrainBatch):
            batch = self._labelled(batch)
        if batch is None:  # a loss, since all processes must take part in the step
            return 0.0 * sum(p.sum() for p in self.compressor.parameters() if p.requires_grad)
        output = self(batch.inputs, batch.budget if batch.budget is not None else self._any_budget(batch))
        valid = batch.inputs.visual_mask
        if batch.populations:
            parts = self._policy(output.logits, batch, valid)
        else:
            parts = self.supervised(output.logits, output.hidden, batch.targets, valid)
        size = len(batch.ids)
        for name, value in parts.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=size)
        return parts["loss"]

    def _labelled(self, batch: Any) -> TrainBatch | None:
        """The labelled questions of a batch of ids, on this module's device; None if none is labelled."""
        if self.batch_of is None:
            raise UserError(
                f"a batch of type {type(batch).__name__} has no labels: add RefreshLabels to the Trainer's callbacks, "
                "or train on LabelledQuestions"
            )
        found = self.batch_of(question_ids(batch))
        return None if found is None else found.to(self.device)

    def on_train_epoch_end(self) -> None:
        """Stop a diverged training before its checkpoint is written.

        Raises:
            UserError: weights or the last loss are not finite, in any process.
        """
        loss = self.trainer.callback_metrics.get("train/loss")
        healthy = has_finite_weights(self.compressor) and (loss is None or bool(torch.isfinite(loss)))
        broken = torch.tensor(float(not healthy), device=self.device)
        if self.trainer.world_size > 1:
            broken = self.trainer.strategy.reduce(broken, reduce_op="sum")
        if broken > 0:
            raise UserError(
                f"training has diverged in epoch {self.trainer.current_epoch} (weights or loss are not finite); give a "
                f"smaller optim.lr than {self.optim_config.lr:g} and another --run_dir; nothing of this epoch is saved"
            )

    def _policy(self, logits: Tensor, batch: TrainBatch, valid: Tensor | None) -> dict[str, Tensor]:
        """Mean of the clipped policy loss over the batch; masks of different sizes are in separate tensors."""
        total: dict[str, Tensor] = {}
        for population in batch.populations:
            rows = population.rows
            parts = policy_loss(
                logits[rows],
                population.draws,
                population.advantages,
                population.old_log_prob,
                None if valid is None else valid[rows],
                clip=self.loss_config.clip,
            )
            for name, value in parts.items():
                total[name] = total.get(name, 0.0) + value * (len(rows) / len(batch.ids))
        return total

    def _any_budget(self, batch: TrainBatch) -> float | None:
        """Neutral budget for labels that do not depend on the number of kept tokens."""
        return NEUTRAL_BUDGET if self.compressor.config.budget_input else None

    def _sum_over_ranks(self, counts: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(counts, reduce_op="sum") if self.trainer.world_size > 1 else counts

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.compressor, self.optim_config)
        total = int(self.trainer.estimated_stepping_batches)
        # not a share of all steps: trainer.max_steps may end the run before its last epoch
        an_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        factor = schedule(self.optim_config, total, self.refresh_start * an_epoch)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        how = {"scheduler": scheduler, "interval": "step", "name": "learning_rate"}
        return {"optimizer": optimizer, "lr_scheduler": how}

    @torch.no_grad()
    def score(self, inputs: CompressorInput, budgets: Sequence[float] | None = None) -> list[np.ndarray]:
        """Scores [N] of each sample on the CPU, in evaluation mode; `budgets` is ignored without `budget_input`."""
        training = self.compressor.training
        self.compressor.eval()
        budget: Tensor | float | None = None
        if self.compressor.config.budget_input:
            budget = NEUTRAL_BUDGET if budgets is None else torch.tensor(budgets, device=self.device)
        try:
            logits = self(inputs, budget).logits.float().cpu()
        finally:
            self.compressor.train(training)
        sizes: Sequence[int] = [logits.shape[1]] * len(logits)
        if inputs.visual_mask is not None:
            sizes = inputs.visual_mask.sum(1).tolist()
        return [row[:size].numpy() for row, size in zip(logits, sizes, strict=True)]


def _new_compressor(config: EvoCompConfig | Mapping[str, Any], lora: Mapping[str, Any] | None) -> nn.Module:
    """A compressor of this configuration with random weights; with `lora` wrapped by PEFT."""
    if not isinstance(config, EvoCompConfig):
        config = EvoCompConfig.from_dict(dict(config))
    compressor = EvoCompCompressor(config).float()
    return add_lora(compressor, **lora) if lora else compressor


def _settings_of(compressor: nn.Module) -> dict[str, Any]:
    """What `_new_compressor` needs to make another one, as plain types."""
    adapter = getattr(compressor, "peft_config", {}).get("default")
    config = compressor.get_base_model().config if adapter else compressor.config
    lora = {"r": adapter.r, "alpha": adapter.lora_alpha} if adapter else None
    return {"compressor": json.loads(config.to_json_string(use_diff=False)), "lora": lora}
