"""Choice of the kept tokens of a prompt with images, shared by hooks (`compress`) and rewriting
(`compress_inputs`)."""

from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from evocomp.inference.pick import LLMInput, Pick, Picker, name_of
from evocomp.log import UserError, warn_once
from evocomp.mllm import families

Newline = Literal["keep", "drop"]
Positions = Literal["original", "dense"]


class Settings(NamedTuple):
    """Arguments of `compress` and `compress_inputs`, with defaults filled in and checked."""

    keep: int | float
    layer: int
    positions: Positions
    newline: Newline

    @classmethod
    def of(
        cls,
        model: nn.Module,
        picker: Picker,
        keep: int | float | None,
        layer: int | None,
        positions: Positions | None,
        newline: Newline,
    ) -> "Settings":
        """Arguments that are None default to those saved with the compressor, else to 192, 0, "original".

        Raises UserError for a value that the model or its family does not support.
        """
        saved = getattr(getattr(picker, "compressor", None), "config", None)
        keep = getattr(saved, "keep", 192) if keep is None else keep
        layer = getattr(saved, "prune_layer", 0) if layer is None else layer
        positions = getattr(saved, "positions", "original") if positions is None else positions
        layers = len(families.decoder(model).layers)
        if not isinstance(layer, Integral) or not 0 <= layer < layers:
            raise UserError(f"layer={layer!r}: the model has layers 0 to {layers - 1}, give one of them (int)")
        if layer > 0 and getattr(picker, "merges", False):
            raise UserError(f"layer={layer}: {name_of(picker)} merges tokens before the LLM; use layer=0")
        if newline not in ("keep", "drop"):
            raise UserError(f"newline={newline!r}: use 'keep' or 'drop'")
        if positions not in ("original", "dense"):
            raise UserError(f"positions={positions!r}: use 'original' or 'dense'")
        if positions == "dense" and (layer > 0 or families.policy(model).mrope):
            raise UserError("positions='dense' needs layer=0 and a family without M-RoPE; use 'original'")
        return cls(check_keep(keep), layer, positions, newline)


@dataclass(frozen=True)
class MergedTokens:
    """New tokens of one image, from a selector that merges tokens.

    tokens: [r, D]; row: row of the batch; index: their indices in the row [r]; origin: indices of the tokens whose
    position ids they take [r]
    """

    tokens: Tensor
    row: int
    index: Tensor
    origin: Tensor

    def write(self, kwargs: dict) -> None:
        """Write them into the decoder's keyword arguments `inputs_embeds` and `position_ids`."""
        embeds = kwargs["inputs_embeds"]
        row = torch.full_like(self.index, self.row)
        kwargs["inputs_embeds"] = embeds.index_put((row, self.index), self.tokens.to(embeds))
        if torch.equal(self.index, self.origin):
            return
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
        positions = positions.expand(*positions.shape[:-2], len(embeds), -1).clone()
        positions[..., row, self.index] = positions[..., row, self.origin]
        kwargs["position_ids"] = positions


@dataclass(frozen=True)
class Compression:
    """What was kept of one batch of prompts, [row][image].

    indices: kept tokens of an image, ascending, counted within the image (newline separators included)
    picked:  tokens of an image that the selector chose, ascending, counted without separators
    scores:  the selector's scores [n] of the image's tokens without separators, None if it has none
    sizes:   number of tokens averaged into each kept token of `indices`; None: one each
    before, after: number of visual tokens per row, in the prompt and kept
    merged:  new tokens of the images, if the selector makes any; they replace the tokens at `indices`
    """

    indices: list[list[Tensor]]
    picked: list[list[Tensor]]
    scores: list[list[Tensor | None]]
    sizes: list[list[Tensor | None]]
    before: list[int]
    after: list[int]
    merged: list[MergedTokens] = field(default_factory=list)


