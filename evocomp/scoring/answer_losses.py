"""Answer losses of masks of visual tokens under the frozen MLLM, batched in the three ways that labelling needs.

In each of them the decoder runs once, the output head runs only at the answer's positions, and the cross-entropy is
computed in float32 whatever the dtype of the weights. Losses are means over the answer's tokens [nats].
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evocomp.config.schema import ScorerConfig
from evocomp.log import UserError
from evocomp.mllm import attention, families
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring import llama_decoder as llama_body
from evocomp.scoring.llama_decoder import LlamaBody
from evocomp.scoring.sequences import (
    Body,
    Packing,
    Past,
    Table,
    crop,
    joined,
    padded,
    prompt_index,
    prompt_table,
    with_context,
)
from evocomp.scoring.transformers_decoder import TransformersBody

LONG_PREFIX = 8
"""Minimum number of text tokens before the image for which their keys and values are cached: for fewer tokens, copying
the cache costs more than it saves."""

BUCKETS = 4
"""Number of prefix lengths that candidates differing in one token are sorted into."""


class AnswerLosses:
    """Computes the answer losses of masks of visual tokens.

    Args:
        mllm: the frozen model.
        dtype: dtype of decoder and head while scoring; None: that of the model. Another dtype needs a copy of both.
            bfloat16 is about 2.5 times as fast on CPUs with bfloat16 units, and changes losses by about 0.02.
        settings: which optimizations to use; all of them give the same losses up to rounding.

    Attributes:
        sequences, tokens: number of sequences and tokens that the decoder has processed so far.
    """

    def __init__(self, mllm: FrozenMLLM, dtype: torch.dtype | None = None, settings: ScorerConfig | None = None):
        mllm.check_scorable()
        if mllm.shard_group.size > 1 and dtype not in (None, mllm.vocabulary.dtype):
            raise UserError("a sharded model can only be scored in its own dtype; set labels.dtype=model")
        self.mllm = mllm
        self.settings = settings or ScorerConfig()
        self.dtype = dtype or mllm.vocabulary.dtype
        head = mllm.head
        if self.dtype != mllm.vocabulary.dtype:
            head = copy.deepcopy(mllm.head).to(self.dtype)
        self.body = self._body()
        self.sequences = self.tokens = 0
        self.head = self.body.head(head) if isinstance(self.body, LlamaBody) and self.body.onednn else head
        self._prefixes: dict[tuple[int, ...], Past | None] = {}
        self._last: tuple[Features | None, Table | None] = (None, None)
        self._flips: tuple[Table | None, Tensor | None, Past | None] = (None, None, None)

    def _body(self) -> Body:
        """`LlamaBody` if it agrees with transformers on this decoder, else `TransformersBody`."""
        decoder = self.mllm.decoder
        policy = families.policy(self.mllm.model)
        needs_more = policy.deepstack or policy.blocks is not None
        if self.settings.own_pass and not needs_more and llama_body.fits(decoder):
            ours = LlamaBody(decoder, self.dtype, self.settings)
            if llama_body.agrees(ours, decoder):
                return ours
        if self.dtype != self.mllm.vocabulary.dtype:
            decoder = copy.deepcopy(decoder).to(self.dtype)
        return TransformersBody(decoder, self.dtype, beyond_window=policy.blocks == "prefix")

    @torch.inference_mode()
    def candidates(self, features: Features, kept: Tensor, flips: bool = False, context: int = 0) -> Tensor:
        """Losses [Q] float32 of one sample's candidate masks: the fitness in EvoComp's Algorithm 1 (arXiv 2604.17087).

        Args:
            features: the sample.
            kept: [Q, R] indices of the kept visual tokens, ascending.
            flips: the masks differ from one another in few tokens, so that the keys and values of their common prefix
                are computed once.
            context: see `batch`; must be 0 with `flips`.
        """
        if not flips or features.blocks is not None:  # keys before a block depend on it
            return self.batch([features], kept[None], context)[0]
        table, index = self._table([features]), prompt_index(features, kept)
        read = index.shape[1] - len(features.answer_ids) + torch.arange(len(features.answer_ids), device=index.device)
        losses = torch.empty(len(index), device=index.device)
        for rows, past in self._buckets(table, index, len(features.answer_ids)):
            before = past[0][0].shape[2] if past else 0
            targets = features.answer_ids.expand(len(rows), -1)
            losses[rows] = self._losses(table, index[rows, before:], read - before, targets, past=past).mean(1)
        return losses

    @torch.inference_mode()
    def batch(self, features: Sequence[Features], kept: Tensor, context: int = 0) -> Tensor:
        """Losses [B, K] float32 of several samples, each with its own masks.

        Shorter prompts are padded on the right, which does not affect a causal decoder.

        Args:
            features: the B samples.
            kept: [B, K, R] indices of the kept visual tokens, ascending.
            context: number of context tokens in addition to the kept tokens; see `evocomp.mllm.context`.
        """
        if len(features) > 1 and features[0].blocks is not None:
            # padding would be part of a block
            return torch.cat([self.batch([one], own[None], context) for one, own in zip(features, kept, strict=True)])
        masks = kept.shape[1]
        table, indices, sizes = self._sequences(features, kept, context)
        answers = [one.answer_ids for one in features]
        longest = max(map(len, answers))
        places = torch.arange(longest, device=kept.device)
        reads = [
            index.shape[1] - len(answer) + places.clamp(max=len(answer) - 1)
            for index, answer in zip(indices, answers, strict=True)
        ]
        targets = torch.stack([answer[places.clamp(max=len(answer) - 1)] for answer in answers])
        real = torch.stack([places < len(answer) for answer in answers])
        index = padded(indices, sizes)
        read = reads[0] if len(features) == 1 else torch.stack(reads).repeat_interleave(masks, 0)
        start, past = self._prefix(features, table)
        losses = self._losses(table, index[:, start:], read - start, targets.repeat_interleave(masks, 0), past=past)
        losses = losses.view(len(features), masks, longest) * real[:, None]
        return losses.sum(2) / real.sum(1)[:, None]

    @torch.inference_mode()
    def shared(self, features: Sequence[Features], kept: Tensor) -> Tensor:
        """Losses of the same masks for all J questions about one image: kept [Q, R] ascending -> [Q, J] float32.

        One forward a mask: [text before the picture, kept tokens, question 1, question 2, ...] in which every
        question sees the prefix and itself only. Equal to separate scoring but for rounding. Decoders that cannot be
        given such masks (see `Body.packs`) and those with bidirectional blocks score the questions one after another.

        Raises:
            UserError: the prompts differ before the end of the image, so that they share no prefix.
        """
        first = features[0]
        if len(features) == 1:
            return self.candidates(first, kept)[:, None]
        if not shares_prefix(features):
            raise UserError("prompts differ before the end of the image, and cannot be scored together")
        if not self.body.packs or first.blocks is not None:
            return torch.stack([self.candidates(one, kept) for one in features], dim=1)
        end = first.picture_end
        tables = [prompt_table(one, self.mllm.embed) for one in features]
        # rows of the first prompt up to the end of the image, then the remaining rows of each prompt
        parts = [slice(0, end)] + [slice(end, None)] * len(features)
        owners = [tables[0], *tables]
        table = joined([one.part(part) for one, part in zip(owners, parts, strict=True)])
        sizes = [one.embeds.shape[0] - end for one in tables]
        prefix = prompt_index(first, kept)
        prefix = prefix[:, : int((prefix[0] < end).sum())]
        tails = torch.arange(end, table.embeds.shape[0], device=kept.device)
        index = torch.cat([prefix, tails.expand(len(kept), -1)], dim=1)
        length = prefix.shape[1]
        packing = Packing.of(length, sizes, kept.device)
        counts = [len(one.answer_ids) for one in features]
        ends = length + torch.tensor(sizes).cumsum(0)
        read = torch.cat([stop - count + torch.arange(count) for stop, count in zip(ends, counts, strict=True)])
        targets = torch.cat([one.answer_ids for one in features]).expand(len(kept), -1)
        start, past = self._prefix(features, table)
        losses = self._losses(
            table, index[:, start:], read.to(kept.device) - start, targets, packing=packing, past=past
        )
        return torch.stack([part.mean(1) for part in losses.split(counts, dim=1)], dim=1)

    # ------------------------------------------------------------ parts

    def _table(self, features: Sequence[Features]) -> Table:
        """The concatenated rows of the samples; the last single sample's table is cached."""
        if len(features) > 1:
            return joined([prompt_table(one, self.mllm.embed) for one in features])
        if self._last[0] is not features[0] or self._last[1] is None:
            self._last = (features[0], prompt_table(features[0], self.mllm.embed))
        return self._last[1]

    def _sequences(
        self, features: Sequence[Features], kept: Tensor, context: int
    ) -> tuple[Table, list[Tensor], list[int]]:
        """The table of all samples, the index of each sample into its own rows, and each sample's number of rows."""
        pairs = list(zip(features, kept, strict=True))
        indices = [prompt_index(one, own) for one, own in pairs]
        if not context:
            return self._table(features), indices, [len(one.prompt_ids) + len(one.answer_ids) - 1 for one in features]
        self.mllm.check_weighable()
        parts = [
            with_context(prompt_table(one, self.mllm.embed), index, one, own, context)
            for (one, own), index in zip(pairs, indices, strict=True)
        ]
        tables = [table for table, _ in parts]
        return joined(tables), [index for _, index in parts], [len(table.embeds) for table in tables]

    def _losses(
        self,
        table: Table,
        index: Tensor,
        read: Tensor,
        targets: Tensor,
        packing: Packing | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Cross-entropy [Q, A] of the targets at the positions `read`."""
        attention.check_rope(self.mllm.decoder.config, table.positions)
        self.sequences += len(index)
        self.tokens += index.numel()
        if not self.settings.answers_only:
            everywhere = torch.arange(index.shape[1], device=index.device)
            logits = self.head(self.body(table, index, everywhere, packing, past))
            places = read.expand(len(index), -1)
            logits = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[2]))
        else:
            logits = self.head(self.body(table, index, read, packing, past))
        return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")

    def _prefix(self, features: Sequence[Features], table: Table) -> tuple[int, Past | None]:
        """Text that all these prompts begin with: its length, and its keys and values if that is worth a copy."""
        if self.settings.shared_prefix == "never" or features[0].blocks is not None:
            return 0, None
        length = min(int(one.visual_at[0]) for one in features)
        ids = features[0].prompt_ids[:length]
        enough = length >= (1 if self.settings.shared_prefix == "always" else LONG_PREFIX)
        if not enough or any(not torch.equal(one.prompt_ids[:length], ids) for one in features[1:]):
            return 0, None
        key = tuple(ids.tolist())
        if key not in self._prefixes:
            self._prefixes.clear()  # a run has one system prompt, so one entry is enough
            self._prefixes[key] = self.body.prefix(table, torch.arange(length, device=ids.device))
        past = self._prefixes[key]
        return (length, past) if past else (0, None)

    def _usual(self, table: Table, rows: Tensor) -> Past | None:
        """Keys and values of rows [P], reused from the last call if its rows began with them, as in local search."""
        known_table, known_rows, past = self._flips
        if known_table is not table or known_rows is None or not torch.equal(known_rows[: len(rows)], rows):
            past = self.body.prefix(table, rows)
            self._flips = (table, rows, past)
        return past

    def _buckets(self, table: Table, index: Tensor, answer: int) -> list[tuple[Tensor, Past | None]]:
        """Split sequences [Q, L] into buckets by the length of the prefix that they share with the most common tokens.

        Returns the sequence indices of each bucket, and the keys and values of the bucket's shared prefix.
        """
        usual = index.mode(dim=0).values
        agree = (index[:, : index.shape[1] - answer] == usual[: index.shape[1] - answer]).long().cumprod(1).sum(1)
        order = agree.argsort(stable=True)
        parts = [part for part in order.chunk(BUCKETS) if len(part)]
        lengths = [int(agree[part[0]]) for part in parts]
        past = self._usual(table, usual[: max(lengths)]) if max(lengths) else None
        return [
            (part, crop(past, length) if past and length else None) for part, length in zip(parts, lengths, strict=True)
        ]


def shares_prefix(features: Sequence[Features]) -> bool:
    """Whether the prompts are equal up to the end of their common image."""
    first = features[0]
    end = first.picture_end
    return all(
        one.image_id == first.image_id
        and len(one.visual_at) == len(first.visual_at)
        and torch.equal(one.prompt_ids[:end], first.prompt_ids[:end])
        for one in features[1:]
    )
