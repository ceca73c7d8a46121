"""Runs a frozen LLM layer by layer, so that a method can shorten the sequence between two layers.

The published methods inside the LLM (FastV, SparseVLM, PyramidDrop, DART) are defined on values that a layer computes:
its queries, keys and output. Here one prompt at a time passes through the unchanged decoder layers. The state between
two layers is a `Running`, which a method replaces by a shorter one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from evocomp.log import UserError
from evocomp.mllm import attention
from evocomp.mllm.agreement import same_states
from evocomp.mllm.attention import short_windows
from evocomp.mllm.cache_argument import CACHE
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.layer_attention import causal_rows, has_projections, queries_and_keys, rotary, seen_rows


class LayerCache:
    """Keys and values of each layer, with a separate length for each; the part of transformers' cache that layers use.

    A copy shares the tensors of the original; later updates of either do not change the other.
    """

    def __init__(self, held: dict[int, tuple[Tensor, Tensor]] | None = None):
        self.held = dict(held or {})

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [1, heads, L, d] to those of a layer and return all of them."""
        if layer in self.held:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.held[layer], (keys, values), strict=True))
        self.held[layer] = (keys, values)
        return keys, values

    def copy(self) -> "LayerCache":
        return LayerCache(self.held)


@dataclass(frozen=True, eq=False)
class Running:
    """State of a prompt between two layers: the input of layer `layer`.

    Attributes:
        layer: index of the next layer.
        hidden: hidden states [L, D].
        positions: position ids [L].
        start, count: the visual rows are start..start+count-1.
        cache: keys and values of the layers executed so far.
        next_positions: for each executed layer, the position id of the first token after the prompt.
        previous: the input of the previous layer; None before layer 0.
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
        """Keep only some of the visual rows.

        Args:
            rows: ascending indices [R] into the visual rows.
            renumber: set the position ids to 0..L-1; otherwise all tokens keep theirs.
        """
        text = torch.arange(len(self.hidden), device=rows.device)
        index = torch.cat([text[: self.start], self.start + rows, text[self.start + self.count :]])
        positions = torch.arange(len(index), device=rows.device) if renumber else self.positions[index]
        return replace(self, hidden=self.hidden[index], positions=positions, count=len(rows))

    def with_visual(self, rows: Tensor) -> "Running":
        """Replace the visual rows by these rows [R, D]; position ids become 0..L-1."""
        hidden = torch.cat([self.hidden[: self.start], rows, self.hidden[self.start + self.count :]])
        return replace(self, hidden=hidden, positions=torch.arange(len(hidden), device=hidden.device), count=len(rows))


class _Entered(Exception):
    """Stops the decoder's forward pass at its first layer and carries the hidden states that this layer reads."""


