"""Resolves `labels.dtype=auto` and `optim.muon_dtype=auto`: bfloat16 only if it is faster on this machine.

CPUs without bfloat16 units emulate it, many times slower than float32. No CPU flag predicts the speed, so one matrix
product is timed. The chosen dtype becomes part of the run's config and of the label store's fingerprint. A resumed run
keeps it without a new measurement, so that its results do not depend on the machine.
"""

import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from evocomp import distributed
from evocomp.config import load as config_files
from evocomp.config.schema import RunConfig

AUTO = "auto"
SHAPE = (1024, 96, 384)
"""Rows, inner size and columns of the timed product: a feed-forward layer of the nano LLM. It is large enough that call
overhead does not hide the gain; all repeats take a few milliseconds."""
REPEATS = 7
GAIN = 0.8
"""Largest ratio of bfloat16's to float32's time at which bfloat16 is chosen: it changes losses by about 0.02 nats."""


def resolve_dtypes(config: RunConfig, folder: Path) -> RunConfig:
    """Replace every `auto` in the config by a dtype, the same on all ranks.

    Args:
        config: the run's settings.
        folder: run folder. The choice in its config or its label store is kept; if neither exists, rank 0 measures.
    """
    if AUTO not in (config.labels.dtype, config.optim.muon_dtype):
        return config
    labels, muon = distributed.from_rank_0(lambda: _chosen(config, folder))
    return replace(config, labels=replace(config.labels, dtype=labels), optim=replace(config.optim, muon_dtype=muon))


def _chosen(config: RunConfig, folder: Path) -> tuple[str, str]:
    """`labels.dtype` and `optim.muon_dtype`."""
    labels: str = config.labels.dtype
    muon: str = config.optim.muon_dtype
    if (folder / "config.yaml").is_file():
        there = config_files.load_saved(folder)
        # a run from before these settings has "auto" here still, and does what it did then
        return (there.labels.dtype if labels == AUTO else labels), (there.optim.muon_dtype if muon == AUTO else muon)
    if labels == AUTO:
        store = Path(config.labels.dir) if config.labels.dir else folder / "labels"
        labels = (None if config.labels.overwrite else _dtype_of_store(store)) or _for_labels(config)
    return labels, _faster() if muon == AUTO else muon


def _for_labels(config: RunConfig) -> str:
    if config.model.dtype != "float32" or config.model.shard != 1:
        return "model"
    return "bfloat16" if _faster() == "bfloat16" else "model"


def _dtype_of_store(folder: Path) -> str | None:
    """The dtype in a label store's fingerprint; None if there is no store."""
    try:
        return json.loads((folder / "meta.json").read_text())["fingerprint"]["labels"]["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a damaged store is reported when it is opened


def _faster() -> str:
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return faster_on_cpu()


@cache
def faster_on_cpu() -> str:
    """`bfloat16` or `float32`: the dtype in which one thread multiplies faster, by the best time of several repeats."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, inner, columns = SHAPE
        products = {}
        for name in ("float32", "bfloat16"):
            dtype = getattr(torch, name)
            products[name] = (torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype))
            products[name][0] @ products[name][1]  # warm up: libraries prepare for each new shape and dtype
        best = dict.fromkeys(products, float("inf"))
        for repeat in range(REPEATS):
            if repeat == 3 and best["bfloat16"] > 4 * best["float32"]:
                break  # emulated: each product takes many milliseconds
            for name, (left, right) in products.items():
                start = time.perf_counter()
                left @ right
                best[name] = min(best[name], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return "bfloat16" if best["bfloat16"] < GAIN * best["float32"] else "float32"
