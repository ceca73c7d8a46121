"""Many sequences over a few rows: what the candidates of a sample are, for they differ only in what they leave out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from evocomp.mllm import context
from evocomp.mllm.features import Features

Past = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values [1, heads, P, d] of each layer, for P tokens that all sequences begin with."""


@dataclass(frozen=True, eq=False)
class Table:
    """Rows that sequences are made of.

    Attributes:
        embeds: what the LLM reads [S, D].
        positions: position ids, [S], or [4, S] with M-RoPE.
        log_size: log of how many tokens each row stands for [S], added to the logits of the attention to it; None: one
            each.
        deepstack: what the first decoder layers add to each row [layers, S, D]; None: nothing.
        blocks: the bidirectional block of each row [S], -1 for none; None: attention is causal.
    """

    embeds: Tensor
    positions: Tensor
    log_size: Tensor | None = None
    deepstack: Tensor | None = None
    blocks: Tensor | None = None

    def part(self, rows: slice) -> "Table":
        """Some of the rows."""
        return Table(
            self.embeds[rows],
            self.positions[..., rows],
            None if self.log_size is None else self.log_size[rows],
            None if self.deepstack is None else self.deepstack[:, rows],
            None if self.blocks is None else self.blocks[rows],
        )


@dataclass(frozen=True, eq=False)
class Packing:
    """Several sequences packed into one, which begin with the same tokens and do not see one another.

    Attributes:
        part: which of the packed sequences each token belongs to [P + L]; -1: all of them.
        index: index of each token within its own sequence [P + L]; attention windows count by it.
    """

    part: Tensor
    index: Tensor

    @classmethod
    def of(cls, shared: int, sizes: Sequence[int], device: torch.device | str = "cpu") -> "Packing":
        """`shared` common tokens, then one sequence's own tokens after another's, so many of each."""
        counts = torch.tensor([shared, *sizes])
        part = torch.arange(-1, len(sizes)).repeat_interleave(counts)
        own = [torch.arange(shared), *(shared + torch.arange(size) for size in sizes)]
        return cls(part.to(device), torch.cat(own).to(device))

    @property
    def longest(self) -> int:
        """Tokens of the longest of the packed sequences."""
        return int(self.index.max()) + 1

    def mask(self, plain: Tensor, start: int = 0) -> Tensor:
        """Which keys the tokens from `start` on attend to, bool [P + L - start, P + L].

        Args:
            plain: the same of a sequence on its own, bool [n, n], n at least `longest`.
        """
        queries = self.part[start:, None]
        together = (queries == self.part) | (self.part == -1)
        return plain[self.index[start:]][:, self.index] & together


class Body(Protocol):
    """A decoder without its head, run over sequences of a table's rows."""

    def __call__(
        self, table: Table, index: Tensor, read: Tensor, packing: Packing | None = None, past: Past | None = None
    ) -> Tensor:
        """Last hidden states at the read places.

        Args:
            index: rows of each sequence [Q, L], after those of `past`.
            read: places in `index` that are asked for: [A] in all sequences, or [Q, A].
            packing: of the tokens of `past` and `index`, if each row packs several sequences; see `packs`.
            past: what came before.

        Returns:
            [Q, A, D]
        """
        ...

    def prefix(self, table: Table, rows: Tensor) -> Past | None:
        """Keys and values of the rows [P]; None if this decoder's cannot be shared."""
        ...

    @property
    def packs(self) -> bool:
        """Whether this decoder gives packed sequences the states that they have on their own."""
        ...


def crop(past: Past, length: int) -> Past:
    """The first `length` tokens of it."""
    return tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in past)


