"""A frozen LLM run layer by layer, so that a method may shorten the sequence between two layers.

The published in-LLM methods (FastV, SparseVLM, PyramidDrop, DART) are defined on what a layer itself
computes: its queries, keys and output. Here one prompt at a time passes through the unchanged decoder layers;
whatever stands between two layers is a `Running`, which methods turn into a shorter one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from evocomp.log import UserError
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM


class LayerCache:
    """Keys and values per layer, each of its own length. Speaks as much of transformers' cache as a layer
    asks for.

    A copy shares what was there before and goes its own way from then on.
    """

    def __init__(self, held: dict[int, tuple[Tensor, Tensor]] | None = None):
        self.held = dict(held or {})

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [1, heads, L, d] to a layer's keys and values; returns all of them."""
        if layer in self.held:
            keys, values = (
                torch.cat(pair, dim=2) for pair in zip(self.held[layer], (keys, values), strict=True)
            )
        self.held[layer] = (keys, values)
        return keys, values

    def copy(self) -> "LayerCache":
        return LayerCache(self.held)


@dataclass(frozen=True, eq=False)
class Running:
    """A prompt between two layers: what layer `layer` would read.

    Attributes:
        layer: the next layer (0-based).
        hidden: [L, D].
        positions: position ids [L].
        start, count: the visual rows are start..start+count-1.
        cache: of the layers executed so far.
        next_positions: per executed layer, the position of the first token after the prompt.
        previous: the prompt as the layer before read it; None at the door.
    """

    layer: int
    hidden: Tensor
    positions: Tensor
    start: int
    count: int
    cache: LayerCache = field(default_factory=LayerCache)
    next_positions: tuple[int, ...] = ()
    previous: "Running | None" = None

    @property
    def visual(self) -> Tensor:
        """The visual rows [count, D]."""
        return self.hidden[self.start : self.start + self.count]

    def keep(self, rows: Tensor, renumber: bool) -> "Running":
        """Only these of the visual rows, counted within them, ascending [R]; positions stay or start from 0
        again."""
        text = torch.arange(len(self.hidden), device=rows.device)
        index = torch.cat([text[: self.start], self.start + rows, text[self.start + self.count :]])
        positions = torch.arange(len(index), device=rows.device) if renumber else self.positions[index]
        return replace(self, hidden=self.hidden[index], positions=positions, count=len(rows))

    def with_visual(self, rows: Tensor) -> "Running":
        """These rows [R, D] in place of the visual ones, positions from 0."""
        hidden = torch.cat([self.hidden[: self.start], rows, self.hidden[self.start + self.count :]])
        return replace(
            self, hidden=hidden, positions=torch.arange(len(hidden), device=hidden.device), count=len(rows)
        )


