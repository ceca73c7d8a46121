"""What differs between families of multimodal LLMs: a table of known families, and a policy derived from the model.

The table is keyed by `config.model_type`. For a family that it does not hold, `derive` reads the policy off the model's
configuration and signatures; `evocomp.inference.self_check` then checks it on the first prompt.
"""

import inspect
import weakref
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from evocomp.log import UserError

MIN_TRANSFORMERS = "5.23"
"""The oldest version that passes the tests, as in pyproject.toml; `.ci/versions` tests with it and with the newest."""


@dataclass(frozen=True)
class Policy:
    """How one family departs from the plain case (LLaVA).

    newline:   its visual rows contain `image_newline` separators, which are no picture content
    mrope:     positions have several rows (Qwen: text, time, height, width)
    deepstack: visual features are added again inside the first decoder layers
    blocks:    attention mask is bidirectional inside an image ("image"), the same in layers with a sliding window only
               ("sliding"), or over the whole prompt ("prefix")
    image:     what one image is. "entry": one entry of `pooler_output`; "run": one unbroken run of
               placeholders (its tiles are entries); "tiles": all runs up to the global tile, which comes last
    forward_offset: added to `position_ids` by the family's own `prepare_inputs_for_generation`
    """

    newline: bool = False
    mrope: bool = False
    deepstack: bool = False
    blocks: Literal["image", "sliding", "prefix"] | None = None
    image: Literal["entry", "run", "tiles"] = "entry"
    forward_offset: int = 0


FAMILIES: dict[str, Policy] = {
    "llava": Policy(),
    "llava_next": Policy(newline=True),
    "llava_onevision": Policy(newline=True),
    "qwen2_vl": Policy(mrope=True),
    "qwen2_5_vl": Policy(mrope=True),
    "qwen3_vl": Policy(mrope=True, deepstack=True),
    "idefics3": Policy(image="tiles"),
    "smolvlm": Policy(image="tiles"),
    "internvl": Policy(image="run"),
    "gemma3": Policy(blocks="image"),
    "paligemma": Policy(blocks="prefix", forward_offset=1),
    "mistral3": Policy(),
    "llama4": Policy(image="run"),  # its encoder's `pooler_output` is None
}

_DERIVED: weakref.WeakKeyDictionary[nn.Module, Policy] = weakref.WeakKeyDictionary()


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper; any other model is returned as it is."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def base(model: nn.Module) -> nn.Module:
    """The module that encodes images and merges them into the embeddings.

    It is `base_model`, or the model itself where that one is the decoder alone (Qwen2.5-Omni) or does not exist.
    """
    model = unwrap(model)
    return model.base_model if hasattr(model.base_model, "get_image_features") else model


def decoder(model: nn.Module) -> nn.Module:
    """The module that holds the decoder layers in `layers`, unwrapped from a language model around it.

    Raises:
        UserError: there is none.
    """
    found = unwrap(model).get_decoder()
    while not isinstance(getattr(found, "layers", None), nn.ModuleList):
        inner = [getattr(found, name, None) for name in ("model", "decoder", "language_model")]
        inner = [module for module in inner if isinstance(module, nn.Module) and module is not found]
        if not inner:
            raise UserError(f"{_name(model)} has no decoder with `layers`; use another model")
        found = inner[0]
    return found


def in_table(model: nn.Module) -> bool:
    """Whether the family is one of `FAMILIES`."""
    return getattr(getattr(unwrap(model), "config", None), "model_type", None) in FAMILIES


def policy(model: nn.Module) -> Policy:
    """The family's policies, from the table or derived from the model. Raises UserError as `derive`."""
    model = unwrap(model)
    if in_table(model):
        return FAMILIES[model.config.model_type]
    if model not in _DERIVED:
        _DERIVED[model] = derive(model)
    return _DERIVED[model]


def derive(model: nn.Module) -> Policy:
    """A policy from the model's configuration and signatures.

    Raises:
        UserError: its images are not tokens of a decoder's input: encoder-decoders, decoders with cross-attention, and
            what is no image-text-to-text model of transformers.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise UserError(
            f"{_name(model)} is not supported; use an image-text-to-text model of transformers, of one of these "
            f"families or a similar one: {', '.join(FAMILIES)}"
        )
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise UserError(
            f"{_name(model)} is an encoder-decoder: its decoder reads images by cross-attention and has no visual "
            "tokens to drop; use a decoder-only model"
        )
    if _has_cross_attention(model):
        raise UserError(
            f"{_name(model)} reads images by cross-attention and has no visual tokens to drop; use a model whose "
            "images are part of the LLM input"
        )
    own = base(model)
    given = inspect.signature(type(own).forward).parameters
    if not hasattr(own, "get_image_features") or "mm_encoder_outputs" not in given:
        raise UserError(
            f"{_name(model)} is not supported: it takes no encoded images (`mm_encoder_outputs`); use another model"
        )
    if getattr(config, "image_token_id", None) is None:
        raise UserError(f"{_name(model)} is not supported: its configuration has no image_token_id; use another model")
    reads = inspect.signature(type(decoder(model)).forward).parameters
    return Policy(
        newline=isinstance(getattr(own, "image_newline", None), Tensor),
        mrope=hasattr(own, "get_rope_index") or _has_mrope(decoder(model).config),
        deepstack="deepstack_visual_embeds" in reads,
        blocks="sliding" if getattr(text, "use_bidirectional_attention", None) == "vision" else None,
    )


def _name(model: nn.Module) -> str:
    config = getattr(unwrap(model), "config", None)
    return f"{type(unwrap(model)).__name__} (model_type {getattr(config, 'model_type', None)!r})"


def _has_cross_attention(model: nn.Module) -> bool:
    config = model.config.get_text_config()
    if getattr(config, "cross_attention_layers", None) or getattr(config, "add_cross_attention", False):
        return True
    # a projector with cross-attention (Q-Former) makes visual tokens
    names = [name for name, _ in decoder(model).named_modules()]
    return any(part in name for name in names for part in ("cross_attn", "crossattention", "encoder_attn"))


def _has_mrope(config) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return any("mrope_section" in part for part in (rope, *rope.values()) if isinstance(part, dict))
