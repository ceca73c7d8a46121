"""Configuration of a compressor: everything that `save_pretrained` stores."""

import copy
import math
from typing import Any

from torch import nn
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from evocomp.log import UserError
from evocomp.mllm.families import unwrap


class EvoCompConfig(PreTrainedConfig):
    """Configuration of `EvoCompCompressor`.

    text_config:   text configuration of the target LLM, which defines the layer's architecture
    num_layers:    decoder layers in the compressor (the paper uses 1)
    width:         hidden size of the compressor's layers, after a linear projection; 0: that of the LLM (the paper).
                   Heads keep their size, so it must be a multiple of hidden size / heads
    use_text:      whether the compressor reads the prompt in addition to the visual tokens
    head_norm:     "layer": LayerNorm before the linear head; "none": no normalisation
    budget_input:  whether the requested number of kept tokens is an input
    balance_text:  whether prompt and image start with equal shares of the attention, independent of their lengths
    dither:        scale of the fixed noise that is added to the scores before top-r (see keep.py); 0: none
    sharp:         maximum number of selected tokens, below 1 a fraction of N; the other kept tokens are means of
                   dropped tokens (see evocomp/mllm/context.py); 0: all kept tokens are selected
    hedge:         fraction of the selected tokens that a training-free order chooses among the rest; 0: none
    hedge_by:      name of that order (see evocomp/selection/priority.py)
    positions:     "original" or "dense": position ids of the kept tokens in the LLM, as used for the labels
    keep:          default number of tokens to keep per image (int), or fraction in (0, 1] (float)
    prune_layer:   decoder layer before which tokens are dropped (the paper's l)
    init_layer:    decoder layer of the LLM from which the weights were initialised, None for random weights
    base_model_name_or_path: the multimodal LLM that the compressor was made for
    metadata:      additional entries of the model card, for example data, label settings, results
    """

    model_type = "evocomp"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict | None = None,
        num_layers: int = 1,
        width: int = 0,
        use_text: bool = True,
        head_norm: str = "layer",
        budget_input: bool = False,
        balance_text: bool = False,
        dither: float = 0.0,
        sharp: float = 0.0,
        hedge: float = 0.0,
        hedge_by: str = "cls_attention",
        positions: str = "original",
        keep: int | float = 192,
        prune_layer: int = 0,
        init_layer: int | None = None,
        base_model_name_or_path: str | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs,
    ):
        text_config = _text_config(text_config)
        if head_norm not in ("layer", "none"):
            raise UserError(f"head_norm is {head_norm!r}; use 'layer' or 'none'")
        if positions not in ("original", "dense"):
            raise UserError(f"positions is {positions!r}; use 'original' or 'dense'")
        _check_numbers(
            num_layers=(num_layers, int, 1, 1000),
            width=(width, int, -(10**6), 10**6),
            dither=(dither, float, 0, 10**6),
            sharp=(sharp, float, 0, 10**9),
            hedge=(hedge, float, 0, 1),
            keep=(keep, float, 0, 10**9),
            prune_layer=(prune_layer, int, 0, 10**6),
            init_layer=(init_layer or 0, int, 0, 10**6),
            use_text=(use_text, bool, 0, 1),
            budget_input=(budget_input, bool, 0, 1),
            balance_text=(balance_text, bool, 0, 1),
        )
        for name, value in (("hedge_by", hedge_by), ("base_model_name_or_path", base_model_name_or_path or "")):
            if not isinstance(value, str):
                raise UserError(f"compressor configuration: {name} is {_shown(value)}; it must be text")
        if metadata is not None and not isinstance(metadata, dict):
            raise UserError(f"compressor configuration: metadata is {_shown(metadata)}; it must be a mapping")
        if not 0 <= hedge < 1:
            raise UserError(f"hedge is {hedge!r}; give a fraction of the selected tokens, at least 0 and below 1")
        if width:
            _check_width(text_config, width)
        self.text_config = text_config
        self.num_layers = num_layers
        self.width = width
        self.use_text = use_text
        self.head_norm = head_norm
        self.budget_input = budget_input
        self.balance_text = balance_text
        self.dither = dither
        self.sharp = sharp
        self.hedge = hedge
        self.hedge_by = hedge_by
        self.positions = positions
        self.keep = keep
        self.prune_layer = prune_layer
        self.init_layer = init_layer
        self.base_model_name_or_path = base_model_name_or_path
        self.metadata = metadata or {}
        try:
            super().__init__(**kwargs)
        except Exception as error:  # transformers validates only some of its own fields
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"compressor configuration: {type(error).__name__}: {reason}") from None

    @property
    def hidden_size(self) -> int:
        """D, the hidden size of the target LLM."""
        return self.text_config.hidden_size

    @property
    def layer_size(self) -> int:
        """W, the hidden size of the compressor's layers: `width`, or D if that is 0."""
        return self.width or self.hidden_size

    @classmethod
    def from_mllm(cls, model: nn.Module, **kwargs) -> "EvoCompConfig":
        """Configuration for the decoder of a multimodal LLM (transformers model, PEFT-wrapped or not)."""
        config = unwrap(model).config
        kwargs.setdefault("base_model_name_or_path", getattr(config, "_name_or_path", None) or None)
        return cls(text_config=copy.deepcopy(config.get_text_config(decoder=True)), **kwargs)


