"""A frozen MLLM that does not fit one device: its decoder's layers are spread over a group of processes.

Each layer's weights are gathered just before it runs and let go afterwards (`fully_shard`), so every member runs whole
forwards on masks of its own, with the very numbers of an unsharded model. Tensor parallelism would need less traffic
a forward, but adds partial sums in another order and makes all members score the same masks. Vision tower,
embeddings and head, a few per cent of a large model, are held by every process.
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
    """This process's part of the MLLM; all ranks of the job call it.

    The processes of a node load one after another, so that host memory holds the whole model only once.

    Raises:
        UserError: the job's processes cannot be split into groups of `model.shard`.
    """
    group = ShardGroup.form(section.shard)
    if group.size == 1:
        raise UserError("model.shard needs several processes; start the job with a script of experiments/launch/")
    with distributed.in_turn():
        mllm = FrozenMLLM.load(section.name, section.dtype, section.attention, "cpu")
        _keep_part(mllm, group, torch.device(device))
    # a first forward makes the buffers for gathered weights: made in inference mode, no other mode could use them
    with torch.no_grad():
        mllm.decoder(inputs_embeds=mllm.vocabulary[:1, None], use_cache=False)
    return mllm


def _keep_part(mllm: FrozenMLLM, group: ShardGroup, device: torch.device) -> None:
    """Keep this member's part of the decoder's layers on `device`, and all the rest of the model; no collective."""
    mesh = DeviceMesh.from_group(group.group, device.type)
    decoder = mllm.decoder
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    everywhere = {p for name, p in decoder.named_parameters() if not name.startswith("layers.")}
    # the decoder itself too, so that the next layer's weights are on their way while one computes
    fully_shard(decoder, mesh=mesh, ignored_params=everywhere)
    mllm.model.to(device)
    mllm.shard_group = group
