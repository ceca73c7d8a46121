"""Copy the small results of a finished run: projector, LoRA and compressor in float16, gate figures, checksums.

python -m experiments.real.ship --run runs/real_gpu --out experiments/real/weights
"""

import argparse
import hashlib
import shutil
import sys
from pathlib import Path

from evocomp.log import exit_code
from experiments.ship_compressor import halve

LARGEST = 8 * 2**20  # bytes
LEARNED = ("gate.json", "projector.safetensors", "lora/adapter_config.json", "lora/adapter_model.safetensors")


def ship(run: Path, out: Path, recipe: str = "plus") -> list[Path]:
    """Copy the learned weights; returns the files. Raises ValueError for a file over 8 MB."""
    for name in LEARNED:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, out / name)
    source, folder = run / recipe / "compressor", out / "compressor"
    if source.is_dir():
        halve(source, folder)
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    large = [path for path in files if path.stat().st_size > LARGEST]
    if large:
        raise ValueError(f"{large[0]} is larger than {LARGEST} bytes")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(out)}" for path in files]
    (out / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for path in ship(args.run, args.out):
        print(f"{path.stat().st_size:9d}  {path}")


if __name__ == "__main__":
    sys.exit(exit_code(main, "ship"))
