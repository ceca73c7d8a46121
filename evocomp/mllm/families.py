"""Images of multimodal LLMs of every family: where they stand in a prompt, and what their encoder makes of them.

Every family offers `get_image_features(...).pooler_output`, `get_decoder()` and `get_input_embeddings()` and takes
`mm_encoder_outputs`. The differences between families are described by `evocomp.mllm.policy`.
"""

import inspect
from collections.abc import Mapping

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from evocomp.log import UserError
from evocomp.mllm.policy import FAMILIES, MIN_TRANSFORMERS, Policy, base, decoder, in_table, policy, unwrap

__all__ = ["FAMILIES", "MIN_TRANSFORMERS", "Policy", "base", "decoder", "in_table", "policy", "unwrap"]

PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
"""Names under which models take pixels, by kind of visual input."""


def gathered(weight: Tensor) -> Tensor:
    """The full weight. For a sharded model this is a collective: all processes that hold a shard must call it."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def check_supported(model: nn.Module) -> None:
    """Raise UserError if the family is unknown or transformers is too old."""
    if Version(Version(transformers.__version__).base_version) < Version(MIN_TRANSFORMERS):
        raise UserError(
            f"transformers {transformers.__version__} is too old; run `pip install 'transformers>={MIN_TRANSFORMERS}'`"
        )
    policy(model)


def token_ids(model: nn.Module) -> dict[str, int]:
    """Placeholder token id of each kind of visual input, {"image": id} or {"image": id, "video": id}."""
    config = unwrap(model).config
    found = {kind: getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")}
    return {kind: token for kind, token in found.items() if token is not None}


def visual_mask(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Mask of the visual tokens: True at image and video placeholders. input_ids [B,S] -> bool [B,S]."""
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in token_ids(model).values():
        mask |= input_ids == token
    return mask


