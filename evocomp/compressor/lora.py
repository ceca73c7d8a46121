"""A compressor as a small adapter: LoRA on the copied LLM layer, saved without the layer itself.

The layer's weights are those of the target LLM, which is always available where the compressor is used. Only the
low-rank updates, the head and the budget vectors are stored (a few MB instead of hundreds for a 7B model).
"""

from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers.utils import cached_file

from evocomp.compressor.config import EvoCompConfig
from evocomp.compressor.model import EvoCompCompressor
from evocomp.log import UserError
from evocomp.mllm.weights import check_finite_weights


def add_lora(compressor: EvoCompCompressor, r: int = 16, alpha: float | None = None, dropout: float = 0.0) -> PeftModel:
    """Freeze the layer and train rank-`r` updates of its matrices, the head and the budget vectors.

    alpha: LoRA scale, default 2 r. Raises UserError for a compressor that was not initialised from an LLM layer.
    """
    if compressor.config.init_layer is None:
        raise UserError(
            "LoRA needs a compressor that was initialised from a layer of the LLM; "
            "make it with EvoCompCompressor.from_mllm(model, layer=0)"
        )
    trained = ["score"] + [name for name in ("head_norm", "budget") if _has_weights(getattr(compressor, name))]
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=trained,
        modules_to_save=trained,
    )
    return get_peft_model(compressor, config)


def _has_weights(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())


def save_lora(compressor: PeftModel, folder: str | Path) -> None:
    """Write adapter and compressor configuration to `folder`, in PEFT's format."""
    compressor.save_pretrained(folder)
    compressor.get_base_model().config.save_pretrained(folder)


def is_lora(path: str | Path) -> bool:
    """Whether a folder or hub id holds an adapter written by `save_lora`, not a full compressor."""
    return cached_file(path, "adapter_config.json", _raise_exceptions_for_missing_entries=False) is not None


def load_lora(folder: str | Path, model: nn.Module, trainable: bool = False) -> PeftModel:
    """Load a compressor saved by `save_lora`, on a copy of the layer of `model`, the MLLM that it was trained
    for."""
    config = EvoCompConfig.from_pretrained(folder)
    compressor = EvoCompCompressor(config).init_from_layer(model, config.init_layer)
    adapter = PeftModel.from_pretrained(compressor, folder, is_trainable=trainable)
    stored, expected = set(load_peft_weights(str(folder), device="cpu")), set(get_peft_model_state_dict(adapter))
    if stored != expected:
        first = sorted(stored ^ expected)[0]
        raise UserError(f"the adapter in {folder} does not fit its configuration (tensor {first}); copy it again")
    check_finite_weights(adapter, f"the adapter in {folder}", "copy or train it again")
    return adapter


def merge_lora(compressor: PeftModel) -> EvoCompCompressor:
    """Merge the updates into the layer; returns an ordinary compressor, which `save_pretrained` can save."""
    return compressor.merge_and_unload()
