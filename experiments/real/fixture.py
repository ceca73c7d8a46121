"""Make the test fixture: part of the real vocabulary, a closed-form projector, features of a few scenes.

    python -m experiments.real.fixture --out experiments/real/vocabulary

With 849 named pictures and 196 tokens per image the task is so hard for the CNN that some of its tokens are nearest to
rows of the vocabulary that are not words.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from evocomp.grouping.vocabulary import nearest_words
from evocomp.log import exit_code
from experiments.real.features import encode_scenes, scene_words
from experiments.real.model import build_real, real_processor
from experiments.real.ridge import ridge_projector, vocabulary_masks
from experiments.real.scenes import SceneSpec, all_names
from experiments.real.smollm2 import cache_folder

ROWS, SIDE, SCENES = 2048, 14, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=1000)
    args = parser.parse_args()
    spec = SceneSpec(names=all_names())
    model = build_real(SIDE)
    tokenizer, table = real_processor(model.config).tokenizer, model.get_input_embeddings().weight.detach().float()
    train, test = (
        encode_scenes(model.model.vision_tower, seed, count, spec, cache_folder())
        for seed, count in ((1, args.scenes), (2, 60))
    )
    mean, scale, weight, bias = ridge_projector(train, spec, tokenizer, table)
    # fold the statistics into the map: one matrix from raw features to word embeddings
    weight, bias = scale[:, None] * weight, bias - (mean * scale) @ weight
    tokens = test.raw.float() @ weight + bias
    masks = vocabulary_masks(tokenizer, table)
    words = scene_words(spec)
    wanted = {i for word in words for i in tokenizer(" " + word, add_special_tokens=False).input_ids}
    for picture in tokens[:20]:
        for allowed in masks.values():
            wanted |= set(nearest_words(picture, table, allowed)[0].tolist())
    wanted |= set(tokenizer.get_added_vocab().values())
    rest = np.random.default_rng(0).permutation(sorted(set(range(len(tokenizer))) - wanted))
    rows = sorted([*wanted, *rest.tolist()[: max(0, ROWS - len(wanted))]])
    chosen = [i for i, scene in enumerate(test.scenes) if len(scene.items) >= 3][:SCENES]
    args.out.mkdir(parents=True, exist_ok=True)
    tensors = {
        "table": table[rows].half(),
        **{name: mask[rows] for name, mask in masks.items() if mask is not None},
        "weight": weight.half(),
        "bias": bias.half(),
        "features": test.raw[chosen].half(),
        "shown": test.shown[chosen],
    }
    save_file({name: value.contiguous() for name, value in tensors.items()}, args.out / "vocabulary.safetensors")
    texts = {"rows": rows, "texts": [tokenizer.decode([i]) for i in rows], "words": words}
    (args.out / "vocabulary.json").write_text(json.dumps(texts) + "\n")
    print(f"{len(rows)} rows, scenes {chosen}")


if __name__ == "__main__":
    sys.exit(exit_code(main, "fixture"))
