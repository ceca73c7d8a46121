"""Time per label on SmolLM2: EvoComp's scorer compared with a simple loop.

    python -m experiments.real.label_cost --model runs/real/model --masks 24 --samples 3

The loop runs one full forward pass of the Hugging Face model per candidate, on text and kept tokens, with logits at all
positions. The scorer batches candidates of equal length and computes logits only for the answer. Both must agree on the
losses. A label needs 528 masks; times are scaled from the number of masks that were run.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import experiments.real.efficientnet  # noqa: F401  registers the tower
from evocomp.grouping.vocabulary import vocabulary_groups
from evocomp.log import exit_code
from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring.scorer import CandidateScorer
from experiments.real.scenes import SceneSpec, scene_examples

LABEL = 528  # masks per label: 48 in the first population and in each of ten generations


@torch.inference_mode()
def plain_loop(mllm: FrozenMLLM, features, kept: np.ndarray) -> np.ndarray:
    """Mean answer loss of each mask, from one forward pass per mask with logits at all positions."""
    losses = []
    for mask in torch.from_numpy(kept.astype(np.int64)):
        embeds, positions = mllm.assemble(features, features.visual[mask][None], mask[None])
        tail = mllm.embed(features.answer_ids)[None]
        embeds = torch.cat([embeds, tail], dim=1)
        steps = torch.arange(1, tail.shape[1] + 1)
        positions = torch.cat([positions, positions[:, -1:] + steps], dim=1)
        logits = mllm.model(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            position_ids=positions,
            use_cache=False,
        ).logits
        answers = logits[:, -len(features.answer_ids) - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(answers[0], features.answer_ids).item())
    return np.array(losses)


def measure(mllm: FrozenMLLM, examples, masks: int, seed: int = 0) -> dict:
    """CPU and wall time per label of the loop and the scorer, interleaved sample by sample."""
    rng = np.random.default_rng(seed)
    scorer = CandidateScorer(mllm, batch=48)
    spent = {"loop": [0.0, 0.0], "scorer": [0.0, 0.0]}
    groups, worst = [], 0.0
    for features in mllm.features(examples):
        partition = vocabulary_groups(features.visual, mllm.vocabulary)
        groups.append(partition.count)
        kept = partition.kept(np.stack([rng.integers(0, partition.sizes) for _ in range(masks)]))
        scorer(features, kept[:2])
        losses = {}
        for name, run in (("loop", partial(plain_loop, mllm)), ("scorer", scorer)):
            wall, cpu = time.perf_counter(), time.process_time()
            losses[name] = run(features, kept)
            spent[name][0] += time.perf_counter() - wall
            spent[name][1] += time.process_time() - cpu
        worst = max(worst, float(np.abs(losses["loop"] - losses["scorer"]).max()))
    count = masks * len(groups)
    return {
        "samples": len(groups),
        "masks_run": count,
        "mean_groups": round(float(np.mean(groups)), 1),
        "largest_difference_in_loss": round(worst, 5),
        **{
            f"{name}_{kind}_seconds_a_label": round(spent[name][i] / count * LABEL, 2)
            for name in spent
            for i, kind in enumerate(("wall", "cpu"))
        },
        "ratio_wall": round(spent["loop"][0] / spent["scorer"][0], 2),
        "ratio_cpu": round(spent["loop"][1] / spent["scorer"][1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--masks", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    mllm = FrozenMLLM.load(args.model, args.dtype)
    size = mllm.model.config.vision_config.image_size
    examples = list(scene_examples(21, 0, args.samples, SceneSpec(size=size)))
    first = {example.image_id: example for example in reversed(examples)}
    figures = {"dtype": args.dtype, **measure(mllm, list(first.values())[: args.samples], args.masks)}
    print(json.dumps(figures, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main, "label_cost"))
