"""Logits of an answer by one plain forward of the decoder, without any of the scorer's shortcuts."""

import torch
from torch import Tensor

from evocomp.mllm.beside_embeddings import BesideEmbeddings
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM


@torch.no_grad()
def answer_logits(mllm: FrozenMLLM, features: Features, tokens: Tensor, index: Tensor) -> Tensor:
    """Teacher-forced logits [Q, A, V] (float32) of the answer's tokens, for visual `tokens` [Q, R, D]."""
    mllm.check_scorable()
    embeds, positions = mllm.assemble(features, tokens, index)
    answer = features.answer_ids
    if len(answer) > 1:
        tail = mllm.embed(answer[:-1]).expand(len(tokens), -1, -1)
        embeds = torch.cat([embeds, tail], dim=1)
        step = torch.arange(1, len(answer), device=positions.device)
        positions = torch.cat([positions, positions[..., -1:] + step], dim=-1)
    beside = BesideEmbeddings.of(features, index).padded(0, len(answer) - 1)
    real = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    hidden = mllm.decoder(
        inputs_embeds=embeds, position_ids=positions, use_cache=False, **mllm._keywords(beside, real, embeds)
    ).last_hidden_state
    return mllm.head(hidden[:, -len(answer) :].contiguous()).float()