def _text_config(given: PreTrainedConfig | dict | None) -> PreTrainedConfig:
    """The LLM's text configuration. Raises UserError for a type that is unknown, or sizes that no layer can have."""
    if isinstance(given, dict):
        try:
            given = AutoConfig.for_model(**given)
        except Exception as error:  # a configuration with fields of wrong types raises whatever it meets
            line = " ".join(str(error).split())[:200]
            raise UserError(f"compressor configuration: text_config cannot be used ({line})") from None
    text = LlamaConfig() if given is None else given
    if not isinstance(text, PreTrainedConfig):
        raise UserError(f"compressor configuration: text_config is {_shown(text)}; it must be a mapping")
    sizes = {"hidden_size": 10**6, "num_attention_heads": 10**5, "intermediate_size": 10**7}
    sizes = {name: most for name, most in sizes.items() if getattr(text, name, None) is not None}
    if getattr(text, "num_key_value_heads", None) is not None:
        sizes["num_key_value_heads"] = 10**5
    _check_numbers(**{f"text_config.{name}": (getattr(text, name), int, 1, most) for name, most in sizes.items()})
    return text


def _check_numbers(**given: tuple[Any, type, float, float]) -> None:
    """Raises UserError for a field (value, type, least, most) of another type or outside of its bounds."""
    for name, (value, kind, least, most) in given.items():
        is_bool = isinstance(value, bool)
        right = is_bool if kind is bool else not is_bool and isinstance(value, int if kind is int else int | float)
        if not right or not least <= value <= most:  # false for NaN
            what = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            bounds = "" if kind is bool else f" from {least} to {most}"
            raise UserError(f"compressor configuration: {name} is {_shown(value)}; it must be {what}{bounds}")


def _shown(value: Any) -> str:
    """A value for a message."""
    try:
        return repr(value)[:80]
    except ValueError:
        return "a number of thousands of digits"


def _check_width(text: PreTrainedConfig, width: int) -> None:
    """Raise UserError unless the width is a whole number of the LLM's heads."""
    step = text.hidden_size // math.gcd(text.hidden_size, text.num_attention_heads)
    if not 0 < width < text.hidden_size or width % step:
        raise UserError(
            f"compressor width {width}: must be a multiple of {step} below {text.hidden_size}, the LLM's hidden size "
            "(0 = that size)"
        )


def _narrow(text: PreTrainedConfig, width: int) -> None:
    """Reduce the number of heads of the same size, and all other sizes in proportion."""
    size, heads = text.hidden_size, text.num_attention_heads
    shared = heads // (getattr(text, "num_key_value_heads", None) or heads)  # number of query heads per key head
    text.head_dim = getattr(text, "head_dim", None) or size // heads
    text.hidden_size, text.num_attention_heads = width, heads * width // size
    text.intermediate_size = 8 * math.ceil(text.intermediate_size * width / size / 8)
    divides = text.num_attention_heads % shared == 0
    text.num_key_value_heads = text.num_attention_heads // (shared if divides else 1)


def layer_config(config: EvoCompConfig) -> PreTrainedConfig:
    """Text configuration of the compressor's layers: few layers, bidirectional, no vocabulary, no cache."""
    text = copy.deepcopy(config.text_config)
    if config.width:
        _narrow(text, config.width)
    text.num_hidden_layers, text.is_causal, text.use_cache = config.num_layers, False, False
    # transformers warns or fails if special token ids are outside of a vocabulary of size one
    text.vocab_size, text.pad_token_id, text.bos_token_id, text.eos_token_id = 1, None, None, None
    text.tie_word_embeddings = False
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * config.num_layers
    return text


AutoConfig.register("evocomp", EvoCompConfig)
