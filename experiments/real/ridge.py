"""Closed-form projector: ridge regression from the tower's tokens onto word embeddings, without the LLM.

    python -m experiments.real.ridge --scenes 1500

Prints the result of EvoComp's grouping on the real vocabulary: groups per image, nearest words, and the effect of masks
that exclude rows of the vocabulary. The map is also the initial projector of `align.py`.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from evocomp.grouping.groups import Groups
from evocomp.grouping.vocabulary import nearest_words
from evocomp.log import exit_code
from experiments.real.features import EncodedScenes, encode_scenes, scene_words
from experiments.real.model import build_real, real_processor
from experiments.real.scenes import NAMES, SceneSpec, all_names
from experiments.real.smollm2 import cache_folder

MOST_ROWS = 300_000  # largest number of tokens for the closed form
PLACE_WEIGHT = 0.3  # initial weight of the words for row and column in each token


def word_embeddings(words: list[str], tokenizer, table: Tensor) -> Tensor:
    """Mean embedding [W, D] of the tokens of each word, tokenized as inside a sentence."""
    ids = [tokenizer(" " + word, add_special_tokens=False).input_ids for word in words]
    return torch.stack([table[torch.tensor(row, device=table.device)].float().mean(0) for row in ids])


def statistics(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation [472] of features [S, N, 472], from the first 2,000 scenes."""
    flat = raw[:2000].flatten(0, 1).float()
    return flat.mean(0), 1 / flat.std(0).clamp_min(1e-6)


