"""Packs all questions of a scene into one row: each question attends only to the shared image and to itself."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.real.model import question_text
from experiments.real.scenes import KINDS, Question, Scene

IGNORE = -100


@functools.cache
def _columns(question: Question, tokenizer) -> np.ndarray:
    """id, offset, next token (answer only), kind: int64 [4, length]. Cached, because few questions are different."""
    prompt = tokenizer(question_text(question.text), add_special_tokens=False).input_ids
    reply = [*tokenizer(question.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = [*prompt, *reply[:-1]]
    target = np.full(len(ids), IGNORE)
    target[len(prompt) - 1 :] = reply
    return np.stack([ids, np.arange(len(ids)), target, np.full(len(ids), KINDS.index(question.kind))])


def pack(scene: Scene, tokenizer, length: int, questions: Sequence[int] | None = None) -> Tensor:
    """id, index of the question, offset in the question, next token (answers only), kind: int64 [5, length]."""
    row = np.repeat(np.array([[tokenizer.pad_token_id], [-1], [0], [IGNORE], [-1]]), length, axis=1)
    at = 0
    for number in range(len(scene.questions)) if questions is None else questions:
        columns = _columns(scene.questions[number], tokenizer)
        end = at + columns.shape[1]
        if end > length:
            break
        row[[0, 2, 3, 4], at:end], row[1, at:end] = columns, number
        at = end
    return torch.from_numpy(row)


def trimmed(rows: Tensor) -> Tensor:
    """Rows [B, 5, length] without the columns that are padding in all of them."""
    return rows[:, :, : int((rows[:, 1] >= 0).sum(1).max())]


def targets(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [K] into the flattened [B, L] that have a target, and the targets [K].

    Call it before the rows are moved to a GPU, where finding their number needs a synchronisation.
    """
    flat = rows[:, 3].flatten()
    places = (flat != IGNORE).nonzero()[:, 0]
    return places, flat[places]


def packed_logits(
    llm: nn.Module, head: nn.Module, visual: Tensor, index: Tensor, rows: Tensor, places: Tensor, total: int
) -> Tensor:
    """Logits [K, V] at the K indices `places` that have a target, in row order.

    Args:
        visual: visual tokens [B, R, D]; `index` [B, R] are their indices among all `total` tokens.
        rows: [B, 5, L] from `pack`; `places` [K] from `targets`.
    """
    ids, number, offset = rows[:, 0], rows[:, 1], rows[:, 2]
    embed = llm.get_input_embeddings()
    start = torch.full((len(ids), 1), llm.config.bos_token_id, device=ids.device)
    embeds = torch.cat([embed(start), visual.to(embed.weight.dtype), embed(ids)], dim=1)
    prefix, length = 1 + visual.shape[1], embeds.shape[1]
    mask = torch.ones(len(ids), 1, length, length, dtype=torch.bool, device=ids.device).tril()
    mask[:, 0, prefix:, prefix:] = (number[:, :, None] == number[:, None]) & (offset[:, None] <= offset[:, :, None])
    positions = torch.cat([torch.zeros_like(start), index + 1, offset + total + 1], dim=1)
    hidden = llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    return head(hidden.last_hidden_state[:, prefix:].flatten(0, 1)[places])


@torch.no_grad()
def question_scores(logits: Tensor, rows: Tensor, eos: int) -> list[tuple[int, float, bool]]:
    """(kind, mean answer loss [nats] without the end token, whether all tokens are correct) of each packed question."""
    places, target = targets(rows)
    here = target.to(logits.device)
    losses = F.cross_entropy(logits.float(), here, reduction="none").cpu()
    right = (logits.argmax(-1) == here).cpu()
    at = torch.stack([places // rows.shape[2], places % rows.shape[2]], dim=1)
    keys = at[:, 0] * 1000 + rows[at[:, 0], 1, at[:, 1]]
    scores = []
    for key in keys.unique():
        own = keys == key
        words = own & (target != eos)
        kind = int(rows[at[own][0, 0], 4, at[own][0, 1]])
        scores.append((kind, losses[words].mean().item(), bool(right[own].all())))
    return scores
