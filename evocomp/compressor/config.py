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
        if text_config is None:
            text_config = LlamaConfig()
        elif isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        if head_norm not in ("layer", "none"):
            raise UserError(f"head_norm is {head_norm!r}; use 'layer' or 'none'")
        if positions not in ("original", "dense"):
            raise UserError(f"positions is {positions!r}; use 'original' or 'dense'")
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
        super().__init__(**kwargs)

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