def check_keep(keep: int | float) -> int | float:
    """Raise UserError unless `keep` is an integer >= 0 or a fraction in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, Integral | float):
        raise UserError(f"keep={keep!r}: give the number (int) or the fraction (float) of tokens to keep per image")
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise UserError(f"keep={keep}: a fraction must lie in (0, 1]; for a number of tokens give an int")
    if keep < 0:
        raise UserError(f"keep={keep}: the number of tokens cannot be negative")
    return keep


def kept_count(keep: int | float, n: int) -> int:
    """Number of tokens to keep of an image of n tokens."""
    if isinstance(keep, float):
        return max(1, round(keep * n)) if n else 0
    if keep > n:
        warn_once(f"keep={keep} is more than the number of tokens of some images; all tokens of those images are kept")
    return min(keep, n)


@torch.no_grad()
def choose(
    model: nn.Module,
    picker: Picker,
    keep: int | float,
    newline: Newline,
    tokens: Tensor,
    numbers: Tensor,
    text: Tensor,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Compression]:
    """Let the selector choose the kept tokens of every image of a batch.

    tokens [B,S,D]: the merged input embeddings; numbers [B,S]: index of each visual token's image, -1 elsewhere (see
    `families.image_numbers`); text [B,S]: the tokens that the selector may read; positions: position ids of the
    decoder, None: 0, 1, ... Returns bool [B,S], True at kept visual tokens; the cluster assignment [B,S], the index of
    the kept token that each one is averaged into, or None without context tokens; and the record of what was kept.
    """
    batch, length = numbers.shape
    flat = numbers.flatten()
    # indices of each image's tokens in the flattened batch
    spans = list((flat >= 0).nonzero().squeeze(1).split(flat[flat >= 0].bincount().tolist()))
    rows = [int(span[0]) // length for span in spans]
    images = [tokens.reshape(batch * length, -1)[span] for span in spans]
    separators = [families.newline_rows(model, image) for image in images]
    contents = [(~is_newline).nonzero().squeeze(1) for is_newline in separators]
    prompts = {row: tokens[row, text[row]] for row in set(rows)}
    more = {}
    if getattr(picker, "reads_llm_input", False):
        indices = [span[content] - row * length for row, span, content in zip(rows, spans, contents, strict=True)]
        more = {"llm_input": LLMInput(tokens, text, numbers >= 0, positions, rows, indices)}
    picks = picker.pick(
        [image[content] for image, content in zip(images, contents, strict=True)],
        [prompts[row] for row in rows],
        [kept_count(keep, len(content)) for content in contents],
        **more,
    )
    kept = torch.zeros(batch * length, dtype=torch.bool, device=tokens.device)
    owner = torch.arange(length, device=tokens.device).repeat(batch)
    record = Compression(*([[] for _ in range(batch)] for _ in range(4)), [0] * batch, [0] * batch)
    for row, span, content, is_newline, pick in zip(rows, spans, contents, separators, picks, strict=True):
        picked, scores, assignment, merged, origin = Pick(*pick)
        stays = is_newline.clone() if newline == "keep" else torch.zeros_like(is_newline)
        stays[content[picked]] = True
        kept[span] = stays
        record.indices[row].append(stays.nonzero().squeeze(1))
        record.picked[row].append(picked)
        record.scores[row].append(scores)
        record.sizes[row].append(None)
        if assignment is not None:
            owner[span[content]] = span[content[assignment]] - row * length
            sizes = torch.ones(len(span), dtype=torch.long, device=tokens.device)
            sizes[content] = assignment.bincount(minlength=len(content))
            record.sizes[row][-1] = sizes[stays]
        if merged is not None:
            at = span[content] - row * length
            record.merged.append(MergedTokens(merged, row, at[picked], at[origin]))
        record.before[row] += len(span)
        record.after[row] += len(record.indices[row][-1])
    merged = any(sizes is not None for row in record.sizes for sizes in row)
    return kept.view(batch, length), owner.view(batch, length) if merged else None, record


def short_index(stays: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the kept tokens as a left-padded batch.

    stays bool [B,S] -> index [B,L] into the S tokens (original order), and valid bool [B,L], False at
    padding; L is the largest number of kept tokens of a row.
    """
    count = stays.sum(1)
    length = int(count.max())
    # a stable sort puts dropped tokens first and preserves the order within both groups
    index = torch.argsort(stays.to(torch.int8), dim=1, stable=True)[:, stays.shape[1] - length :]
    valid = torch.arange(length, device=stays.device)[None] >= (length - count)[:, None]
    return index, valid


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the sequence. x [..., B or 1, S, D], index [B,L] -> [..., B, L, D]."""
    index = index.to(x.device)[..., None].expand(*x.shape[:-3], *index.shape, x.shape[-1])
    return x.expand(*x.shape[:-3], index.shape[-3], *x.shape[-2:]).gather(-2, index)
