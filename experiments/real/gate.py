"""Checks whether scenes and an aligned model can rank token selectors; run it before labelling anything.

    python -m experiments.real.align --config experiments/real/photos_gpu.yaml
    python -m experiments.real.align --config experiments/real/photos_gpu.yaml --blind
    python -m experiments.real.gate --config experiments/real/photos_gpu.yaml

1. The model uses the image: the correct image lowers the answer loss by at least 1 nat compared with the image of
   another scene, and the accuracy on balanced yes-no questions about test photographs is at least 0.80.
2. The image is needed: this accuracy, and the accuracy on all questions, is at least 0.20 above that of the same model
   trained without images.
3. There is headroom: an oracle that selects tokens in the boxes of the items in question is at least 0.10 above the
   best training-free selector at the two smallest numbers of kept tokens, both with context tokens. Measured on new
   boards of the selection photographs.

Writes OUT/gate/gate.json. Exit code 1 if the gate is not passed.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import experiments.real.attention  # noqa: F401  registers both towers
from evocomp.data.example import Example, stable_id
from evocomp.evaluation.outcome import Outcome
from evocomp.evaluation.panel import Asked, Panel, Rival
from evocomp.evaluation.statistics import ImageBootstrap
from evocomp.log import UserError, exit_code
from evocomp.mllm.hf import FrozenMLLM
from evocomp.selection import selector
from experiments.real.boards import draw
from experiments.real.recipe import Recipe, read_recipe
from experiments.real.scenes import Item, SceneSpec

SEED = 41  # seed of the boards on which headroom is measured
FREE = ("random_tokens", "uniform_stride", "divprune", "cls_attention")
Boxes = list[tuple[int, int, int, int]]


def questions(spec: SceneSpec, boards: int, each: int) -> tuple[list[Example], list[Boxes]]:
    """Questions about new boards, and for each question the boxes that the oracle uses."""
    examples, boxes = [], []
    for index in range(boards):
        scene = draw(SEED, index, spec)
        for number in np.random.default_rng([SEED, index]).permutation(len(scene.questions))[:each]:
            kind, text, answer, about = scene.questions[number]
            known = stable_id("gate", SEED, index, int(number))
            examples.append(Example(known, scene.image, f"{SEED}-{index}", text, answer, kind))
            boxes.append(asked_boxes(scene.items, about))
    return examples, boxes


def asked_boxes(items: tuple[Item, ...], about: tuple[int, ...]) -> Boxes:
    """Boxes of the items that a question is about; of all items if it is about none of them."""
    return [items[number].box for number in about] or [item.box for item in items]


def oracle_tokens(boxes: Boxes, size: int, side: int, count: int) -> Tensor:
    """Indices [count] of the tokens nearest to the centres of the boxes, taken from each box in turn.

    Tokens whose centre is in a box come first, evenly spread over it, then the nearest tokens outside.
    """
    middle = (torch.arange(side * side, dtype=torch.float64) + 0.5) % side * size / side
    x, y = middle, ((torch.arange(side * side) // side) + 0.5) * size / side
    orders = []
    for left, top, right, bottom in boxes:
        wide, high = (right - left) / 2, (bottom - top) / 2
        # less than 1 inside the box
        away = torch.maximum((x - left - wide).abs() / wide, (y - top - high).abs() / high)
        inside = (away < 1).nonzero()[:, 0]
        outside = away.masked_fill(away < 1, torch.inf).argsort(stable=True)
        orders.append([*_spread_order(inside, x, y, (left + wide, top + high)), *outside.tolist()])
    chosen: dict[int, None] = {}
    for turn in zip(*(order[: side * side - len(boxes)] for order in orders), strict=False):
        for token in turn:
            if len(chosen) < count:
                chosen.setdefault(token)
    return torch.tensor(sorted(chosen))


def _spread_order(tokens: Tensor, x: Tensor, y: Tensor, centre: tuple[float, float]) -> list[int]:
    """The token nearest to the centre, then repeatedly the token farthest from those already chosen."""
    if not len(tokens):
        return []
    points = torch.stack([x[tokens], y[tokens]], dim=1)
    order = [int((points - torch.tensor(centre, dtype=points.dtype)).norm(dim=1).argmin())]
    nearest = (points - points[order[0]]).norm(dim=1)
    while len(order) < len(tokens):
        order.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (points - points[order[-1]]).norm(dim=1))
    return tokens[order].tolist()


def headroom(
    mllm: FrozenMLLM, recipe: Recipe, kept: list[int], boards: int, each: int, sharp: float, batch: int
) -> dict:
    """Accuracies of the oracle and of training-free selectors with context tokens, at all numbers of kept tokens."""
    examples, boxes = questions(recipe.spec("selection"), boards, each)
    judge = Panel(mllm, examples, batch, max_new_tokens=6, report=lambda text: print(text, flush=True))

    def choose(i: int, asked: Asked, count: int) -> Tensor:
        return oracle_tokens(boxes[i], recipe.size, recipe.side, count).to(asked.features.visual.device)

    with torch.inference_mode():
        found = [judge.full(), judge.no_image(), judge.wrong_image()]
        found += [judge.given("oracle", count, choose, sharp) for count in kept]
        found += judge.selectors([Rival(selector(name), name, sharp=sharp) for name in FREE], kept)
    resampled = ImageBootstrap([example.image_id for example in examples])
    table = {
        f"{outcome.method}_{outcome.kept}": {
            "accuracy": round(float(np.mean(outcome.correct)), 4),
            "by_kind": _by_kind(outcome, judge.questions.kinds),
        }
        for outcome in found
        if outcome.not_applicable is None
    }
    gains = {str(count): _gain(found, count, resampled) for count in kept}
    return {"questions": len(examples), "sharp": sharp, "gains": gains, "table": table}


def _gain(found: list[Outcome], count: int, resampled: ImageBootstrap) -> dict:
    """Difference of the oracle to the best training-free selector at one number of kept tokens."""
    here = {o.method: np.asarray(o.correct) for o in found if o.kept == count and o.not_applicable is None}
    oracle = here.pop("oracle")
    best = max((name for name in here if name in FREE), key=lambda name: here[name].mean())
    gain = resampled.difference(oracle, here[best])
    return {"gain": round(gain.mean, 4), "low": round(gain.low, 4), "high": round(gain.high, 4), "best": best}


def _by_kind(outcome: Outcome, kinds: list[str]) -> dict[str, float]:
    kinds, correct = np.array(kinds), np.asarray(outcome.correct)
    return {str(kind): round(float(correct[kinds == kind].mean()), 3) for kind in np.unique(kinds)}


def verdict(sees: dict, blind: dict, gains: dict) -> dict[str, bool]:
    """The conditions, and whether each is met."""
    yes_no = sees["by_kind"]["yes-no"]["accuracy"]
    smallest = sorted(gains, key=int)[:2]
    return {
        "right image 1 nat better": sees["gap"] >= 1.0,
        "yes-no 0.80": yes_no >= 0.8,
        "yes-no 0.20 above blind": yes_no - blind["by_kind"]["yes-no"]["accuracy"] >= 0.2,
        "all questions 0.20 above blind": sees["accuracy"] - blind["accuracy"] >= 0.2,
        "oracle 0.10 above the best": all(gains[count]["gain"] >= 0.1 for count in smallest),
    }


def _figures(path: Path, command: str) -> dict:
    if not path.is_file():
        raise UserError(f"{path} is missing; make it with python -m experiments.real.align {command}")
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="recipe of the alignment")
    parser.add_argument("--out", default=None, help="folder of the alignment; default: that of the recipe")
    parser.add_argument("--kept", default="64,32,16,8", help="numbers of kept tokens")
    parser.add_argument("--boards", type=int, default=80)
    parser.add_argument("--each", type=int, default=5, help="questions per board")
    parser.add_argument("--sharp", type=float, default=32, help="maximum number of selected tokens (compressor.sharp)")
    parser.add_argument("--batch", type=int, default=200)
    args = parser.parse_args()
    recipe = read_recipe(args.config, args.out)
    out = Path(recipe.out)
    sees = _figures(out / "gate.json", f"--config {args.config}")
    blind = _figures(out / "blind" / "gate.json", f"--config {args.config} --blind")
    device = "cuda" if recipe.accelerator == "gpu" else "cpu"
    folder = next(path for path in (out / "model_cls", out / "model") if path.name == "model" or path.is_dir())
    mllm = FrozenMLLM.load(str(folder), "bfloat16", device=device)
    kept = [int(count) for count in args.kept.split(",")]
    measured = headroom(mllm, recipe, kept, args.boards, args.each, args.sharp, args.batch)
    met = verdict(sees, blind, measured["gains"])
    columns = ("questions", "loss_right_picture", "loss_wrong_picture", "gap", "accuracy", "by_kind")
    figures = {
        "passed": all(met.values()),
        "conditions": met,
        "sees": {name: sees[name] for name in columns},
        "blind": {name: blind[name] for name in columns},
        "headroom": measured,
    }
    (out / "gate").mkdir(exist_ok=True)
    (out / "gate" / "gate.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({"conditions": met, "gains": measured["gains"]}, indent=1))
    print("gate passed" if figures["passed"] else "gate NOT passed")
    sys.exit(0 if figures["passed"] else 1)


if __name__ == "__main__":
    sys.exit(exit_code(main, "gate"))
