"""The state of a call, and the state that is stored with the KV cache from the prefill to later calls."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from evocomp.inference.choose import Compression, short_index, take
from evocomp.log import UserError


@dataclass
class Prompt:
    """A prompt with images, before it enters the decoder.

    numbers [B,S]: index of each visual token's image, -1 elsewhere; real [B,S]: tokens that are not padding;
    lengths [B]: number of columns of each row that are the prompt, None if only `labels` determine it; mask
    [B or 1,1 or heads,S,columns]: the caller's own attention mask, which applies to every layer, None without one
    """

    ids: Tensor
    numbers: Tensor
    real: Tensor
    labels: Tensor | None
    cached: bool
    mask: Tensor | None = None
    lengths: Tensor | None = None
    blocks: Tensor | None = None

    @property
    def visual(self) -> Tensor:
        """bool [B,S]: visual tokens."""
        return self.numbers >= 0

    @property
    def text(self) -> Tensor:
        """bool [B,S]: tokens that the selector may read: the question, not the answer nor anything after it."""
        text = self.real & ~self.visual
        column = torch.arange(text.shape[1], device=text.device)
        if self.lengths is not None:
            text = text & (column < self.lengths[:, None])
        if self.labels is not None:
            answer = (self.labels != -100).to(text.device)
            after = (answer.cumsum(1) == answer.sum(1, keepdim=True)) & answer.any(1, keepdim=True)
            text = text & ~answer & ~after
        return text


@dataclass
class Shortened:
    """How a batch was shortened.

    index [B,L]: see `short_index`; padding on the right is kept, so that the columns after the last visual token align
    with those of the full prompt; valid [B,L]: False at padding; all_real: whether `valid` is all True; full: length
    of the full prompt; tail: number of its last columns that are kept in every row; dropped [B]: number of dropped
    tokens per row; next_position [...,B,1]: position id of the first token after the prompt; owner [B,S]: cluster
    assignment, the index of the kept token that each token is averaged into; log_size [B,L]: log of the cluster size
    of each kept token; both None without context tokens
    """

    index: Tensor
    valid: Tensor
    all_real: bool
    full: int
    tail: int
    dropped: Tensor
    next_position: Tensor
    owner: Tensor | None = None
    log_size: Tensor | None = None

    @classmethod
    def make(cls, prompt: Prompt, kept: Tensor, owner: Tensor | None = None) -> "Shortened":
        """kept bool [B,S]: visual tokens to keep. `next_position` is that of a prompt without gaps or
        padding."""
        stays = prompt.real & (kept | ~prompt.visual)
        on_the_right = (prompt.real.flip(1).cumsum(1).flip(1) == 0) & prompt.real.any(1, keepdim=True)
        index, valid = short_index(stays | on_the_right)
        valid = valid & prompt.real.gather(1, index)
        dropped_column = (~(stays | on_the_right)).any(0).nonzero()
        return cls(
            index=index,
            valid=valid,
            all_real=bool(valid.all()),
            full=stays.shape[1],
            tail=stays.shape[1] - 1 - int(dropped_column.max()) if len(dropped_column) else stays.shape[1],
            dropped=(prompt.real & prompt.visual & ~kept).sum(1),
            next_position=torch.full((len(stays), 1), stays.shape[1], device=stays.device),
            owner=owner,
            log_size=None if owner is None else sizes_of(owner).gather(1, index).log(),
        )

    def shorten(self, whole: Tensor) -> Tensor:
        """Hidden states of the full prompt [B,S,D] -> those of the kept tokens [B,L,D], each the mean of its
        cluster."""
        if self.owner is None:
            return take(whole, self.index)
        owner = self.owner.to(whole.device)
        row, column = (owner != torch.arange(whole.shape[1], device=whole.device)).nonzero(as_tuple=True)
        total = whole.float().index_put((row, owner[row, column]), whole[row, column].float(), accumulate=True)
        return take((total / sizes_of(owner)[..., None]).to(whole.dtype), self.index)

    def restored(self, short: Tensor) -> Tensor:
        """Hidden states [B,L,D] -> [B,S,D], the length of the full prompt, with zeros at dropped tokens."""
        whole = short.new_zeros(len(short), self.full, short.shape[-1])
        row, column = self.valid.to(short.device).nonzero(as_tuple=True)
        whole[row, self.index.to(short.device)[row, column]] = short[row, column]
        return whole

    def check_logits(self, keep: int | Tensor | None) -> None:
        """Raise UserError unless `logits_to_keep` requests only logits after the last visual token."""
        if isinstance(keep, Tensor) or (keep is not None and keep - 1 > self.tail):
            raise UserError(
                "logits_to_keep counts tokens of the full prompt, dropped visual tokens included; "
                "use compress(restore_length=True)"
            )

    def continue_positions(self, kwargs: dict, past: int, new: int, dense: bool) -> None:
        """Set the position ids of `new` tokens that start `past` tokens after the prompt; layer 0's cache is short.

        Raises UserError if the caller passes other tokens than the next ones (it counted them by that cache).
        """
        following, given = self.next_position + past, kwargs.get("position_ids")
        if given is None:
            kwargs["position_ids"] = following + torch.arange(new, device=following.device)
            return
        if dense:
            given = kwargs["position_ids"] = given - self.dropped[:, None]
        any_row = (-1,) * (given.ndim - 2)  # the rows of M-RoPE are equal at text
        if new > 1 and bool((given[any_row][:, :1] != following[(-1,) * (following.ndim - 2)]).any()):
            raise UserError(
                "this cache was compressed before layer 0, so `generate` cannot tell which tokens are new; "
                "leave out past_key_values and give the whole conversation again, or use compress(layer=1)"
            )


def sizes_of(owner: Tensor) -> Tensor:
    """Cluster size of each token, at least 1, float [B,S]; see `Shortened.owner`."""
    ones = torch.ones(owner.shape, device=owner.device)
    return torch.zeros_like(ones).scatter_add(1, owner, ones).clamp(min=1)


@dataclass
class Pass:
    """One forward pass of the decoder.

    real [B,keys]: keys that are not padding, None if all are; record: what a prefill keeps; layers: indices of the
    layers that have run; given_mask [B or 1,1 or heads,S,columns]: mask of the full prompt if it is more than causal
    with padding; windowed: whether sliding-window layers restrict it to their window
    """

    state: Shortened
    prefill: bool
    real: Tensor | None
    record: Compression | None = None
    given_mask: Tensor | None = None
    windowed: bool = True
    blocks: Tensor | None = None
    deepstack: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    memo: dict = field(default_factory=dict)
    layers: set[int] = field(default_factory=set)

    @classmethod
    def further(cls, state: Shortened, attention_mask: Any, seen: int, past: int, new: int) -> "Pass":
        """A forward pass of `new` tokens that start `past` tokens after the prompt; `past` is negative if a draft
        that was given with the prompt has been cropped off the cache.

        attention_mask: [B,keys] over all tokens of the conversation or, without padding, over the `seen` tokens in
        layer 0's cache and the new ones. Raises UserError if it has fewer keys, or if the cache was cropped to before
        the end of the last image.
        """
        if past < -state.tail:
            raise UserError("the cache was cropped by more than what follows the images; start with an empty cache")
        whole, prompt = state.full + past + new, state.full + min(past, 0)
        valid = state.valid[:, : state.valid.shape[1] + min(past, 0)]
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            mask, keys = attention_mask.bool().to(state.valid.device), attention_mask.shape[1]
            if keys == seen + new < whole and state.all_real:
                return cls(state, prefill=False, real=mask)
            if keys < whole:
                raise UserError(
                    f"attention_mask has {keys} columns but the conversation {whole} tokens; give one "
                    "column for each, dropped tokens included"
                )
            tail = mask[:, prompt:whole]
        elif state.all_real:
            return cls(state, prefill=False, real=None)
        else:
            tail = state.valid.new_ones(len(state.valid), whole - prompt)
        return cls(state, prefill=False, real=torch.cat([valid, tail], dim=1))

    def take_over_deepstack(self, kwargs: dict, layer: int) -> None:
        """Move the features that the decoder would add after layer i >= `layer`, shortened, to before layer i + 1."""
        features, mask = kwargs["deepstack_visual_embeds"], kwargs["visual_pos_masks"]
        short = mask.gather(1, self.state.index) & self.state.valid
        for number in range(layer, len(features)):
            rows = features[number].new_zeros(*mask.shape, features[number].shape[-1])
            rows[mask] = features[number]
            self.deepstack[number + 1] = (short, self.state.shorten(rows)[short])
        kwargs["deepstack_visual_embeds"] = features[:layer]

    def add_deepstack(self, hidden: Tensor, number: int) -> Tensor:
        """Add, before layer `number`, the features that belong after the previous layer."""
        if number not in self.deepstack:
            return hidden
        where, features = (part.to(hidden.device) for part in self.deepstack[number])
        hidden = hidden.clone()
        hidden[where] = hidden[where] + features.to(hidden.dtype)
        return hidden

    def shorten_arguments(self, args: tuple, kwargs: dict) -> tuple:
        """One layer's arguments after the hidden states, short: rotary embedding, position ids, per-layer inputs.

        Changes `kwargs`; returns `args`, of which the first stays.

        Raises:
            UserError: the layer gets no rotary embedding.
        """
        args = (*args[:1], *map(self._shorten_argument, args[1:]))
        if "position_embeddings" not in kwargs and not any(isinstance(value, tuple) for value in args[1:]):
            raise UserError("compress() supports decoders with rotary embeddings only; use another model")
        for name in ("position_embeddings", "per_layer_input"):
            if name in kwargs:
                kwargs[name] = self._shorten_argument(kwargs[name])
        if kwargs.get("position_ids") is not None:
            # some decoders scale their queries by position: kept tokens keep their original positions
            kwargs["position_ids"] = take(kwargs["position_ids"][..., None], self.state.index)[..., 0]
        return args

    def _shorten_argument(self, value: Any) -> Any:
        """A tensor [..., B or 1, S, D], or a tuple of them, without the dropped tokens; all else as it is."""
        first = value[0] if isinstance(value, tuple) and value else value
        # another length than the prompt's: the model has cut it to its last tokens already
        if not isinstance(first, Tensor) or first.ndim < 3 or first.shape[-2] != self.state.full:
            return value
        if id(first) not in self.memo:
            parts = value if isinstance(value, tuple) else (value,)
            # the key holds only as long as the tensor lives
            self.memo[id(first)] = first, tuple(take(part, self.state.index) for part in parts)
        short = self.memo[id(first)][1]
        return short if isinstance(value, tuple) else short[0]


@dataclass
class Choice:
    """The choice for a prompt that grows without a cache, so that generation chooses once and not at every step.

    ids, kept, owner [B,prompt]: those of the prompt alone; tokens: its visual tokens; record: what was kept
    """

    ids: Tensor
    tokens: Tensor
    keep: int | float
    kept: Tensor
    owner: Tensor | None
    record: Compression

    @classmethod
    def make(
        cls,
        prompt: Prompt,
        length: int,
        tokens: Tensor,
        keep: int | float,
        kept: Tensor,
        owner: Tensor | None,
        record: Compression,
    ) -> "Choice":
        """The choice of the first `length` columns of `prompt`."""
        owner = None if owner is None else owner[:, :length]
        return cls(prompt.ids[:, :length], tokens, keep, kept[:, :length], owner, record)

    def for_next_step(
        self, prompt: Prompt, tokens: Tensor, keep: int | float
    ) -> tuple[Tensor, Tensor | None, Compression] | None:
        """`kept` and `owner` [B,S] for `prompt`, and the record, if it starts with the same prompt; else None."""
        start, (batch, length) = self.ids.shape[1], prompt.ids.shape
        if keep != self.keep or batch != len(self.ids) or length < start:
            return None
        if not torch.equal(self.ids, prompt.ids[:, :start]) or not torch.equal(self.tokens, tokens):
            return None
        new = torch.arange(start, length, device=self.kept.device).expand(batch, -1)
        owner = None if self.owner is None else torch.cat([self.owner, new], dim=1)
        return pad(self.kept, (0, length - start), value=False), owner, self.record
