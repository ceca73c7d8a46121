"""All questions of a scene in one row: they share the picture and see the picture and themselves only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.real.model import question_text
from experiments.real.scenes import KINDS, Scene

IGNORE = -100


def pack(scene: Scene, tokenizer, length: int, questions: list[int] | None = None) -> Tensor:
    """ids, question number, offset in the question, next token (answers only), kind: int64 [5, length]."""
    row = torch.tensor([tokenizer.pad_token_id, -1, 0, IGNORE, -1])[:, None].repeat(1, length)
    at = 0
    for number in range(len(scene.questions)) if questions is None else questions:
        kind, text, answer = scene.questions[number]
        prompt = tokenizer(question_text(text), add_special_tokens=False).input_ids
        reply = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([*prompt, *reply[:-1]])
        end = at + len(ids)
        if end > length:
            break
        row[0, at:end], row[1, at:end], row[2, at:end] = ids, number, torch.arange(len(ids))
        row[3, at + len(prompt) - 1 : end] = torch.tensor(reply)
        row[4, at:end] = KINDS.index(kind)
        at = end
    return row


def trimmed(rows: Tensor) -> Tensor:
    """Rows [B, 5, length] without the columns that are padding in all of them."""
    return rows[:, :, : int((rows[:, 1] >= 0).sum(1).max())]


def packed_logits(llm: nn.Module, head: nn.Module, visual: Tensor, index: Tensor, rows: Tensor, total: int) -> Tensor:
    """Logits [K, V] at the K places that have a target, row after row.

    Args:
        visual: [B, R, D] visual tokens; `index` [B, R] their places among all `total` ones.
        rows: [B, 5, L] from `pack`.
    """
    ids, number, offset, target, _ = rows.unbind(1)
    embed = llm.get_input_embeddings()
    start = torch.full((len(ids), 1), llm.config.bos_token_id, device=ids.device)
    embeds = torch.cat([embed(start), visual.to(embed.weight.dtype), embed(ids)], dim=1)
    prefix, length = 1 + visual.shape[1], embeds.shape[1]
    mask = torch.ones(len(ids), 1, length, length, dtype=torch.bool, device=ids.device).tril()
    mask[:, 0, prefix:, prefix:] = (number[:, :, None] == number[:, None]) & (offset[:, None] <= offset[:, :, None])
    positions = torch.cat([torch.zeros_like(start), index + 1, offset + total + 1], dim=1)
    hidden = llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    return head(hidden.last_hidden_state[:, prefix:][target != IGNORE])


@torch.no_grad()
def question_scores(logits: Tensor, rows: Tensor, eos: int) -> list[tuple[int, float, bool]]:
    """(kind, mean answer loss [nats] without the end mark, every token right?) of each packed question."""
    at = (rows[:, 3] != IGNORE).nonzero()
    target = rows[at[:, 0], 3, at[:, 1]]
    losses = F.cross_entropy(logits.float(), target, reduction="none")
    right = logits.argmax(-1) == target
    keys = at[:, 0] * 1000 + rows[at[:, 0], 1, at[:, 1]]
    scores = []
    for key in keys.unique():
        own = keys == key
        words = own & (target != eos)
        kind = int(rows[at[own][0, 0], 4, at[own][0, 1]])
        scores.append((kind, losses[words].mean().item(), bool(right[own].all())))
    return scores
