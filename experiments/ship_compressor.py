"""Save the compressor of a run in float16 with its model card, and measure the effect of the rounding.

    python experiments/ship_compressor.py --run runs/nano_long --out evocomp/assets/nano_compressor

The questions are the test split of `study/runs.yaml`, which was not used for choices.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from evocomp.compressor.model import EvoCompCompressor
from evocomp.config.load import load
from evocomp.data.splits import test_questions
from evocomp.evaluation.panel import Panel
from evocomp.log import UserError, exit_code
from evocomp.mllm.hf import FrozenMLLM

LARGEST = 2**20  # limit of the total size of all files [bytes]


def halve(source: Path, out: Path) -> None:
    """Copy a compressor with its weights in float16; loading converts them to float32."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "README.md", out / "README.md")
    config = json.loads((source / "config.json").read_text())
    config["text_config"].pop("_name_or_path", None)  # a path on the machine that trained it
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = load_file(source / "model.safetensors")
    save_file({name: value.half() for name, value in state.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


@torch.inference_mode()
def shares(folders: dict[str, Path], run: Path, kept: list[int]) -> dict[str, list[float]]:
    """Accuracy of each compressor at each number of kept tokens, in percent of the accuracy with all tokens.

    Questions of the type `relation` are reported separately, with their accuracy in percent.
    """
    study = OmegaConf.load(Path(__file__).parent / "study" / "runs.yaml")
    config = load([run / "config.yaml"])
    examples = test_questions(config.data, study.questions, study.scenes.test)
    panel = Panel(FrozenMLLM.load(config.model.name), examples, batch=200, max_new_tokens=1)
    plain = np.array([example.kind != "relation" for example in examples])
    full = np.asarray(panel.full().correct)
    found = {}
    for name, folder in folders.items():
        compressor = EvoCompCompressor.from_pretrained(folder).float().eval()
        right = [np.asarray(panel.compressor(compressor, count).correct) for count in kept]
        found[name] = [100 * one[plain].mean() / full[plain].mean() for one in right]
        found[f"{name}, `relation` (accuracy)"] = [100 * one[~plain].mean() for one in right]
    found["questions"] = [int(plain.sum()), int((~plain).sum())]
    return found


def table(found: dict[str, list[float]], kept: list[int]) -> str:
    plain, relation = found.pop("questions")
    what = f"{plain} new questions without the type `relation`: accuracy in % of the accuracy with all tokens."
    lines = [f"\n## Rounding to float16\n\n{what} {relation} questions of the type\n`relation`: accuracy in %.\n"]
    lines += ["| kept tokens | " + " | ".join(map(str, kept)) + " |", "| --- |" + " ---: |" * len(kept)]
    lines += [f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |" for name, values in found.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source, kept = args.run / "compressor", [48, 32, 16, 8, 4]
    if not (source / "model.safetensors").is_file():
        raise UserError(f"--run={args.run} has no trained compressor; give a finished run folder")
    halve(source, args.out)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    if size > LARGEST:
        raise UserError(f"{args.out} takes {size} bytes, more than the limit of {LARGEST}; train a narrower compressor")
    text = table(shares({"float32": source, "float16": args.out}, args.run, kept), kept)
    with (args.out / "README.md").open("a") as card:
        card.write(text)
    print(f"{size} bytes in {args.out}\n{text}")


if __name__ == "__main__":
    sys.exit(exit_code(main, "ship_compressor"))
