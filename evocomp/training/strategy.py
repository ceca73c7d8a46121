"""Distributed strategies: `ddp` (replicas), `fsdp2` (weights sharded by `fully_shard`), `fsdp` (FSDP1, GPUs only).

The compressor is one decoder layer (0.2 billion weights for a 7B model), so `ddp` is the right choice unless the layer
and its optimizer state do not fit one device.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from evocomp.config.schema import OptimConfig
from evocomp.distributed import launched_by_torchrun
from evocomp.log import UserError

SHARDED = ("fsdp", "fsdp2")


def job_size() -> dict[str, int]:
    """`devices` and `num_nodes` of a job started by torchrun; Lightning does not read them from the environment."""
    if not launched_by_torchrun():
        return {"devices": 1}
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else 1
    return {"devices": here, "num_nodes": int(os.environ["WORLD_SIZE"]) // here}


def with_strategy(settings: Mapping[str, Any], optim: OptimConfig) -> dict[str, Any]:
    """The settings of the Trainer with the name of the strategy resolved.

    Raises:
        UserError: fsdp on a CPU, or an optimizer or weight average that does not support sharded weights.
    """
    name = settings.get("strategy")
    if name not in SHARDED:
        return dict(settings)
    if name == "fsdp" and (settings.get("accelerator") == "cpu" or not torch.cuda.is_available()):
        raise UserError("trainer.strategy=fsdp needs GPUs; on CPUs choose --trainer.strategy=fsdp2 or ddp")
    needed = []
    if optim.name != "adamw":
        needed.append("--optim.name=adamw (with --optim.lr=2e-4 or so)")
    if optim.ema:
        needed.append("--optim.ema=0")
    if needed:
        raise UserError(
            f"trainer.strategy={name} shards the weights; optim.name=muon and optim.ema need unsharded ones: "
            f"add {' and '.join(needed)}, or choose --trainer.strategy=ddp"
        )
    if name == "fsdp":
        return {**settings, "strategy": FSDPStrategy(state_dict_type="full")}
    # one file, so that any number of processes can resume from it, with or without sharding
    strategy = ModelParallelStrategy(_processes(settings), tensor_parallel_size=1, save_distributed_checkpoint=False)
    return {**settings, "strategy": strategy}


def _processes(settings: Mapping[str, Any]) -> int:
    """Number of processes of the job, as Lightning counts them."""
    devices = settings.get("devices", 1)
    if isinstance(devices, str):
        devices = devices if devices in ("auto", "-1") else [one for one in devices.split(",") if one]
    if isinstance(devices, list | tuple):
        devices = len(devices)
    if devices in ("auto", -1, "-1"):
        devices = max(1, torch.cuda.device_count())
    return int(devices) * int(settings.get("num_nodes", 1))


def shard(compressor: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the layers of a compressor, then the rest, over the data-parallel dimension of the mesh; idempotent."""
    if isinstance(compressor, FSDPModule):
        return
    across = mesh["data_parallel"]
    for layer in compressor.encoder.layers:
        fully_shard(layer, mesh=across)
    fully_shard(compressor, mesh=across)


def whole(module: nn.Module) -> nn.Module:
    """A CompressorModule with unsharded weights: the module itself, or a copy if its weights are sharded.

    This function is a collective operation; the forward pass of the result is not, so that ranks may score different
    numbers of samples.
    """
    if not _is_sharded(module):
        return module
    compressor = type(module.compressor)(module.compressor.config)
    compressor.load_state_dict(dict(_whole_weights(module)))
    copy = type(module)(compressor.train(module.compressor.training), module.loss_config, module.optim_config)
    return copy.to(module.device)


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(one, DTensor) for one in module.parameters()) or _fsdp1(module) is not None


def _fsdp1(module: nn.Module) -> nn.Module | None:
    trainer = getattr(module, "_trainer", None)
    model = getattr(trainer.strategy, "model", None) if trainer is not None else None
    return model if isinstance(model, FullyShardedDataParallel) else None


def _whole_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    if (wrapped := _fsdp1(module)) is not None:
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            yield from ((name, value.detach().clone()) for name, value in module.compressor.state_dict().items())
        return
    for name, value in module.compressor.state_dict().items():
        yield name, value.full_tensor() if isinstance(value, DTensor) else value.detach()
