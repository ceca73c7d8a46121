"""A table of all image-text-to-text types that transformers registers, and whether `evocomp.compress` is exact on them.

    python -m tests.inference.family_table experiments/results/families.csv

Types with a tiny random model here are run: all tokens kept (equal bits), and tokens dropped, with a cache against
without (1e-5), before layers 0, 1 and 2. The others are made from their default configuration without weights, which
shows whether they are refused; those that are not are checked by `compress` on the first prompt of a real model.
"""

import csv
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from evocomp.inference.compiled import without_compile
from evocomp.inference.hooks import compress
from evocomp.inference.masks import check_layers
from evocomp.log import UserError
from evocomp.mllm import families
from tests.inference import derived_models, tiny_models
from tests.inference.test_hooks import answer, jumble

EXACT, FIRST_LAYER, REFUSED, NOT_BUILT = "exact", "exact at layer 0", "refused", "cannot be built here"
VARIANTS = {"gemma4": ["gemma4", "gemma4_blocks", "gemma4_shared_keys"], "paligemma": ["paligemma", "paligemma2"]}


def rows() -> Iterator[tuple[str, str, str]]:
    """(type, verdict, reason or remark) of every registered type, sorted."""
    for kind in sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        yield kind, *verdict(kind)


def verdict(kind: str) -> tuple[str, str]:
    """What holds for one type, and why."""
    same = {"glmga": "glm46v", "pp_chart2table": "got_ocr2", "shieldgemma2": "gemma3"}
    if kind in same:
        return verdict(same[kind])[0], f"the class of {same[kind]}"
    if kind in tiny_models.FAMILIES:
        cases = [(tiny_models.build(name), tiny_models.prompts(name)) for name in VARIANTS.get(kind, [kind])]
    elif kind in derived_models.BUILDERS:
        cases = []
        for name in VARIANTS.get(kind, [kind]):
            try:
                cases.append(derived_models.build(name))
            except UserError as error:
                return REFUSED, str(error)
    else:
        return _without_weights(kind)
    found = [_run(model, inputs) for model, inputs in cases]
    order = [REFUSED, FIRST_LAYER, EXACT]
    worst = min(found, key=lambda one: order.index(one[0]))
    best = max(found, key=lambda one: order.index(one[0]))
    return best if best == worst else (best[0], f"variants: {worst[0]} ({worst[1]})")


def _run(model, inputs) -> tuple[str, str]:
    exact, reasons = [], []
    for layer in (0, 1, 2):
        try:
            with compress(model, jumble, keep=1.0, layer=layer) as handle:
                whole = answer(model, inputs)
                handle.keep = 0.4
                cached, bare = answer(model, inputs), answer(model, inputs, use_cache=False)
        except UserError as error:
            reasons.append(str(error))
            continue
        plain = answer(model, inputs)
        same = all(torch.equal(a, b) for a, b in zip(whole.logits, plain.logits, strict=True))
        close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(cached.logits, bare.logits, strict=True))
        if not (same and close):
            raise AssertionError(f"{type(model).__name__} is not exact at layer {layer} and not refused")
        exact.append(layer)
    if exact == [0, 1, 2]:
        return EXACT, ""
    return (FIRST_LAYER if exact == [0] else REFUSED), reasons[0]


def _without_weights(kind: str) -> tuple[str, str]:
    try:
        cls = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind])
        config = cls.config_class()
        if getattr(config, "is_encoder_decoder", False):
            return REFUSED, "encoder-decoder: reads images by cross-attention"
        if getattr(config, "image_token_id", 0) is None:
            config.image_token_id = tiny_models.IMAGE  # checkpoints have one
        with torch.device("meta"):
            model = cls(config)
    except Exception as error:  # whatever a package or a default configuration lacks
        return NOT_BUILT, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    try:
        families.check_supported(model)
        check_layers(without_compile(families.decoder(model)))
    except UserError as error:
        return REFUSED, str(error)
    except Exception as error:
        return NOT_BUILT, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return NOT_BUILT, "derived; checked on the first prompt of a model with weights"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with Path(sys.argv[1]).open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("type", "verdict", "reason"))
        for row in rows():
            table.writerow(row)
            file.flush()
