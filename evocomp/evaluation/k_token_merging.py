"""Rows of K-Token Merging in the panel: a trained method that also adapts the LLM."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evocomp.data.scoring import score_answer
from evocomp.evaluation.outcome import Outcome
from evocomp.evaluation.panel import Panel
from evocomp.inference.k_token_merging import KTokenMerger

ADAPTED = "adapt the weights of the LLM"
NAME = "k_token_merging"


@torch.inference_mode()
def k_token_outcomes(panel: Panel, run: Path, kept: Sequence[int]) -> list[Outcome]:
    """One outcome per number of kept tokens, from the mergers trained for the run; not applicable if one is missing."""
    outcomes = []
    for count in kept:
        folder = run / NAME / str(count)
        if (folder / "config.json").is_file():
            outcomes.append(_outcome(panel, KTokenMerger.load(folder, panel.mllm), count))
        else:
            outcomes.append(_missing(panel, run, count))
    return outcomes


def _missing(panel: Panel, run: Path, kept: int) -> Outcome:
    n = len(panel.asked[0].features.visual)
    reason = f"{n} tokens cannot be divided into {kept} equal blocks"
    if n % kept == 0:
        reason = f"not trained; train it with python -m evocomp.training.k_token_merging --run {run}"
    return Outcome(NAME, kept, np.zeros(0), group=ADAPTED, not_applicable=reason)


def _outcome(panel: Panel, model: KTokenMerger, kept: int) -> Outcome:
    panel.report(f"{NAME} at {kept}")
    answers: list[str] = []
    for start in range(0, len(panel.asked), panel.batch):
        part = [asked.features for asked in panel.asked[start : start + panel.batch]]
        answers += model.answer(part, panel.max_new_tokens)
    scores = [score_answer(asked.example, text) for asked, text in zip(panel.asked, answers, strict=True)]
    note = f"blocks of K = {model.block}; LoRA of rank {model.r} on the LLM, trained on the answers"
    return Outcome(NAME, kept, np.array(scores), answers, group=ADAPTED, note=note)
