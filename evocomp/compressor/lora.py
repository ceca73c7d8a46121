"""A compressor as a small adapter: LoRA on the copied layer, trained and saved without the layer itself.

The layer's weights come from the target LLM, which is present wherever the compressor is used; only the
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


def add_lora(
    compressor: EvoCompCompressor, r: int = 16, alpha: float | None = None, dropout: float = 0.0
) -> PeftModel:
    """Freeze the layer and train rank-`r` updates of its matrices, the head and the budget vectors.

    alpha: LoRA scale, default 2 r. Raises UserError for a compressor that did not start from an LLM layer.
    """
    if compressor.config.init_layer is None:
        raise UserError(
            "LoRA needs a compressor that started from the LLM's layer; "
            "make it with EvoCompCompressor.from_mllm(model, layer=0)"
        )
    whole = ["score"] + [name for name in ("head_norm", "budget") if _has_weights(getattr(compressor, name))]
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=whole,
        modules_to_save=whole,
    )
    return get_peft_model(compressor, config)


def _has_weights(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())


def save_lora(compressor: PeftModel, folder: str | Path) -> None:
    """Write adapter and compressor configuration to `folder`, in PEFT's format."""
    compressor.save_pretrained(folder)
    compressor.get_base_model().config.save_pretrained(folder)


def is_lora(path: str | Path) -> bool:
    """Whether a folder or hub id holds an adapter, as `save_lora` writes it, and not a whole compressor."""
    return cached_file(path, "adapter_config.json", _raise_exceptions_for_missing_entries=False) is not None


def load_lora(folder: str | Path, model: nn.Module, trainable: bool = False) -> PeftModel:
    """The compressor of `save_lora`, on a fresh copy of the layer of `model`, the MLLM that it was trained
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
    """Fold the updates into the layer: an ordinary compressor, to be saved with `save_pretrained`."""
    return compressor.merge_and_unload()
