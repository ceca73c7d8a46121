"""Checks on short random sequences whether a decoder follows explicit attention masks."""

import torch
from transformers import PreTrainedConfig

from evocomp.mllm.agreement import same_states
from evocomp.mllm.attention import short_windows
from evocomp.scoring.sequences import Body, Packing, Table

SHARED, OWN = 4, 6


@torch.inference_mode()
def packs_as_apart(body: Body, config: PreTrainedConfig, device: torch.device) -> bool:
    """Whether two sequences with a common prefix get the same hidden states packed into one and separately.

    Separate sequences use the decoder's own masks; the packed one uses an explicit mask. During the check, attention
    windows are shorter than the sequences, so that they have an effect.

    Args:
        body: runs the decoder, with its own masks or, given a packing, with an explicit mask.
        config: configuration of the decoder.
        device: device of the decoder.
    """
    size = SHARED + 2 * OWN
    embeds = torch.randn(size, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
    own = SHARED + 1 + torch.arange(OWN)  # a gap, as after dropped tokens
    positions = torch.cat([torch.arange(SHARED), own, own]).to(device)
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        positions = positions.expand(4, -1)
    table, index = Table(embeds, positions), torch.arange(size, device=device)[None]
    first, second = index[:, : SHARED + OWN], torch.cat([index[:, :SHARED], index[:, SHARED + OWN :]], dim=1)
    with short_windows(config):
        try:
            separate = [body(table, rows, torch.arange(SHARED + OWN, device=device))[0] for rows in (first, second)]
            packed = body(table, index, index[0], Packing.of(SHARED, (OWN, OWN), device))[0]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return False  # the decoder's forward does not accept such masks
    return same_states(packed, torch.cat([separate[0], separate[1][SHARED:]]), packed.dtype)
