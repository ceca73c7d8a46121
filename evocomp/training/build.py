"""Builds a run from its settings and trains it: MLLM, labels, compressor, Lightning trainer."""

import difflib
import inspect
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import evocomp
from evocomp import distributed
from evocomp.compressor.lora import add_lora, merge_lora, save_lora
from evocomp.compressor.model import EvoCompCompressor
from evocomp.config import load as config_files
from evocomp.config.schema import RunConfig
from evocomp.data.example import Example
from evocomp.data.splits import load_splits
from evocomp.inference import card
from evocomp.labels.build import build_labeller, use_feature_cache
from evocomp.labels.labeller import Interrupted
from evocomp.labels.number_format import resolve_dtypes
from evocomp.launch import launched
from evocomp.log import UserError, is_rank_zero, logger
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.observe import ClipTower
from evocomp.mllm.unknown_words import texts_of, warn_of_unknown_words
from evocomp.mllm.weights import check_finite_weights
from evocomp.progress import Progress, Stage
from evocomp.runs.claims import DONE
from evocomp.runs.folder import claimed, is_finished, judge_as_asked, last_checkpoint, write_json
from evocomp.training import by_name
from evocomp.training.average import AverageFromEpoch
from evocomp.training.checkpoint_files import CheckpointFiles
from evocomp.training.cost import CostMeter
from evocomp.training.curves import Curves
from evocomp.training.datamodule import LabelledQuestions
from evocomp.training.module import CompressorModule
from evocomp.training.monitors import SelectionAccuracy
from evocomp.training.progress import RunProgress, report_labels
from evocomp.training.refresh_labels import RefreshLabels
from evocomp.training.shards import load_sharded
from evocomp.training.stop import NoteStop, StopCleanly
from evocomp.training.strategy import job_size, whole, with_strategy
from evocomp.training.tensorboard_logger import RunLogger

DEFAULT_EPOCHS = 6


logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # hide tips that are not about this run


@distributed.process_group()
def run(config: RunConfig, answers: int = 0) -> bool:
    """Label and train as the settings say, into `config.run_dir`; an interrupted run is resumed.

    Args:
        answers: number of (question, selector) pairs of the evaluation that follows, for the remaining time that is
            shown.

    Returns:
        Whether there is something new to evaluate: False if the run is finished and already evaluated with these
        settings.

    Raises:
        UserError: the folder has a run with other settings, or data or settings are invalid.
    """
    folder = Path(config.run_dir)
    config = resolve_dtypes(config, folder)
    trainer_settings = with_strategy({**job_size(), **check_trainer(config.trainer)}, config.optim)
    if config.compressor.lora.r and "fsdp" in str(config.trainer.get("strategy", "")):
        raise UserError("fsdp cannot shard a LoRA adapter: set trainer.strategy=ddp, or compressor.lora.r=0")
    if is_finished(config, folder):
        logger.info("%s is already trained; choose another --run_dir for a new run", folder)
        return distributed.rank() == 0 and judge_as_asked(config, folder)
    distributed.set_threads(config.threads)
    L.seed_everything(config.seed, workers=True, verbose=False)
    splits = load_splits(config.data)
    mllm = load_mllm(config)
    if is_rank_zero():
        everything = [*splits.train, *splits.val, *splits.test]
        for example in everything:
            mllm.check_text(example)
        warn_of_unknown_words(mllm.processor.tokenizer, texts_of(everything), config.model.name)
    use_feature_cache(config, mllm, splits)
    check_kept(config, mllm, splits.train)
    labeller = build_labeller(config, mllm, splits, folder)
    labelled = config.labels.labelled_at_first(len(splits.train))
    data = LabelledQuestions(
        mllm,
        splits.train,
        config.optim.batch_size // launched(),  # the same total batch for any number of processes
        config.labels.samples_per_epoch or config.labels.passes * labelled,
        config.seed,
    )
    refreshed_from = 0 if config.labels.refresh == "none" else config.labels.refresh_start
    module = CompressorModule(build_compressor(config, mllm), config.loss, config.optim, refreshed_from)
    cost = CostMeter(labeller.scorer)
    monitor = SelectionAccuracy(
        mllm,
        splits.val,
        config.eval.kept,
        config.eval.batch,
        config.eval.monitor_every,
        config.eval.max_new_tokens,
    )
    progress = RunProgress(config, labeller.scorer, splits.train, monitor, answers)
    refresh = RefreshLabels(labeller, config.labels, data, cost, progress.label)
    curves = Curves(refresh, monitor, config_files.to_dict(config))
    average = []
    if config.optim.ema:
        # not from the start: the average would still contain the weights of the untrained compressor
        start = config.labels.refresh_start if config.labels.refresh == "on_policy" else 1
        average = [AverageFromEpoch(config.optim.ema, start)]
    trainer = build_trainer(config, folder, trainer_settings, [refresh, monitor, cost, curves, *average, progress])
    with claimed(config, folder):
        last = last_checkpoint(folder)
        _fit(trainer, module, data, last)
        if trainer.received_sigterm or trainer.interrupted:
            raise Interrupted("training was stopped; run the same command again to resume from the last checkpoint")
        finished, spent = whole(module), {"labelled": labelled, **cost.summary()}
        check_finite_weights(finished, f"the compressor of {folder}", "give a smaller optim.lr and another --run_dir")
        if trainer.is_global_zero:
            save_compressor(finished.compressor, config, folder)
            write_json(folder / DONE, {"steps": trainer.global_step, "epochs": trainer.current_epoch, "cost": spent})
    return True


