"""Train K-Token Merging for comparison: block merger and LoRA on the answer loss, everything else frozen.

    python -m evocomp.training.k_token_merging --run runs/nano

trains one merger for each kept count of the run that divides the number of visual tokens, and saves it where
`evocomp eval --run runs/nano --panel full` finds it. The merger has about 3 (K D)^2 parameters for blocks of K tokens:
with large blocks it is larger than a small LLM. On nano its training takes minutes of a CPU core.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evocomp import distributed, log
from evocomp.config import load as config_files
from evocomp.config.schema import DataConfig
from evocomp.data.example import Example
from evocomp.data.splits import drawn, load_splits
from evocomp.inference.k_token_merging import KTokenMerger
from evocomp.log import UserError, logger
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.training.build import load_mllm
from evocomp.training.optim import learning_rate


class KTokenModule(L.LightningModule):
    """Trains merger and LoRA with the answer loss; checkpoints contain only these weights."""

    def __init__(self, model: KTokenMerger, lr: float = 2e-3, warmup_steps: int = 30, flat: float = 0.5):
        super().__init__()
        self.lr, self.warmup_steps, self.flat = lr, warmup_steps, flat
        self.merger = model.merger
        self.lora = nn.ParameterList(model.lora.values())
        self._model = (model,)  # a tuple, so that the frozen MLLM is no submodule

    def on_fit_start(self) -> None:
        self._model[0].train(True)

    def on_fit_end(self) -> None:
        self._model[0].train(False)

    def transfer_batch_to_device(self, batch: list[Features], device: torch.device, index: int) -> list[Features]:
        """Nothing to move: features are computed on the device of the frozen model."""
        return batch

    def training_step(self, batch: list[Features], batch_index: int) -> Tensor:
        loss = self._model[0].losses(batch).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        weights = [*self.merger.parameters(), *self.lora]
        optimizer = torch.optim.AdamW(weights, lr=self.lr, betas=(0.9, 0.98), weight_decay=0.0)
        total = int(self.trainer.estimated_stepping_batches)
        factor = partial(learning_rate, total=total, warmup=self.warmup_steps, flat=self.flat)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(
    mllm: FrozenMLLM,
    examples: Sequence[Example],
    block: int,
    steps: int = 1000,
    batch_size: int = 32,
    r: int = 8,
    lr: float = 2e-3,
    seed: int = 0,
) -> KTokenMerger:
    """Train a merger of blocks of `block` tokens for `mllm` on the answers of `examples`."""
    L.seed_everything(seed, workers=True, verbose=False)
    model = KTokenMerger(mllm, block, r)
    loader = DataLoader(
        list(examples), batch_size, shuffle=True, drop_last=len(examples) >= batch_size, collate_fn=mllm.features
    )
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu" if mllm.device.type == "cpu" else "auto",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_workers.*|.*log_every_n_steps.*|.*eval mode.*")
        trainer.fit(KTokenModule(model, lr), loader)
    return model


def train_for_run(run: Path, questions: int = 8000, steps: int = 1000, kept: Sequence[int] | None = None) -> None:
    """Train a merger for each kept count of a finished run that divides N; existing mergers are kept.

    The merger needs answers, not labels, so more questions than the labelled ones can be used: if the data are scenes,
    `questions` of them are drawn.
    """
    config = config_files.load([run / "config.yaml"])
    distributed.set_threads(config.threads)
    mllm = load_mllm(config)
    examples = training_questions(config.data, questions)
    count = len(mllm.features(examples[:1])[0].visual)
    for budget in kept or config.eval.kept:
        folder = run / "k_token_merging" / str(budget)
        if count % budget:
            logger.info("%d kept: skipped, %d tokens cannot be divided into equal blocks", budget, count)
        elif (folder / "config.json").is_file():
            logger.info("%d kept: skipped, %s exists", budget, folder)
        else:
            logger.info("%d kept: training a merger of blocks of %d tokens", budget, count // budget)
            train(mllm, examples, count // budget, steps, seed=config.seed).save(folder)


def training_questions(data: DataConfig, questions: int) -> list[Example]:
    """At most `questions` questions of the training split; of scenes, exactly that many are drawn."""
    if data.source == "scenes":
        return drawn(data, data.train_seed, questions)
    return load_splits(replace(data, max_samples=questions)).train


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evocomp.training.k_token_merging", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="run folder written by `evocomp train`")
    parser.add_argument("--questions", type=int, default=8000, help="number of training questions")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps for each kept count")
    parser.add_argument("--kept", type=int, nargs="*", help="numbers of kept tokens; default: those of the run")
    options = parser.parse_args(words)
    log.setup()
    try:
        if not (options.run / "config.yaml").is_file():
            raise UserError(f"--run={options.run} is not a run folder: config.yaml is missing; train it first")
        train_for_run(options.run, options.questions, options.steps, options.kept)
    except UserError as error:
        print(f"evocomp: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
