"""Sharding of a frozen MLLM that does not fit one device: a process group shares the layers of its decoder.

The weights of each layer are gathered just before it runs and freed afterwards (`fully_shard`), so every process runs
complete forward passes on its own masks and gets exactly the numbers of an unsharded model. Tensor parallelism would
need less communication per forward pass, but it sums in another order and makes all processes score the same masks.
Vision tower, embeddings and head, a few per cent of a large model, are replicated on every process.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from evocomp import distributed
from evocomp.config.schema import ModelConfig
from evocomp.distributed import ShardGroup
from evocomp.log import UserError
from evocomp.mllm.hf import FrozenMLLM


def load_sharded(section: ModelConfig, device: str | torch.device) -> FrozenMLLM:
    """Load this process's shard of the MLLM; all ranks of the job call it.

    The processes of a node load one after another, so that host memory holds the complete model only once.

    Raises:
        UserError: the job's processes cannot be split into groups of `model.shard`.
    """
    group = ShardGroup.form(section.shard)
    if group.size == 1:
        raise UserError("model.shard needs several processes; start the job with a script of experiments/launch/")
    with distributed.in_turn():
        mllm = FrozenMLLM.load(section.name, section.dtype, section.attention, "cpu")
        _keep_part(mllm, group, torch.device(device))
    # the first forward pass allocates the buffers for gathered weights; buffers made in inference mode could only be
    # used in that mode
    with torch.no_grad():
        mllm.decoder(inputs_embeds=mllm.vocabulary[:1, None], use_cache=False)
    return mllm


def _keep_part(mllm: FrozenMLLM, group: ShardGroup, device: torch.device) -> None:
    """Keep this process's shard of the decoder layers and all other weights on `device`; not a collective operation."""
    mesh = DeviceMesh.from_group(group.group, device.type)
    decoder = mllm.decoder
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    everywhere = {p for name, p in decoder.named_parameters() if not name.startswith("layers.")}
    # wrap the decoder too, so that the next layer's weights are prefetched while a layer computes
    fully_shard(decoder, mesh=mesh, ignored_params=everywhere)
    mllm.model.to(device)
    mllm.shard_group = group