def _fit(trainer: L.Trainer, module: CompressorModule, data: LabelledQuestions, last: str | None) -> None:
    """Run `trainer.fit`, resuming from `last`; hide irrelevant warnings; Ctrl-C raises KeyboardInterrupt."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_workers.*|.*`IterableDataset`.*|.*log_every_n_steps.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*|.*WeightAveraging doesn't support sharding.*")
        warnings.filterwarnings("ignore", message=".*eval mode.*|.*Checkpoint directory .* exists.*")
        # resuming within an epoch is exact: the datamodule saves its position
        warnings.filterwarnings("ignore", message=".*ended before the epoch ended.*")
        try:
            trainer.fit(module, data, ckpt_path=last, weights_only=True)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise UserError(
                f"checkpoint {last} is of another compressor; restore it, or choose another --run_dir"
            ) from None
        except SystemExit:
            if not trainer.interrupted:
                raise
            raise KeyboardInterrupt from None  # Lightning converts it to SystemExit


@distributed.process_group()
def label_only(config: RunConfig) -> None:
    """Make round 0 of the label store, or complete it, without training."""
    folder = Path(config.run_dir)
    check_trainer(config.trainer)  # not used here, but the same settings are to train
    config = resolve_dtypes(config, folder)
    distributed.set_threads(config.threads)
    splits = load_splits(config.data)
    mllm = load_mllm(config)
    if is_rank_zero():
        everything = [*splits.train, *splits.val, *splits.test]
        for example in everything:
            mllm.check_text(example)
        warn_of_unknown_words(mllm.processor.tokenizer, texts_of(everything), config.model.name)
    use_feature_cache(config, mllm, splits)
    labeller = build_labeller(config, mllm, splits, folder)
    progress = Progress(labels=Stage())
    try:
        records = labeller.ensure(0, report=report_labels(progress))
    finally:
        progress.close()
    logger.info("%d labels in %s", len(records), labeller.store.path)


def load_mllm(config: RunConfig) -> FrozenMLLM:
    """The frozen MLLM on this process's device, or this process's shard of it (`model.shard`)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{distributed.local_rank()}"
    if config.model.shard != 1:
        mllm = load_sharded(config.model, device)
    else:
        mllm = FrozenMLLM.load(config.model.name, config.model.dtype, config.model.attention, device)
    if config.compressor.hedge:
        mllm.priority_by = hedge_by(config, mllm)
    mllm.max_bad = config.data.max_bad
    mllm.max_tokens = config.data.max_tokens
    return mllm


def hedge_by(config: RunConfig, mllm: FrozenMLLM) -> str:
    """Name of the training-free score that `compressor.hedge` uses, with "auto" resolved for this model."""
    if config.compressor.hedge_by != "auto":
        return config.compressor.hedge_by
    return "divprune" if ClipTower.of(mllm.model) is None else "cls_attention"


def build_compressor(config: RunConfig, mllm: FrozenMLLM) -> EvoCompCompressor:
    """A new compressor for the MLLM; if `compressor.lora.r` > 0, PEFT wraps it and only an adapter is trained."""
    section = config.compressor
    compressor = EvoCompCompressor.from_mllm(
        mllm.model,
        layer=section.init_layer if section.init == "layer" else None,
        num_layers=section.layers,
        width=section.width,
        use_text=section.use_text,
        head_norm=section.head_norm,
        budget_input=section.budget_input,
        balance_text=section.balance_text,
        dither=section.dither,
        sharp=section.sharp,
        hedge=section.hedge,
        hedge_by=hedge_by(config, mllm),
        base_model_name_or_path=config.model.name,
        keep=max(config.eval.kept),
    ).float()
    return add_lora(compressor, section.lora.r, section.lora.alpha) if section.lora.r else compressor


