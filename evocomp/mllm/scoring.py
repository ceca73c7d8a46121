"""Answer losses of kept tokens under the frozen MLLM, batched in the three ways that labelling needs.

In all of them the LLM's decoder body runs once, the head only at the answer's positions, and the log-sum-exp is
taken in float32 whatever the weights' format. Losses are means over the answer's tokens [nats].
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evocomp.log import UserError
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM


class AnswerLosses:
    """Scores masks of visual tokens.

    Args:
        mllm: the frozen model.
        dtype: format of decoder and head while scoring; another one than the model's own is a copy of both.
            bfloat16 is about 2.5 times as fast on CPUs that have it, and moves losses by about 0.02.

    Attributes:
        sequences, tokens: what the decoder has run on so far.
    """

    def __init__(self, mllm: FrozenMLLM, dtype: torch.dtype | None = None):
        mllm.check_scorable()
        self.mllm = mllm
        self.decoder, self.head = mllm.decoder, mllm.head
        self.sequences = self.tokens = 0
        self.dtype = dtype or mllm.vocabulary.dtype
        if self.dtype != mllm.vocabulary.dtype:
            self.decoder = copy.deepcopy(mllm.decoder).to(self.dtype)
            self.head = copy.deepcopy(mllm.head).to(self.dtype)

    @torch.inference_mode()
    def candidates(self, features: Features, kept: Tensor) -> Tensor:
        """Candidates of one sample: kept [Q, R] ascending -> [Q] float32. Equal lengths, so nothing is padded.

        Source: method, section 2 (fitness).
        """
        return self.batch([features], kept[None])[0]

    @torch.inference_mode()
    def batch(self, features: Sequence[Features], kept: Tensor) -> Tensor:
        """Masks of several samples, each its own: kept [B, K, R] ascending -> [B, K] float32.

        Shorter prompts are padded on the right, where a causal decoder never looks back from.
        """
        masks = kept.shape[1]
        rows = [self._with_answer(f, *self._assemble(f, own)) for f, own in zip(features, kept, strict=True)]
        longest = max(embeds.shape[1] for embeds, _ in rows)
        embeds = torch.cat([F.pad(e, (0, 0, 0, longest - e.shape[1])) for e, _ in rows])
        positions = torch.cat([_continue(p, longest) for _, p in rows], dim=-2)
        hidden = self._run(embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device), positions)
        losses = []
        for number, (one, (own, _)) in enumerate(zip(features, rows, strict=True)):
            end, count = own.shape[1], len(one.answer_ids)
            part = hidden[number * masks : (number + 1) * masks, end - count : end]
            losses.append(self._loss(part, one.answer_ids.expand(masks, -1)).mean(1))
        return torch.stack(losses)

    @torch.inference_mode()
    def shared(self, features: Sequence[Features], kept: Tensor) -> Tensor:
        """The same masks for all J questions about one picture: kept [Q, R] ascending -> [Q, J] float32.

        One forward a mask: [text before the picture, kept tokens, question 1, question 2, ...] in which every
        question sees the prefix and itself only. Equal to separate scoring but for rounding.

        Raises:
            UserError: the prompts differ before the picture's end, so that they share no prefix.
        """
        first = features[0]
        if len(features) == 1:
            return self.candidates(first, kept)[:, None]
        end = int(first.visual_at[-1]) + 1
        if not shares_prefix(features):
            raise UserError("shared scoring needs prompts that agree up to the end of the picture")
        count = len(kept)
        prefix = self._prefix(first, end)
        embeds, positions = self.mllm.assemble(prefix, first.visual[kept], kept)
        length = embeds.shape[1]
        tails = [torch.cat([f.prompt_ids[end:], f.answer_ids[:-1]]) for f in features]
        sizes = torch.tensor([len(tail) for tail in tails])
        owner = torch.arange(len(tails)).repeat_interleave(sizes).to(embeds.device)
        embeds = torch.cat([embeds, self.mllm.embed(torch.cat(tails)).expand(count, -1, -1)], dim=1)
        following = [_continue(f.positions[..., end:], len(tail)) for f, tail in zip(features, tails, strict=True)]
        positions = torch.cat([positions, torch.cat(following, dim=-1).expand(*positions.shape[:-1], -1)], dim=-1)
        mask = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool, device=embeds.device).tril()
        mask[length:, length:] &= owner[:, None] == owner[None, :]
        hidden = self._run(embeds, mask[None, None].expand(count, 1, -1, -1), positions)
        ends = length + sizes.cumsum(0)
        losses = []
        for stop, one in zip(ends.tolist(), features, strict=True):
            answer = one.answer_ids
            part = hidden[:, stop - len(answer) : stop]
            losses.append(self._loss(part, answer.expand(count, -1)).mean(1))
        return torch.stack(losses, dim=1)

    def _assemble(self, features: Features, kept: Tensor) -> tuple[Tensor, Tensor]:
        return self.mllm.assemble(features, features.visual[kept], kept)

    @staticmethod
    def _prefix(features: Features, end: int) -> Features:
        """The prompt up to the end of its picture."""
        return Features(
            id=features.id,
            image_id=features.image_id,
            visual=features.visual,
            prompt_ids=features.prompt_ids[:end],
            visual_at=features.visual_at,
            positions=features.positions[..., :end],
            answer_ids=features.answer_ids,
            image_numbers=features.image_numbers,
        )

    def _with_answer(self, features: Features, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Append the answer but its last token, which nothing is read from."""
        if len(features.answer_ids) == 1:
            return embeds, positions
        tail = self.mllm.embed(features.answer_ids[:-1]).expand(len(embeds), -1, -1)
        return torch.cat([embeds, tail], dim=1), _continue(positions, positions.shape[-1] + tail.shape[1])

    def _run(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        self.sequences += embeds.shape[0]
        self.tokens += embeds.shape[0] * embeds.shape[1]
        return self.decoder(
            inputs_embeds=embeds.to(self.dtype), attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def _loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        # a strided view makes the bf16 product on CPUs some 250 times slower
        flat = self.head(hidden.reshape(-1, hidden.shape[-1]))
        logits = flat.view(*hidden.shape[:-1], -1).float()
        return F.cross_entropy(logits.transpose(1, 2), target, reduction="none")


def shares_prefix(features: Sequence[Features]) -> bool:
    """Whether the prompts agree up to the end of their common picture."""
    first = features[0]
    end = int(first.visual_at[-1]) + 1
    return all(
        one.image_id == first.image_id
        and len(one.visual_at) == len(first.visual_at)
        and torch.equal(one.prompt_ids[:end], first.prompt_ids[:end])
        for one in features[1:]
    )


def _continue(positions: Tensor, length: int) -> Tensor:
    """Positions [..., L] carried on by steps of one to `length`."""
    missing = length - positions.shape[-1]
    if missing <= 0:
        return positions
    steps = torch.arange(1, missing + 1, device=positions.device)
    return torch.cat([positions, positions[..., -1:] + steps], dim=-1)