class LayerLoop:
    """Runs a frozen MLLM's decoder layer by layer, without gradients.

    Raises:
        UserError: the loop does not support the decoder: position ids with several rows (M-RoPE), DeepStack, layers
            without plain projections, or states or attention that differ from the decoder's own forward pass on a short
            random sequence.
    """

    def __init__(self, mllm: FrozenMLLM):
        self.mllm = mllm
        self.decoder = mllm.decoder
        self.config = mllm.decoder.config
        fault = self._fault()
        if fault:
            raise UserError(
                f"{mllm.model.config.model_type} ({self.config.model_type}): {fault}; the layer loop supports only "
                "Llama-like decoders"
            )

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.decoder.layers)

    def _fault(self) -> str | None:
        if "mrope_section" in (getattr(self.config, "rope_parameters", None) or {}):
            return "position ids have several rows (M-RoPE)"
        others = set(attention.layer_types(self.config)) - set(attention.MASKED_TYPES)
        if others:
            return f"layers of type {', '.join(sorted(others))}"
        if not all(has_projections(layer) for layer in self._layers):
            return "layers without input_layernorm, q_proj, k_proj, v_proj and o_proj"
        self.mllm.check_plain()
        try:
            with short_windows(self.config):
                same = self._reproduces()
        except (UserError, torch.OutOfMemoryError):
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            return f"its layers cannot be run one by one ({str(error).splitlines()[0]})"
        return None if same else "its layers run one by one differ from its own forward pass"

    @torch.no_grad()
    def _reproduces(self) -> bool:
        """Whether states and attention equal those of the decoder's own forward pass on a random sequence.

        The position ids of the sequence have a gap, as after dropping tokens.
        """
        weight = self._layers[0].self_attn.o_proj.weight
        embeds = torch.randn(1, 16, self.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
        positions = torch.cat([torch.arange(8), 10 + torch.arange(8)]).to(weight.device)
        attention.check_rope(self.config, positions)
        mixed: list[Tensor] = []  # input of the output projection of each layer
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: mixed.append(args[0]))
            for layer in self._layers
        ]
        try:
            expected = self.decoder(
                inputs_embeds=embeds, attention_mask=torch.ones_like(positions)[None], position_ids=positions[None]
            ).last_hidden_state[0]
        finally:
            for handle in handles:
                handle.remove()
        running = Running(0, self._entered(embeds), positions, 0, len(positions))
        for theirs in mixed:
            module, rows = self._layers[running.layer].self_attn, self._rows(running)
            value = module.v_proj(rows)[0].unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
            weights = self.attention(running, len(positions)).to(value.dtype)
            ours = weights @ value.repeat_interleave(len(weights) // len(value), dim=0)
            if not same_states(ours.transpose(0, 1).flatten(1), theirs[0].reshape(len(positions), -1), weight.dtype):
                return False
            running = self.step(running)
        return same_states(self.normed(running), expected, weight.dtype)

    @property
    def _layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @torch.no_grad()
    def door(self, features: Features) -> Running:
        """The full prompt before layer 0. Raises `UserError` unless its visual tokens are contiguous."""
        at = features.visual_at
        if len(at) == 0 or int(at[-1]) - int(at[0]) + 1 != len(at):
            raise UserError("the layer loop supports only one image, whose tokens are contiguous without separators")
        everything = torch.arange(len(at), device=at.device)
        embeds, positions = self.mllm.assemble(features, features.visual[None], everything[None])
        return Running(0, self._entered(embeds), positions[0], int(at[0]), len(at))

    def _entered(self, embeds: Tensor) -> Tensor:
        """Hidden states [L, D] that the first layer reads for LLM inputs [1, L, D]; some decoders scale the inputs."""

        def leave(_: nn.Module, args: tuple, settings: dict) -> None:
            raise _Entered(args[0] if args else settings["hidden_states"])

        handle = self._layers[0].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            self.decoder(inputs_embeds=embeds, use_cache=False)
        except _Entered as entered:
            return entered.args[0][0]
        finally:
            handle.remove()
        raise AssertionError("the decoder did not run its first layer")

    @torch.no_grad()
    def step(self, running: Running) -> Running:
        """Run one layer."""
        cache = running.cache.copy()
        mask = self._mask(running.layer, len(running.hidden), len(running.hidden), running.hidden)
        return replace(
            running,
            layer=running.layer + 1,
            hidden=self._run(running.layer, running.hidden, running.positions, mask, cache),
            cache=cache,
            next_positions=(*running.next_positions, int(running.positions[-1]) + 1),
            previous=running,
        )

    def _run(self, number: int, hidden: Tensor, positions: Tensor, mask: Tensor | None, cache: LayerCache) -> Tensor:
        """Run one layer on hidden states [L, D] with position ids [L]."""
        output = self._layers[number](
            hidden[None],
            attention_mask=mask,
            position_ids=positions[None],
            position_embeddings=rotary(self.decoder, number, hidden[None], positions[None]),
            **{CACHE: cache},
        )
        return (output[0] if isinstance(output, tuple) else output)[0]

    def path(self, features: Features) -> list[Running]:
        """States of the prompt when nothing is dropped: entry i is the input of layer i, the last one is the output."""
        runs = [self.door(features)]
        for _ in range(self.depth):
            runs.append(self.step(runs[-1]))
        return runs

    def finish(self, running: Running, drop: Callable[[Running], Running] = lambda running: running) -> Running:
        """Run all remaining layers; `drop` is called before each of them."""
        while running.layer < self.depth:
            running = self.step(drop(running))
        return running

    def _rows(self, running: Running) -> Tensor:
        """Input [1, L, D] of the next layer's projections."""
        return self._layers[running.layer].input_layernorm(running.hidden[None])

    @torch.no_grad()
    def queries_and_keys(self, running: Running) -> tuple[Tensor, Tensor]:
        """Queries [H, L, d] and keys [kv, L, d] of the next layer, after rotary embedding."""
        module, rows, positions = self._layers[running.layer].self_attn, self._rows(running), running.positions[None]
        embeddings = rotary(self.decoder, running.layer, rows, positions)
        query, key = queries_and_keys(module, module.q_proj(rows), module.k_proj(rows), embeddings, positions)
        return query[0], key[0]

    def attention(self, running: Running, rows: int) -> Tensor:
        """Attention probabilities [H, rows, L] of the last `rows` queries in the next layer, float32."""
        query, key = self.queries_and_keys(running)
        seen = seen_rows(self.config, running.layer, rows, key.shape[1], key.device)
        return causal_rows(query, key, seen, self._layers[running.layer].self_attn.scaling)

    @torch.no_grad()
    def normed(self, running: Running) -> Tensor:
        """Hidden states [L, D] after the final norm of the LLM."""
        return self.decoder.norm(running.hidden)

    @torch.no_grad()
    def answer(self, running: Running, max_new_tokens: int = 8) -> tuple[str, Tensor]:
        """Greedy answer to a prompt that has passed all layers: its text, and the logits [V] of its first token.

        In each layer, new tokens continue the position ids of that layer's sequence, which may be renumbered.
        """
        assert running.layer == self.depth
        cache, last, tokens = running.cache.copy(), running.hidden[-1], []
        stops, first = set(self.mllm._stop_ids()), None
        for step in range(max_new_tokens):
            logits = self.mllm.head(self.decoder.norm(last[None]))[0].float()
            first = logits if first is None else first
            tokens.append(int(logits.argmax()))
            if tokens[-1] in stops or step == max_new_tokens - 1:
                break
            hidden = self._entered(self.mllm.embed(torch.tensor([[tokens[-1]]], device=last.device)))
            for number in range(self.depth):
                position = torch.tensor([running.next_positions[number] + step], device=last.device)
                mask = self._mask(number, 1, 1 + cache.held[number][0].shape[2], hidden)
                hidden = self._run(number, hidden, position, mask, cache)
            last = hidden[-1]
        return self.mllm.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(), first

    def _mask(self, number: int, rows: int, length: int, like: Tensor) -> Tensor | None:
        """Attention mask [1, 1, rows, L] of the last tokens of a sequence in a layer; None if all keys are visible.

        None also for FlashAttention, which makes its own mask.
        """
        if "flash" in (self.config._attn_implementation or ""):
            return None
        seen = seen_rows(self.config, number, rows, length, like.device)
        return None if bool(seen.all()) else attention.additive(seen, like.dtype)[None, None]
