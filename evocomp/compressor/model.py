"""The compressor: the target LLM's own decoder layer made bidirectional, a skip connection and a linear head.

Source: EvoComp, arXiv 2604.17087, section on the compressor. The budget input is our addition.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from evocomp.compressor.config import EvoCompConfig, layer_config
from evocomp.log import UserError
from evocomp.mllm.families import decoder, gathered
from evocomp.mllm.weights import load_complete


@dataclass
class CompressorOutput(ModelOutput):
    """What `EvoCompCompressor` returns.

    logits: [B,N] retention scores before the sigmoid
    hidden: [B,N,W] layer output plus skip connection, before the head's norm; W is `width`, or D if that is 0
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None


class BudgetInput(nn.Module):
    """Budget input: adds log2(R / 16) times a learned vector, initially zero, for R kept tokens."""

    def __init__(self, hidden_size: int, use_text: bool):
        super().__init__()
        self.visual = nn.Parameter(torch.zeros(hidden_size))
        # without text this vector would get no gradient, which is an error in DDP
        self.text = nn.Parameter(torch.zeros(hidden_size)) if use_text else None

    def forward(self, visual: Tensor, prompt: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """visual [B,N,D], prompt [B,T,D], kept [B] -> visual and prompt with the budget added."""
        level = torch.log2(kept / 16).to(visual.dtype)[:, None, None]
        return visual + level * self.visual, prompt if self.text is None else prompt + level * self.text


class EvoCompCompressor(PreTrainedModel):
    """Scores visual tokens by their importance for a prompt.

    New weights are normal with standard deviation 0.7 / sqrt(fan-in); `init_from_layer` copies a layer of the LLM
    instead.
    """

    config_class = EvoCompConfig
    base_model_prefix = "evocomp"
    main_input_name = "visual"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    supports_gradient_checkpointing = True
    # float32, so that nearly equal scores do not tie
    _keep_in_fp32_modules_strict = {"score", "head_norm"}

    def __init__(self, config: EvoCompConfig):
        super().__init__(config)
        self.encoder = AutoModel.from_config(layer_config(config))
        self.encoder.embed_tokens = None
        self.encoder.norm = nn.Identity()
        size = config.layer_size
        self.narrow = nn.Linear(config.hidden_size, size, bias=False) if config.width else nn.Identity()
        self.head_norm = nn.LayerNorm(size) if config.head_norm == "layer" else nn.Identity()
        self.score = nn.Linear(size, 1)
        self.budget = BudgetInput(size, config.use_text) if config.budget_input else None
        self.post_init()
        self.reset_layers()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **options: Any) -> Any:
        """Load what `save_pretrained` wrote, from a folder or hub id; keywords as in transformers.

        Raises:
            UserError: tensors are missing, of other shapes, superfluous or not finite.
        """
        with_info = options.pop("output_loading_info", False)
        for name in ("ignore_mismatched_sizes", "trust_remote_code"):
            options.pop(name, None)
        options = {"use_safetensors": True, **options}
        load = partial(super().from_pretrained, pretrained_model_name_or_path, *args)
        compressor = load_complete(load, f"the compressor in {pretrained_model_name_or_path}", **options)
        nothing = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (compressor, nothing) if with_info else compressor

    @property
    def hidden_size(self) -> int:
        """D, the hidden size of the target LLM."""
        return self.config.hidden_size

    @torch.no_grad()
    def reset_layers(self) -> None:
        """Initialise all matrices of layers and head with normal weights of standard deviation 0.7 / sqrt(fan-in), the
        projection to `width` with 1 / sqrt(fan-in), which preserves norms (Johnson-Lindenstrauss)."""
        for weight in [*self.encoder.layers.parameters(), self.score.weight]:
            if weight.ndim == 2:
                weight.normal_(0.0, 0.7 / math.sqrt(weight.shape[1]))
        for weight in self.narrow.parameters():
            weight.normal_(0.0, 1 / math.sqrt(weight.shape[1]))

    def forward(
        self,
        visual: Tensor,
        prompt: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        visual_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        budget: Tensor | float | None = None,
    ) -> CompressorOutput:
        """Score visual tokens.

        visual, prompt: [B,N,D] and [B,T,D]
        masks: bool [B,T] and [B,N], True at real tokens; padding may be anywhere and has no influence
        position_ids: [B,N+T], or [3,B,N+T] / [4,B,N+T] for M-RoPE; by default 1..n for the n real visual
            tokens, then n+1.. for the prompt
        budget: number of tokens to keep, float [B] or one number; required with `budget_input`
        """
        batch, n_visual, _ = visual.shape
        if prompt is None or not self.config.use_text:
            prompt, prompt_mask = visual.new_zeros(batch, 0, visual.shape[-1]), None
        visual, prompt = self.narrow(visual), self.narrow(prompt)
        source = torch.cat(self._with_budget(visual, prompt, budget), dim=1)
        if visual_mask is None and prompt_mask is None:
            mask = None
        else:
            mask = torch.cat([_mask_or_ones(visual_mask, visual), _mask_or_ones(prompt_mask, prompt)], dim=1)
        if position_ids is None:
            position_ids = self._default_positions(source, mask)
        if self.config.balance_text and prompt.shape[1]:
            mask = self._balanced(mask, source, n_visual)
        out = self.encoder(inputs_embeds=source, attention_mask=mask, position_ids=position_ids)
        hidden = out.last_hidden_state[:, :n_visual] + visual
        logits = self.score(self.head_norm(hidden.to(self.score.weight.dtype))).squeeze(-1)
        return CompressorOutput(logits=logits, hidden=hidden)

    @staticmethod
    def _balanced(mask: Tensor | None, source: Tensor, n_visual: int) -> Tensor:
        """Bias of the attention logits [B,1,1,N+T]: log(n/t) at the t text tokens, so that text and image start with
        equal shares of the attention; minus infinity at padding."""
        real = _mask_or_ones(mask, source)
        text = real[:, n_visual:].sum(1, keepdim=True).clamp(min=1)
        bias = source.new_zeros(real.shape, dtype=torch.float32)
        bias[:, n_visual:] = torch.log(real[:, :n_visual].sum(1, keepdim=True).clamp(min=1) / text)
        dtype = torch.get_autocast_dtype(source.device.type) if _autocast(source) else source.dtype
        return bias.to(dtype).masked_fill(~real, torch.finfo(dtype).min)[:, None, None]

    def _with_budget(self, visual: Tensor, prompt: Tensor, budget: Tensor | float | None):
        if self.budget is None:
            return visual, prompt
        if budget is None:
            raise ValueError("this compressor has budget_input=True: pass budget=, the number of kept tokens")
        kept = torch.as_tensor(budget, dtype=torch.float32, device=visual.device).clamp(min=1)
        return self.budget(visual, prompt, kept.expand(len(visual)))

    @staticmethod
    def _default_positions(source: Tensor, mask: Tensor | None) -> Tensor:
        """1, 2, ... over the real tokens, [B,N+T]."""
        if mask is None:
            return torch.arange(1, source.shape[1] + 1, device=source.device).expand(len(source), -1)
        return mask.long().cumsum(1).clamp(min=1)

    def init_from_layer(self, model: nn.Module, layer: int = 0) -> "EvoCompCompressor":
        """Copy the weights of decoder layers `layer`, `layer` + 1, ... of a multimodal LLM. Returns self.

        Raises:
            UserError: this compressor is narrower than the LLM.
        """
        if self.config.width:
            raise UserError(f"a layer of the LLM does not fit into width {self.config.width}; use layer=None")
        source = decoder(model).layers
        for offset, target in enumerate(self.encoder.layers):
            state = {key: gathered(value) for key, value in source[layer + offset].state_dict().items()}
            target.load_state_dict(state, strict=True)
        self.config.init_layer = layer
        return self

    @classmethod
    def from_mllm(cls, model: nn.Module, layer: int | None = None, **kwargs) -> "EvoCompCompressor":
        """Create a compressor for a multimodal LLM from its decoder layer `layer`, or with random weights (None).

        Further keyword arguments are passed to `EvoCompConfig`.
        """
        compressor = cls(EvoCompConfig.from_mllm(model, **kwargs))
        return compressor if layer is None else compressor.init_from_layer(model, layer)


def _autocast(tokens: Tensor) -> bool:
    """Whether autocast is on, so that queries and attention bias have another dtype than the input."""
    return torch.is_autocast_enabled(tokens.device.type)


def _mask_or_ones(mask: Tensor | None, tokens: Tensor) -> Tensor:
    return tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()


AutoModel.register(EvoCompConfig, EvoCompCompressor)