def prompt_table(features: Features, embed: torch.nn.Module) -> Table:
    """All that a sample's sequences may hold: row s is place s of its prompt, then its answer but the last token.

    Nothing is read from the answer's last token, so it is left out.
    """
    size = len(features.prompt_ids)
    fixed, tail = features.fixed_rows(embed), embed(features.answer_ids[:-1])
    embeds = fixed.new_empty(size, fixed.shape[1])
    embeds[features.fixed_at] = fixed
    embeds[features.visual_at] = features.visual.to(fixed.dtype)
    deepstack, blocks = features.deepstack_rows(), features.blocks
    return Table(
        torch.cat([embeds, tail]),
        continued(features.positions, size + len(tail)),
        deepstack=None if deepstack is None else pad(deepstack, (0, 0, 0, len(tail))),
        blocks=None if blocks is None else pad(blocks, (0, len(tail)), value=-1),
    )


def prompt_index(features: Features, kept: Tensor) -> Tensor:
    """Rows of `prompt_table` for masks kept [Q, R]: text, separators, kept tokens and answer in their order [Q, L]."""
    size, answer = len(features.prompt_ids), len(features.answer_ids)
    tail = torch.arange(size, size + answer - 1, device=kept.device)
    rest = torch.cat([features.fixed_at, tail]).expand(len(kept), -1)
    return torch.cat([rest, features.visual_at[kept]], dim=1).sort(dim=1).values


def with_context(table: Table, index: Tensor, features: Features, kept: Tensor, count: int) -> tuple[Table, Tensor]:
    """A sample's table and sequences [K, L] with so many context tokens in each: their rows are the table's last."""
    centres, owner = context.owners(features.visual, kept, count)
    tokens, log_size = context.means(features.visual, centres, owner)
    at, size = features.visual_at[centres], len(table.embeds)
    rows = torch.arange(size, size + at.numel(), device=index.device).view(at.shape)
    order = torch.cat([index, at], dim=1).argsort(dim=1)
    larger = Table(
        torch.cat([table.embeds, tokens.flatten(0, 1).to(table.embeds.dtype)]),
        torch.cat([table.positions, table.positions[..., at.flatten()]], dim=-1),
        torch.cat([log_size.new_zeros(size), log_size.flatten()]),
    )
    return larger, torch.cat([index, rows], dim=1).gather(1, order)


def joined(tables: Sequence[Table]) -> Table:
    """Tables of several samples one after another."""
    sizes = [table.log_size for table in tables if table.log_size is not None]
    deepstack = [table.deepstack for table in tables if table.deepstack is not None]
    blocks = [table.blocks for table in tables if table.blocks is not None]
    return Table(
        torch.cat([table.embeds for table in tables]),
        torch.cat([table.positions for table in tables], dim=-1),
        torch.cat(sizes) if sizes else None,
        torch.cat(deepstack, dim=1) if deepstack else None,
        torch.cat(blocks) if blocks else None,
    )


def weighed(seen: Tensor | None, log_size: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """What is added to the logits of the attention [Q, 1, L, P + L], with log sizes of the keys [Q, P + L].

    seen: bool [L, P + L], or None: each query sees the keys before it and itself.
    """
    keys = log_size.shape[1]
    if seen is None:
        seen = torch.ones(length, keys, dtype=torch.bool, device=log_size.device).tril(keys - length)
    return context.add_log_size(seen[None, None], log_size, dtype)


def padded(indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Sequences of several samples over their joined table, whose parts have these sizes; shorter ones padded.

    A causal decoder never looks back from padding on the right, which repeats the last row.
    """
    longest = max(index.shape[1] for index in indices)
    rows, start = [], 0
    for index, size in zip(indices, sizes, strict=True):
        missing = longest - index.shape[1]
        rows.append(start + torch.cat([index, index[:, -1:].expand(-1, missing)], dim=1))
        start += size
    return torch.cat(rows)


def continued(positions: Tensor, length: int) -> Tensor:
    """Positions [..., L] carried on by steps of one to `length`."""
    missing = length - positions.shape[-1]
    if missing <= 0:
        return positions
    steps = torch.arange(1, missing + 1, device=positions.device)
    return torch.cat([positions, positions[..., -1:] + steps], dim=-1)