class LayerLoop:
    """Runs a frozen MLLM's decoder layer by layer, without gradients.

    Raises:
        UserError: positions with several rows (M-RoPE), sliding windows, DeepStack, or layers without plain q
            and k.
    """

    def __init__(self, mllm: FrozenMLLM):
        self.mllm = mllm
        self.decoder = mllm.decoder
        self.depth = len(self.decoder.layers)
        fault = self._fault()
        if fault:
            raise UserError(
                f"{mllm.model.config.model_type}: {fault}; the layer loop is made for Llama-like decoders"
            )

    def _fault(self) -> str | None:
        config = self.decoder.config
        if getattr(config, "rope_parameters", None) and "mrope_section" in config.rope_parameters:
            return "positions have several rows (M-RoPE)"
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            return "some layers attend to a sliding window"
        if not all(
            hasattr(layer.self_attn, "q_proj") and hasattr(layer, "input_layernorm") for layer in self._layers
        ):
            return "attention without q_proj and k_proj"
        self.mllm.check_scorable()
        return None

    @property
    def _layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @torch.no_grad()
    def door(self, features: Features) -> Running:
        """The whole prompt before layer 0. Raises UserError unless its visual tokens are one unbroken run."""
        at = features.visual_at
        if len(at) == 0 or int(at[-1]) - int(at[0]) + 1 != len(at):
            raise UserError("the layer loop is made for one image, its tokens an unbroken run without separators")
        everything = torch.arange(len(at), device=at.device)
        embeds, positions = self.mllm.assemble(features, features.visual[None], everything[None])
        return Running(0, embeds[0], positions[0], int(at[0]), len(at))

    @torch.no_grad()
    def step(self, running: Running) -> Running:
        """Through one layer."""
        layer, hidden = self._layers[running.layer], running.hidden[None]
        cache = running.cache.copy()
        output = layer(
            hidden,
            attention_mask=self._mask(len(running.hidden), hidden),
            position_embeddings=self._rotary(hidden, running.positions),
            past_key_values=cache,
        )
        output = output[0] if isinstance(output, tuple) else output
        return replace(
            running,
            layer=running.layer + 1,
            hidden=output[0],
            cache=cache,
            next_positions=(*running.next_positions, int(running.positions[-1]) + 1),
            previous=running,
        )

    def path(self, features: Features) -> list[Running]:
        """The prompt before each layer when nothing is dropped: entry i is before layer i, the last after
        all."""
        runs = [self.door(features)]
        for _ in range(self.depth):
            runs.append(self.step(runs[-1]))
        return runs

    def finish(
        self, running: Running, drop: Callable[[Running], Running] = lambda running: running
    ) -> Running:
        """Through all remaining layers; `drop` is asked before each of them."""
        while running.layer < self.depth:
            running = self.step(drop(running))
        return running

    @torch.no_grad()
    def queries_and_keys(self, running: Running) -> tuple[Tensor, Tensor]:
        """Rotated queries [H, L, d] and keys [kv, L, d] that the next layer makes of its input."""
        layer = self._layers[running.layer]
        module, rows = layer.self_attn, layer.input_layernorm(running.hidden[None])
        query, key = (
            getattr(module, name)(rows).unflatten(-1, (-1, module.head_dim)) for name in ("q_proj", "k_proj")
        )
        query, key = (
            (getattr(module, name)(x) if hasattr(module, name) else x).transpose(1, 2)
            for name, x in (("q_norm", query), ("k_norm", key))
        )
        query, key = apply_rotary_pos_emb(query, key, *self._rotary(rows, running.positions))
        return query[0], key[0]

    def attention(self, running: Running, rows: int) -> Tensor:
        """Attention probabilities [H, rows, L] of the last `rows` queries in the next layer, float32."""
        query, key = self.queries_and_keys(running)
        key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
        scores = (
            query[:, -rows:].float()
            @ key.float().transpose(1, 2)
            * self._layers[running.layer].self_attn.scaling
        )
        length = key.shape[1]
        seen = torch.ones(rows, length, dtype=torch.bool, device=key.device).tril(length - rows)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)

    @torch.no_grad()
    def normed(self, running: Running) -> Tensor:
        """Hidden rows [L, D] after the LLM's final norm."""
        return self.decoder.norm(running.hidden)

    @torch.no_grad()
    def answer(self, running: Running, max_new_tokens: int = 8) -> tuple[str, Tensor]:
        """Greedy answer of a prompt that is through all layers: text, and the logits [V] of its first token.

        A new token continues the positions of each layer's own, possibly renumbered, sequence.
        """
        assert running.layer == self.depth
        cache, last, said = running.cache.copy(), running.hidden[-1], []
        stops, first = set(self.mllm._stop_ids()), None
        for step in range(max_new_tokens):
            logits = self.mllm.head(self.decoder.norm(last[None]))[0].float()
            first = logits if first is None else first
            said.append(int(logits.argmax()))
            if said[-1] in stops or step == max_new_tokens - 1:
                break
            hidden = self.mllm.embed(torch.tensor([[said[-1]]], device=last.device))
            for number, layer in enumerate(self._layers):
                position = torch.tensor([running.next_positions[number] + step], device=last.device)
                output = layer(
                    hidden,
                    attention_mask=None,
                    position_embeddings=self._rotary(hidden, position),
                    past_key_values=cache,
                )
                hidden = output[0] if isinstance(output, tuple) else output
            last = hidden[0, -1]
        return self.mllm.processor.tokenizer.decode(said, skip_special_tokens=True).strip(), first

    def _rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder.rotary_emb(hidden, positions[None])

    def _mask(self, length: int, like: Tensor) -> Tensor | None:
        """Causal mask [1, 1, L, L]; FlashAttention makes its own."""
        if "flash" in (self.decoder.config._attn_implementation or ""):
            return None
        blocked = torch.full(
            (length, length), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device
        )
        return blocked.triu(1)[None, None]