def build_trainer(config: RunConfig, folder: Path, settings: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
    """Lightning's Trainer with this project's defaults under the user's `trainer:` settings."""
    settings = dict(settings)
    named = {key: by_name.create(key, settings.pop(key)) for key in by_name.KINDS if key in settings}
    loggers = [*build_logger(config, folder), *named.get("logger", [])]
    defaults: dict[str, Any] = {
        "max_epochs": DEFAULT_EPOCHS,
        "accelerator": "auto",
        "gradient_clip_val": 1.0,
        "use_distributed_sampler": False,
        "log_every_n_steps": 5,
        "enable_progress_bar": False,  # RunProgress also shows labelling and evaluation
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(folder),
    }
    checkpoint = ModelCheckpoint(
        dirpath=folder / "checkpoints",
        save_last=True,
        save_top_k=1,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,  # a run resumes from last.ckpt, never from last-v1.ckpt
    )
    request = distributed.StopRequest(chain=False)
    first, last = NoteStop(request), StopCleanly(request, folder / "checkpoints" / "last.ckpt")
    rates = [LearningRateMonitor("step")] if loggers else []
    everything = [first, *callbacks, *rates, *named.get("callbacks", []), last, checkpoint]
    plugins = settings.pop("plugins", None) or []
    plugins = [*(plugins if isinstance(plugins, list | tuple) else [plugins]), CheckpointFiles()]
    try:
        return L.Trainer(**{**defaults, **settings}, logger=loggers or False, callbacks=everything, plugins=plugins)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def build_logger(config: RunConfig, folder: Path) -> list[Logger]:
    """The Lightning loggers of a run."""
    match config.logger:
        case "tensorboard":
            return [RunLogger(folder)]
        case "csv":
            return [CSVLogger(folder, name="curves", version="")]
        case "wandb":
            try:
                from lightning.pytorch.loggers import WandbLogger

                return [WandbLogger(save_dir=str(folder), name=folder.name)]
            except ModuleNotFoundError:
                raise UserError("logger=wandb: run `pip install wandb`, or choose tensorboard or csv") from None
        case _:
            return []


def check_trainer(settings: dict[str, Any]) -> dict[str, Any]:
    """The `trainer:` section, checked against the signature of `lightning.Trainer`."""
    known = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    ours = {"default_root_dir", "use_distributed_sampler"}
    for key in settings:
        if key in ours:
            raise UserError(f"trainer.{key} is set by the run itself; see --run_dir")
        if key not in known:
            near = difflib.get_close_matches(key, known - ours, 1)
            hint = f"did you mean trainer.{near[0]}?" if near else "see the arguments of lightning.Trainer"
            raise UserError(f"unknown setting trainer.{key}; {hint}")
    for key in by_name.KINDS:
        if key in settings:
            by_name.named_classes(key, settings[key])
    if settings.get("fast_dev_run"):
        raise UserError("trainer.fast_dev_run would mark the run as finished; use --trainer.max_epochs=1 instead")
    epochs = settings.get("max_epochs", DEFAULT_EPOCHS)
    if not isinstance(epochs, int) or not 1 <= epochs <= 10**9:
        raise UserError(f"trainer.max_epochs={str(epochs)[:20]}: must be a whole number, at least 1")
    check_devices(settings.get("devices", 1), settings.get("accelerator"))
    return dict(settings)


def check_devices(devices: Any, accelerator: Any) -> None:
    """Raise UserError for more processes than the machine has cores or GPUs; a launcher's own are there already."""
    if isinstance(devices, bool | float):
        raise UserError(f"trainer.devices={devices}: give a number of processes")
    if not isinstance(devices, int) or distributed.launched_by_torchrun():
        return
    on_gpus = accelerator != "cpu" and torch.cuda.is_available()
    there = torch.cuda.device_count() if on_gpus else os.cpu_count() or 1
    if devices > there:
        what = "GPUs" if on_gpus else "cores"
        raise UserError(f"trainer.devices={devices}: this machine has {there} {what}; give at most {there}")
    if devices < 1 and devices != -1:
        raise UserError(f"trainer.devices={devices}: must be at least 1, or -1 for all")


def check_kept(config: RunConfig, mllm: FrozenMLLM, examples: Sequence[Example]) -> None:
    """Raise `UserError` if `eval.kept` exceeds the number of visual tokens of the first image that decodes."""
    first = mllm.readable(examples, most=1)
    if not first:
        raise UserError(f"data.source={config.data.source}: no image of a training question can be decoded; check it")
    available = len(first[0][1].visual)
    too_many = [count for count in config.eval.kept if count > available]
    if too_many:
        raise UserError(
            f"eval.kept={too_many[0]} is more than the {available} visual tokens of an image; give smaller counts"
        )


def save_compressor(compressor: EvoCompCompressor, config: RunConfig, folder: Path) -> None:
    """Save the trained compressor as a Hugging Face folder with a model card; `evocomp eval` adds the table of results.

    A LoRA adapter is also saved separately, in the folder `adapter`.
    """
    if config.compressor.lora.r:
        save_lora(compressor, folder / "adapter")
        compressor = merge_lora(compressor)
    settings = config_files.to_dict(config)
    labels = {key: value for key, value in settings["labels"].items() if key not in ("dir", "overwrite")}
    card.save(
        compressor,
        folder / "compressor",
        recipe=config.recipe,
        evocomp=evocomp.__version__,
        data=f"{config.data.max_samples or 'all'} questions of {Path(config.data.source).name}",
        labels={**labels, "strategy": config.search.strategy},
        training={**settings["loss"], **settings["optim"], "seed": config.seed},
    )
