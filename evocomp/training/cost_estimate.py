"""`evocomp label --estimate`: cost of the labels, from samples timed on this machine or from FLOP counts."""

from dataclasses import replace
from pathlib import Path

import torch

from evocomp.config.schema import RunConfig
from evocomp.data.splits import Splits, load_splits
from evocomp.labels.build import build_rounds
from evocomp.labels.estimate import (
    CPU,
    GPU,
    GPUS,
    Estimate,
    Target,
    assumed_workload,
    by_arithmetic,
    by_timing,
    text_lengths,
)
from evocomp.labels.number_format import resolve_dtypes
from evocomp.log import UserError, logger
from evocomp.mllm.hf import ASSETS
from evocomp.training.build import load_mllm


def estimate_only(config: RunConfig, gpu: str | None, gpus: int = 1, price: float | None = None) -> str:
    """Cost of round 0 of the labels as text: timed if this machine has that GPU, else computed from FLOP counts.

    If no GPU is named, a configuration for the CPU (`trainer.accelerator=cpu`) is timed on this machine.
    """
    if gpu is None and config.trainer.get("accelerator") == "cpu":
        gpu = "here"
    known = GPUS.get((gpu or "h100").lower())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    # a sharded model does not fit this single process, so it is not timed
    timed = config.model.shard == 1 and (gpu == "here" or (device and (gpu is None or gpu.lower() in device.lower())))
    if known is None and not timed:
        raise UserError(f"--gpu={gpu} is unknown; choose one of {', '.join(GPUS)}, or `here` to time this machine")
    try:
        splits = load_splits(config.data)
    except UserError as error:
        if timed:
            raise
        logger.info("%s; the estimate assumes %d samples of typical length", error, config.data.max_samples)
        splits = Splits([], [], [])
    samples = len(splits.train) or config.data.max_samples
    if timed:
        here = next((one for name, one in GPUS.items() if name in device.lower()), GPU(device, 0, 0, 0))
        here = replace(here, price=here.price if price is None else price) if device else CPU
        return _timed(config, splits, samples, here).report(gpus)
    target = Target.named(config.model.name, ASSETS)
    work = assumed_workload(config, target, samples, *text_lengths(splits.train))
    known = replace(known, price=known.price if price is None else price)
    return by_arithmetic(config, target, work, known).report(gpus)


def _timed(config: RunConfig, splits: Splits, samples: int, here: GPU) -> Estimate:
    """Estimate from a few samples that are labelled now, on the GPU of this machine or else on its CPU."""
    mllm = load_mllm(config)
    target = Target.from_config(mllm.model.config.to_dict())
    labeller = build_rounds(resolve_dtypes(config, Path(config.run_dir)), mllm, splits, None)
    on_gpu = mllm.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(mllm.device)
    estimate = by_timing(config, target, labeller, samples, here)
    return replace(estimate, memory=float(torch.cuda.max_memory_reserved(mllm.device))) if on_gpu else estimate
