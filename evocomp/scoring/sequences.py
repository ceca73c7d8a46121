"""Candidate sequences of a sample as indices into one table of rows: they differ only in the rows that they omit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from evocomp.mllm import context
from evocomp.mllm.features import Features

Past = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values [1, heads, P, d] of each layer, for the P tokens of a prefix that all sequences share."""


@dataclass(frozen=True, eq=False)
class Table:
    """Rows from which sequences are built.

    Attributes:
        embeds: input embeddings [S, D].
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
    """Several sequences with a common prefix packed into one, without attention to one another.

    Attributes:
        part: index of the sequence that each token belongs to [P + L]; -1: the common prefix.
        index: index of each token within its own sequence [P + L]; attention windows depend on it.
    """

    part: Tensor
    index: Tensor

    @classmethod
    def of(cls, shared: int, sizes: Sequence[int], device: torch.device | str = "cpu") -> "Packing":
        """Packing of a prefix of `shared` tokens, followed by the tokens of each sequence, `sizes` in number."""
        counts = torch.tensor([shared, *sizes])
        part = torch.arange(-1, len(sizes)).repeat_interleave(counts)
        own = [torch.arange(shared), *(shared + torch.arange(size) for size in sizes)]
        return cls(part.to(device), torch.cat(own).to(device))

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return int(self.index.max()) + 1

    def mask(self, plain: Tensor, start: int = 0) -> Tensor:
        """Attention mask of the tokens from index `start` on, bool [P + L - start, P + L].

        Args:
            plain: attention mask of a single sequence, bool [n, n], n at least `longest`.
            start: index of the first query.
        """
        queries = self.part[start:, None]
        together = (queries == self.part) | (self.part == -1)
        return plain[self.index[start:]][:, self.index] & together


class Body(Protocol):
    """A decoder without the output head, which runs on sequences of a table's rows."""

    def __call__(
        self, table: Table, index: Tensor, read: Tensor, packing: Packing | None = None, past: Past | None = None
    ) -> Tensor:
        """Final hidden states at the requested positions.

        Args:
            table: the rows.
            index: table rows of each sequence [Q, L], without the tokens of `past`.
            read: requested indices into `index`: [A] for all sequences, or [Q, A].
            packing: packing of the tokens of `past` and `index`, if each row packs several sequences; see `packs`.
            past: keys and values of the tokens before `index`.

        Returns:
            [Q, A, D]
        """
        ...

    def prefix(self, table: Table, rows: Tensor) -> Past | None:
        """Keys and values of the rows [P]; None if this decoder's cache cannot be shared between sequences."""
        ...

    @property
    def packs(self) -> bool:
        """Whether packed sequences get the same hidden states as separate ones."""
        ...


def crop(past: Past, length: int) -> Past:
    """The keys and values of the first `length` tokens."""
    return tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in past)


def prompt_table(features: Features, embed: torch.nn.Module) -> Table:
    """Table of a sample: row s is token s of the prompt; then follow the answer's tokens except the last one.

    The last answer token is left out because it predicts nothing that is scored.
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
    """Rows of `prompt_table` [Q, L] for masks kept [Q, R]: text, separators, kept tokens, answer, in prompt order."""
    size, answer = len(features.prompt_ids), len(features.answer_ids)
    tail = torch.arange(size, size + answer - 1, device=kept.device)
    rest = torch.cat([features.fixed_at, tail]).expand(len(kept), -1)
    return torch.cat([rest, features.visual_at[kept]], dim=1).sort(dim=1).values


def with_context(table: Table, index: Tensor, features: Features, kept: Tensor, count: int) -> tuple[Table, Tensor]:
    """Add `count` context tokens to each of a sample's sequences [K, L]; their rows are appended to the table."""
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
    """The concatenated tables of several samples."""
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
    """Additive attention mask [Q, 1, L, P + L] with the log cluster sizes of the keys [Q, P + L].

    seen: bool [L, P + L]; None: causal.
    """
    keys = log_size.shape[1]
    if seen is None:
        seen = torch.ones(length, keys, dtype=torch.bool, device=log_size.device).tril(keys - length)
    return context.add_log_size(seen[None, None], log_size, dtype)


def padded(indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Pad the sequences of several samples, and offset their indices into the joined table of parts of these sizes.

    Padding is on the right and repeats the last row; it does not affect a causal decoder.
    """
    longest = max(index.shape[1] for index in indices)
    rows, start = [], 0
    for index, size in zip(indices, sizes, strict=True):
        missing = longest - index.shape[1]
        rows.append(start + torch.cat([index, index[:, -1:].expand(-1, missing)], dim=1))
        start += size
    return torch.cat(rows)


def continued(positions: Tensor, length: int) -> Tensor:
    """Positions [..., L] extended to `length` in steps of one."""
    missing = length - positions.shape[-1]
    if missing <= 0:
        return positions
    steps = torch.arange(1, missing + 1, device=positions.device)
    return torch.cat([positions, positions[..., -1:] + steps], dim=-1)
