"""Assemble the aligned model from the packages and the shipped weights, without training.

    python -m experiments.real.assemble --out runs/real/model

SmolLM2 and EfficientNet-Lite2 come from the packages, projector and LoRA from `weights/`. OUT is an ordinary Hugging
Face folder (LoRA merged, 290 MB) for `--model.name` of `evocomp_real`.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel

from evocomp.log import UserError, exit_code
from experiments.real.model import build_real, load_eyes, real_processor

WEIGHTS = Path(__file__).parent / "weights"


def check_sums(folder: Path) -> None:
    """Compare all shipped files with SHA256SUMS. Raises `UserError` for a file that is missing or differs."""
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise UserError(f"{path} is missing or differs from the shipped file; check it out again")


def assemble(folder: Path):
    """The aligned model with LoRA merged, in bfloat16, and its processor, of the size given in gate.json."""
    if not (folder / "projector.safetensors").is_file():
        raise UserError(f"{folder} has no projector.safetensors; train it with python -m experiments.real.align")
    recipe = json.loads((folder / "gate.json").read_text())["recipe"]
    model = build_real(recipe["side"], recipe["size"], torch.float32)
    load_eyes(model, folder / "projector.safetensors")
    merged = PeftModel.from_pretrained(model, folder / "lora").merge_and_unload()
    return merged.to(torch.bfloat16).eval(), real_processor(model.config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/real/model"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    if (args.weights / "SHA256SUMS").is_file():
        check_sums(args.weights)
    model, processor = assemble(args.weights)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(exit_code(main, "assemble"))
