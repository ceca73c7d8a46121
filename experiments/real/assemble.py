"""Put the model together again from the packages and the small shipped files, without training.

    python -m experiments.real.assemble --out runs/real/model

The packages give SmolLM2 and EfficientNet-Lite2; `weights/` gives projector and LoRA. OUT is an ordinary Hugging
Face folder (LoRA merged, 290 MB) that `evocomp` takes as `--model.name` through `evocomp_real`.
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
    """Compare every shipped file with SHA256SUMS. Raises `UserError` for one that is missing or differs."""
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise UserError(f"{path} is missing or not the file that was shipped; check it out again")


def assemble(folder: Path):
    """The aligned model with LoRA merged, in bfloat16, and its processor; of the size that its gate.json names."""
    if not (folder / "projector.safetensors").is_file():
        raise UserError(f"{folder} holds no projector.safetensors; train one: python -m experiments.real.align")
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