def fit_ridge(inputs: Tensor, targets: Tensor, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """argmin |X W + b - Y|^2 + penalty n/1000 |W|^2 in float64; X [n, C], Y [n, D] -> W [C, D], b [D]."""
    x, y = inputs.double(), targets.double()
    centre, offset = x.mean(0), y.mean(0)
    gram = (x - centre).T @ (x - centre)
    gram += penalty * len(x) / 1000 * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    weight = torch.linalg.solve(gram, (x - centre).T @ (y - offset))
    return weight.float(), (offset - centre @ weight).float()


def training_pairs(encoded: EncodedScenes, spec: SceneSpec) -> tuple[Tensor, Tensor]:
    """Indices (scene, token) [n, 2] and words [n] of tokens that show an item, and of a quarter of the background."""
    shown, generator = encoded.shown, torch.Generator().manual_seed(0)
    first_ground = len(scene_words(spec)) - len(spec.ground)
    some = (torch.rand(shown.shape, generator=generator) < 0.25).to(shown.device)
    at = ((shown >= 0) & ((shown < first_ground) | some)).nonzero()
    return at, shown[at[:, 0], at[:, 1]].long()


def trained_rows(table: Tensor, reserved: list[int]) -> Tensor:
    """Vocabulary mask [V]: rows that pre-training has changed.

    Rows of tokens that the training text never contained share the direction of reserved tokens (in SmolLM2 their
    cosines exceed 0.999; arXiv 2405.05417 describes how to find them). A visual token that resembles no word is nearest
    to one of these rows, which makes them hubs.
    """
    rows = torch.nn.functional.normalize(table.float(), dim=1)
    # the median, because some reserved tokens do occur in the training text
    common = torch.nn.functional.normalize(rows[reserved].median(0).values, dim=0)
    return rows @ common < 0.95


def plain_words(tokenizer, size: int) -> Tensor:
    """Vocabulary mask [V]: rows that start a plain word (a space, then at least three lower-case letters)."""
    texts = [tokenizer.decode([i]) for i in range(min(size, len(tokenizer)))]
    plain = [text[:1] == " " and len(text) > 3 and text[1:].isalpha() and text[1:].islower() for text in texts]
    return torch.tensor(plain + [False] * (size - len(plain)))


def vocabulary_masks(tokenizer, table: Tensor) -> dict[str, Tensor | None]:
    """Vocabulary masks [V] from none, as published, to the most restrictive."""
    # all reserved tokens; transformers' `all_special_ids` has only the three that have a role
    reserved = sorted(tokenizer.get_added_vocab().values())
    special = torch.ones(len(table), dtype=torch.bool)
    special[reserved] = False
    trained = trained_rows(table, reserved)
    return {
        "none": None,
        "special": special,
        "trained": special & trained,
        "words": special & trained & plain_words(tokenizer, len(table)),
    }


def as_projector(weight: Tensor, bias: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """LLaVA's Linear - GELU - Linear that computes x W + b exactly if the rank of W is at most half the hidden width.

    gelu(z) - gelu(-z) = z, so each pair of hidden units represents one singular direction. Unused units keep their
    random input weights and have zero output weights. If the rank is larger, the best approximation of the possible
    rank is used.
    """
    hidden = len(state["linear_1.bias"])
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    rank = min(int((singular > 1e-5 * singular[0]).sum()), hidden // 2)
    # scale the input of each pair to about 1; the second layer has the inverse scale
    into = left[:, :rank].T * (len(weight) / rank) ** 0.5
    out = right[:rank] * singular[:rank, None] / (len(weight) / rank) ** 0.5
    state = {name: value.clone().float() for name, value in state.items()}
    state["linear_1.weight"][:rank], state["linear_1.weight"][rank : 2 * rank] = into, -into
    state["linear_1.bias"].zero_()
    state["linear_2.weight"].zero_()
    state["linear_2.weight"][:, :rank], state["linear_2.weight"][:, rank : 2 * rank] = out.T, -out.T
    state["linear_2.bias"] = bias.clone()
    return state


def place_vectors(side: int, tokenizer, table: Tensor) -> Tensor:
    """Vectors of rows, then columns [2 side, D]: interpolated from "top" to "bottom" and from "left" to "right".

    They are scaled by `PLACE_WEIGHT`.
    """
    top, bottom, left, right = word_embeddings(["top", "bottom", "left", "right"], tokenizer, table)
    share = torch.linspace(0, 1, side, device=table.device)[:, None]
    return PLACE_WEIGHT * torch.cat([top + share * (bottom - top), left + share * (right - left)])


def ridge_projector(encoded: EncodedScenes, spec: SceneSpec, tokenizer, table: Tensor):
    """Feature statistics and the map from standardised features to words: (mean, scale, W [472, D], b [D])."""
    mean, scale = statistics(encoded.raw)
    at, names = training_pairs(encoded, spec)
    if len(at) > MOST_ROWS:
        some = torch.randperm(len(at), generator=torch.Generator().manual_seed(1))[:MOST_ROWS].to(at.device)
        at, names = at[some], names[some]
    inputs = (encoded.raw[at[:, 0], at[:, 1]].float() - mean) * scale
    targets = word_embeddings(scene_words(spec), tokenizer, table)[names]
    return mean, scale, *fit_ridge(inputs, targets)


def grouping_report(tokens: Tensor, table: Tensor, mask: Tensor | None, trained: Tensor, tokenizer) -> dict:
    """Numbers of groups per image, and the words that are nearest to most tokens; tokens [S, N, D].

    `hub_tokens`: share of the tokens whose nearest row was never trained (is not in the mask `trained` [V]).
    """
    winners: Counter[int] = Counter()
    counts = []
    for picture in tokens:
        ids, _ = nearest_words(picture, table, mask)
        winners.update(ids.tolist())
        counts.append(Groups.from_ids(ids.numpy()).count)
    total = sum(winners.values())
    strange = [(tokenizer.decode([i]), round(n / total, 4)) for i, n in winners.most_common() if not trained[i]]
    return {
        "groups": round(sum(counts) / len(counts), 2),
        "fewest": min(counts),
        "most": max(counts),
        "hub_tokens": round(sum(n for i, n in winners.items() if not trained[i]) / total, 4),
        "commonest": [(tokenizer.decode([i]), round(n / total, 3)) for i, n in winners.most_common(12)],
        "hubs": strange[:8],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--names", choices=("few", "all"), default="few", help="60 or 849 named pictures")
    parser.add_argument("--side", type=int, default=7)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the results")
    args = parser.parse_args()
    spec = SceneSpec(size=args.size, names=NAMES if args.names == "few" else all_names())
    model = build_real(args.side, args.size)
    tokenizer, table = real_processor(model.config).tokenizer, model.get_input_embeddings().weight.detach().float()
    tower, folder = model.model.vision_tower, cache_folder()
    train = encode_scenes(tower, 1, args.scenes, spec, folder)
    test = encode_scenes(tower, 2, 60, spec, folder)
    mean, scale, weight, bias = ridge_projector(train, spec, tokenizer, table)
    words = scene_words(spec)
    own = word_embeddings(words, tokenizer, table)
    tokens = (test.raw.float() - mean) * scale @ weight + bias
    figures: dict = {"words": len(words), "scenes": args.scenes, "tokens": args.side**2, "size": args.size}
    names = test.shown.long()
    shown, plane = (names >= 0) & (names < len(spec.names)), names >= len(words) - len(spec.ground)
    nearest = torch.cdist(tokens, own[None].expand(len(tokens), -1, -1)).argmin(-1)
    figures["picture_token_right"] = round((nearest == names)[shown].float().mean().item(), 3)
    figures["background_token_right"] = round((nearest == names)[plane].float().mean().item(), 3)
    masks = vocabulary_masks(tokenizer, table)
    for name, mask in masks.items():
        left = len(table) if mask is None else int(mask.sum())
        figures[name] = {"rows": left, **grouping_report(tokens, table, mask, masks["trained"], tokenizer)}
    print(json.dumps(figures))
    if args.out is not None:
        args.out.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main, "ridge"))