def position_ids(model: nn.Module, inputs: Mapping[str, Tensor], forward: bool = False) -> Tensor:
    """Position ids of the full prompt as `generate` computes them: [B,S], or [4,B,S] with M-RoPE.

    With M-RoPE, row 0 is the index in the sequence and rows 1-3 are time, height and width. `forward=True` returns
    what `model.forward` expects where that differs (PaliGemma counts from 1). The model's state is not changed.
    """
    model = unwrap(model)
    names = ("attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    known = {name: inputs[name] for name in names if inputs.get(name) is not None}
    own = base(model)
    remembered = getattr(own, "rope_deltas", None)
    positions = model._prepare_position_ids_for_generation(inputs["input_ids"], known)
    if hasattr(own, "rope_deltas"):
        own.rope_deltas = remembered
    positions = positions.expand(*positions.shape[:-2], *inputs["input_ids"].shape)
    return positions + policy(model).forward_offset if forward else positions


def encode(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, transformers.utils.ModelOutput]:
    """Run vision tower and projector once: {"image": output, "video": output}, as `mm_encoder_outputs` takes them.

    `output.pooler_output` holds the visual tokens in the LLM's hidden size. A kind without pixels has no entry.
    """
    encoded = {}
    for kind, names in PIXELS.items():
        function = getattr(base(model), f"get_{kind}_features", None)
        if function is None or all(inputs.get(name) is None for name in names):
            continue
        names = inspect.signature(function).parameters
        kwargs = {name: inputs[name] for name in names if name != "kwargs" and inputs.get(name) is not None}
        encoded[kind] = function(**kwargs, return_dict=True)
    return encoded


def tower(model: nn.Module) -> nn.Module:
    """The vision tower, which is most of the work of encoding."""
    names = ("vision_tower", "vision_model", "visual")
    return next(getattr(base(model), name) for name in names if hasattr(base(model), name))


def read_of_tower(model: nn.Module, output: transformers.utils.ModelOutput) -> Tensor:
    """The part of the tower's output that the model uses: the projector's input, or in Qwen's towers its output."""
    if policy(model).mrope:
        return output.pooler_output
    layer = getattr(unwrap(model).config, "vision_feature_layer", None)
    return output.last_hidden_state if layer is None else output.hidden_states[layer]


class _EveryLayer:
    """Stands for a tower's tuple of hidden states: every layer index returns the same tensor."""

    def __init__(self, states: Tensor):
        self.states = states

    def __getitem__(self, layer: int) -> Tensor:
        return self.states


def as_tower_output(read: Tensor, deepstack: Tensor | None = None) -> transformers.utils.ModelOutput:
    """An output of which the family reads what `read_of_tower` gave, and DeepStack features [layers, n, D] if any."""
    output = BaseModelOutputWithPooling(last_hidden_state=read, pooler_output=read, hidden_states=_EveryLayer(read))
    if deepstack is not None:
        output.deepstack_features = list(deepstack)
    return output


def entries(output: transformers.utils.ModelOutput) -> list[Tensor]:
    """The entries of `pooler_output`, each [n,D], whatever its container (list, tuple or [entries,n,D])."""
    if output.pooler_output is None:
        raise UserError("this family's encoder does not give projected visual tokens; use evocomp.compress")
    return list(output.pooler_output)


def image_numbers(model: nn.Module, input_ids: Tensor, encoded: Mapping) -> Tensor:
    """Index of the image that each token belongs to -> [B,S]: 0, 1, ... in order of appearance, -1 for text.

    One video counts as one image where the family encodes it as one entry. Raises UserError if the number of
    placeholders differs from the number of encoded tokens.
    """
    rule, visual = policy(model).image, visual_mask(model, input_ids)
    if rule == "entry":
        starts = _entry_starts(model, input_ids, encoded, visual)
    else:
        starts = _run_starts(input_ids, visual, merge_tiles=rule == "tiles")
    return torch.where(visual, starts.flatten().cumsum(0).view_as(starts) - 1, -1)


def _entry_starts(model: nn.Module, input_ids: Tensor, encoded: Mapping, visual: Tensor) -> Tensor:
    """int [B,S]: 1 at the first placeholder of every entry of `pooler_output`."""
    starts = torch.zeros_like(input_ids)
    for kind, token in token_ids(model).items():
        place = (input_ids == token).flatten().nonzero().squeeze(1)
        sizes = [len(rows) for rows in entries(encoded[kind])] if kind in encoded else []
        if sum(sizes) != len(place):
            raise UserError(
                f"the prompt has {len(place)} {kind} placeholders but the vision tower made {sum(sizes)} "
                "tokens; prepare text and images in one call of the model's own processor"
            )
        first = torch.tensor([0, *sizes], device=place.device).cumsum(0)[:-1]
        starts.view(-1)[place[first[torch.tensor(sizes, device=place.device) > 0]]] = 1
    return starts


def _run_starts(input_ids: Tensor, visual: Tensor, merge_tiles: bool) -> Tensor:
    """int [B,S]: 1 at the first placeholder of every run, or of every image made of tiles.

    In Idefics3 and SmolVLM prompts the token before a run identifies the tile, and every image ends with its global
    tile. The last run of a row is therefore a global tile, and the token before it identifies the other global tiles.
    """
    before = torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    starts = visual & ~before
    if not merge_tiles:
        return starts.long()
    names = torch.nn.functional.pad(input_ids, (1, 0), value=-1)[:, :-1]
    for row in range(len(starts)):
        runs = starts[row].nonzero().squeeze(1)
        if len(runs) > 1:
            is_global = names[row, runs] == names[row, runs[-1]]
            starts[row, runs[1:][~is_global[:-1]]] = False
    return starts.long()


def visual_tokens(model: nn.Module, input_ids: Tensor, encoded: Mapping) -> Tensor:
    """Encoded visual tokens in the order of their placeholders, concatenated over the batch -> [total,D]."""
    visual = visual_mask(model, input_ids)
    parts = {kind: torch.cat(entries(output)) for kind, output in encoded.items()}
    if len(parts) == 1:
        return next(iter(parts.values()))
    sample = next(iter(parts.values()))
    tokens = sample.new_empty(int(visual.sum()), sample.shape[-1])
    for kind, rows in parts.items():
        tokens[(input_ids == token_ids(model)[kind])[visual]] = rows
    return tokens


def deepstack_rows(encoded: Mapping) -> Tensor | None:
    """What the first decoder layers add to the visual tokens of images [layers, total, D]; None: nothing."""
    layers = getattr(encoded.get("image"), "deepstack_features", None)
    return None if layers is None else torch.stack([torch.cat(list(layer)) for layer in layers])


def block_ids(model: nn.Module, input_ids: Tensor) -> Tensor | None:
    """The bidirectional block of each token of a prompt without padding [S], -1 for none; None: causal attention.

    Args:
        input_ids: [S].
    """
    kind = policy(model).blocks
    if kind is None:
        return None
    if kind == "prefix":
        return torch.zeros_like(input_ids)
    return runs(visual_mask(model, input_ids))


def runs(visual: Tensor) -> Tensor:
    """Which unbroken run of visual tokens each token belongs to, 0, 1, ..., -1 at text. bool [..., S] -> [..., S]"""
    starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[..., :-1]
    return torch.where(visual, starts.cumsum(-1) - 1, -1)


def newline_rows(model: nn.Module, features: Tensor) -> Tensor:
    """Mask of the rows that are `image_newline` separators: features [n,D] -> bool [n]; all False in most families."""
    if not policy(model).newline:
        return torch.zeros(len(features), dtype=torch.bool, device=features.device)
    newline = base(model).image_newline
    return (features == newline.to(features)).all(-1)
