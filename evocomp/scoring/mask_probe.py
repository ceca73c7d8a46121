"""Whether a decoder computes what explicit attention masks say, found out on short random sequences."""

import torch
from transformers import PreTrainedConfig

from evocomp.mllm.agreement import same_states
from evocomp.mllm.attention import short_windows
from evocomp.scoring.sequences import Body, Packing, Table

SHARED, OWN = 4, 6


@torch.inference_mode()
def packs_as_apart(body: Body, config: PreTrainedConfig, device: torch.device) -> bool:
    """Whether two sequences that begin alike get the same states packed into one as each on its own.

    On its own a sequence is masked by the decoder, packed by us. The decoder's windows are made shorter than these
    sequences meanwhile, so that they count.

    Args:
        body: runs the decoder with the decoder's own masks, or with ours where there is a packing.
        config: of the decoder.
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
            apart = [body(table, rows, torch.arange(SHARED + OWN, device=device))[0] for rows in (first, second)]
            packed = body(table, index, index[0], Packing.of(SHARED, (OWN, OWN), device))[0]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return False  # the decoder's forward takes no masks of this form
    return same_states(packed, torch.cat([apart[0], apart[1][SHARED:]]), packed.dtype)
