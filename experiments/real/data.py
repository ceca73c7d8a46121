"""Write scenes and their questions to a folder in LLaVA's JSON format, for training and evaluation with `evocomp`.

python -m experiments.real.data --config experiments/real/gpu.yaml --out runs/real/data --seed 31 --count 200
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from evocomp.log import UserError, exit_code
from experiments.real.boards import draw
from experiments.real.photos import SPLITS
from experiments.real.recipe import read_recipe
from experiments.real.scenes import SceneSpec, in_processes

CHUNK = 16


def write_llava(
    out: Path, seed: int, count: int, spec: SceneSpec = SceneSpec(), per_scene: int = 4, processes: int = 0
) -> int:
    """Write data.json and images/ with up to `per_scene` questions about each scene; returns their number."""
    if (out / "data.json").exists():
        raise UserError(f"--out={out} already contains data.json; choose another folder")
    (out / "images").mkdir(parents=True, exist_ok=True)
    work = partial(_write, out, seed, spec, per_scene)
    records = [record for part in in_processes(work, count, CHUNK, processes) for record in part]
    (out / "data.json").write_text(json.dumps(records, indent=0) + "\n")
    return len(records)


def _write(out: Path, seed: int, spec: SceneSpec, per_scene: int, start: int, stop: int) -> list[dict]:
    """Write the images of some scenes; returns the records of their questions."""
    records = []
    for index in range(start, stop):
        scene = draw(seed, index, spec)
        name = f"images/{seed}-{index}.png"
        Image.fromarray(scene.image).save(out / name, compress_level=1)
        order = np.random.default_rng([seed, index, 1]).permutation(len(scene.questions))
        for number in order[:per_scene]:
            question = scene.questions[number]
            turns = [
                {"from": "human", "value": f"<image>\n{question.text}"},
                {"from": "gpt", "value": question.answer},
            ]
            records.append(
                {"id": f"{seed}-{index}-{number}", "image": name, "kind": question.kind, "conversations": turns}
            )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=None, help="recipe of the alignment, for scenes of that kind")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--per-scene", type=int, default=4)
    parser.add_argument("--split", choices=SPLITS, default="train", help="split of the photographs")
    args = parser.parse_args()
    recipe = read_recipe(args.config)
    written = write_llava(args.out, args.seed, args.count, recipe.spec(args.split), args.per_scene, recipe.processes)
    print(f"{written} questions in {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main, "data"))
