"""Differences between families of multimodal LLMs that transformers' API does not hide.

Since transformers 5.18 every family offers `get_image_features(...).pooler_output`, `get_decoder()` and
`get_input_embeddings()`, and takes `mm_encoder_outputs`. The other differences are listed here by `config.model_type`.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from evocomp.log import UserError

MIN_TRANSFORMERS = "5.18"


@dataclass(frozen=True)
class Policy:
    """How one family differs from LLaVA.

    newline:   its visual rows contain `image_newline` separators, which are not image content
    mrope:     positions have several rows (Qwen: text, time, height, width)
    deepstack: visual features are added again inside the first decoder layers
    blocks:    attention mask is bidirectional inside an image ("image") or over the whole prompt ("prefix")
    image:     what one image is. "entry": one entry of `pooler_output`; "run": one unbroken run of
               placeholders (its tiles are entries); "tiles": all runs up to the global tile, which comes last
    rewrite_since: first transformers release in which the family accepts fewer visual tokens than its encoder makes
    forward_offset: number that the family's `prepare_inputs_for_generation` adds to `position_ids`
    """

    newline: bool = False
    mrope: bool = False
    deepstack: bool = False
    blocks: Literal["image", "prefix"] | None = None
    image: Literal["entry", "run", "tiles"] = "entry"
    rewrite_since: str = MIN_TRANSFORMERS
    forward_offset: int = 0


FAMILIES: dict[str, Policy] = {
    "llava": Policy(),
    "llava_next": Policy(newline=True),
    "llava_onevision": Policy(newline=True),
    "qwen2_vl": Policy(mrope=True),
    "qwen2_5_vl": Policy(mrope=True),
    "qwen3_vl": Policy(mrope=True, deepstack=True),
    "idefics3": Policy(image="tiles"),
    "smolvlm": Policy(image="tiles", rewrite_since="5.21"),
    "internvl": Policy(image="run"),
    "gemma3": Policy(blocks="image"),
    "paligemma": Policy(blocks="prefix", forward_offset=1),
    "mistral3": Policy(),
}


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper; any other model is returned as it is."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def gathered(weight: Tensor) -> Tensor:
    """The full weight. For a sharded model this is a collective: all processes that hold a shard must call it."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def policy(model: nn.Module) -> Policy:
    """The family's policies. Raises UserError for a family that is not in `FAMILIES`."""
    model_type = getattr(getattr(unwrap(model), "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise UserError(
            f"{type(unwrap(model)).__name__} (model_type {model_type!r}) is not supported; "
            f"use a model of one of these families: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def check_supported(model: nn.Module, rewrite: bool = False) -> None:
    """Raise UserError if the family is unknown or transformers is too old.

    rewrite: check for `compress_inputs`, which passes encoded images with tokens removed; not needed for hooks.
    """
    needed = policy(model).rewrite_since if rewrite else MIN_TRANSFORMERS
    if Version(Version(transformers.__version__).base_version) < Version(needed):
        raise UserError(
            f"transformers {transformers.__version__} is too old; run `pip install 'transformers>={needed}'`"
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
    remembered = getattr(model.base_model, "rope_deltas", None)
    positions = model._prepare_position_ids_for_generation(inputs["input_ids"], known)
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = remembered
    positions = positions.expand(*positions.shape[:-2], *inputs["input_ids"].shape)
    return positions + policy(model).forward_offset if forward else positions


def encode(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, transformers.utils.ModelOutput]:
    """Run vision tower and projector once: {"image": output, "video": output}, as `mm_encoder_outputs` takes them.

    `output.pooler_output` holds the visual tokens in the LLM's hidden size. A kind without pixels has no entry.
    """
    base, encoded = unwrap(model).base_model, {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        function = getattr(base, f"get_{kind}_features", None)
        if inputs.get(pixels) is None or function is None:
            continue
        names = inspect.signature(function).parameters
        kwargs = {name: inputs[name] for name in names if name != "kwargs" and inputs.get(name) is not None}
        encoded[kind] = function(**kwargs, return_dict=True)
    return encoded


def tower(model: nn.Module) -> nn.Module:
    """The vision tower, which takes most of the encoding time."""
    base = unwrap(model).base_model
    return next(getattr(base, name) for name in ("vision_tower", "vision_model", "visual") if hasattr(base, name))


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


def as_tower_output(read: Tensor) -> transformers.utils.ModelOutput:
    """A tower output from which the model uses `read`; the inverse of `read_of_tower`."""
    return BaseModelOutputWithPooling(last_hidden_state=read, pooler_output=read, hidden_states=_EveryLayer(read))


def entries(output: transformers.utils.ModelOutput) -> list[Tensor]:
    """The entries of `pooler_output`, each [n,D], from a list, a tuple or a tensor [entries,n,D]."""
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


def image_features(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Visual tokens of every image (or video), in order of appearance over the batch: list of [n_i,D].

    `inputs` is the processor's output. Rows include `image_newline` separators; see `newline_rows`.
    """
    encoded = encode(model, inputs)
    if not encoded:
        return []
    numbers = image_numbers(model, inputs["input_ids"], encoded)
    counts = numbers[numbers >= 0].bincount().tolist()
    return list(visual_tokens(model, inputs["input_ids"], encoded).split(counts))


def newline_rows(model: nn.Module, features: Tensor) -> Tensor:
    """Mask of the rows that are `image_newline` separators: features [n,D] -> bool [n]; all False in most families."""
    if not policy(model).newline:
        return torch.zeros(len(features), dtype=torch.bool, device=features.device)
    newline = unwrap(model).base_model.image_newline
    return (features == newline.to(features)).all(-1)
