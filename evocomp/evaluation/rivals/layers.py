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

from evocomp.log import UserError
from evocomp.mllm import attention
from evocomp.mllm.agreement import same_states
from evocomp.mllm.attention import short_windows
from evocomp.mllm.cache_argument import CACHE
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.layer_attention import causal_rows, has_projections, queries_and_keys, rotary, seen_rows


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


class _Entered(Exception):
    """Carries the hidden states that the first layer reads out of the decoder's forward."""


class LayerLoop:
    """Runs a frozen MLLM's decoder layer by layer, without gradients.

    Raises:
        UserError: the decoder is none that this loop reproduces: positions with several rows (M-RoPE), DeepStack,
            layers without plain projections, or states or attention that differ from the decoder's own forward on a
            short random sequence.
    """

    def __init__(self, mllm: FrozenMLLM):
        self.mllm = mllm
        self.decoder = mllm.decoder
        self.config = mllm.decoder.config
        fault = self._fault()
        if fault:
            raise UserError(
                f"{mllm.model.config.model_type} ({self.config.model_type}): {fault}; the layer loop is made for "
                "Llama-like decoders"
            )

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.decoder.layers)

    def _fault(self) -> str | None:
        if "mrope_section" in (getattr(self.config, "rope_parameters", None) or {}):
            return "positions have several rows (M-RoPE)"
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
        return None if same else "its layers run one by one differ from its own forward"

    @torch.no_grad()
    def _reproduces(self) -> bool:
        """Whether states and attention are those of the decoder's own forward, on a random sequence with a gap."""
        weight = self._layers[0].self_attn.o_proj.weight
        embeds = torch.randn(1, 16, self.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
        positions = torch.cat([torch.arange(8), 10 + torch.arange(8)]).to(weight.device)
        attention.check_rope(self.config, positions)
        mixed: list[Tensor] = []  # what the output projection of each layer reads
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
        """The whole prompt before layer 0. Raises UserError unless its visual tokens are one unbroken run."""
        at = features.visual_at
        if len(at) == 0 or int(at[-1]) - int(at[0]) + 1 != len(at):
            raise UserError("the layer loop is made for one image, its tokens an unbroken run without separators")
        everything = torch.arange(len(at), device=at.device)
        embeds, positions = self.mllm.assemble(features, features.visual[None], everything[None])
        return Running(0, self._entered(embeds), positions[0], int(at[0]), len(at))

    def _entered(self, embeds: Tensor) -> Tensor:
        """Hidden states [L, D] that the first layer reads for LLM inputs [1, L, D]: some decoders scale them."""

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
        """Through one layer."""
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

    def _run(
        self, number: int, hidden: Tensor, positions: Tensor, mask: Tensor | None, cache: LayerCache
    ) -> Tensor:
        """One layer over hidden states [L, D] at positions [L]."""
        output = self._layers[number](
            hidden[None],
            attention_mask=mask,
            position_ids=positions[None],
            position_embeddings=rotary(self.decoder, number, hidden[None], positions[None]),
            **{CACHE: cache},
        )
        return (output[0] if isinstance(output, tuple) else output)[0]

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

    def _rows(self, running: Running) -> Tensor:
        """What the next layer's projections read [1, L, D]."""
        return self._layers[running.layer].input_layernorm(running.hidden[None])

    @torch.no_grad()
    def queries_and_keys(self, running: Running) -> tuple[Tensor, Tensor]:
        """Rotated queries [H, L, d] and keys [kv, L, d] that the next layer makes of its input."""
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
            hidden = self._entered(self.mllm.embed(torch.tensor([[said[-1]]], device=last.device)))
            for number in range(self.depth):
                position = torch.tensor([running.next_positions[number] + step], device=last.device)
                mask = self._mask(number, 1, 1 + cache.held[number][0].shape[2], hidden)
                hidden = self._run(number, hidden, position, mask, cache)
            last = hidden[-1]
        return self.mllm.processor.tokenizer.decode(said, skip_special_tokens=True).strip(), first

    def _mask(self, number: int, rows: int, length: int, like: Tensor) -> Tensor | None:
        """Mask [1, 1, rows, L] of the last tokens of a sequence in a layer; None where every token sees all keys.

        FlashAttention makes its own.
        """
        if "flash" in (self.config._attn_implementation or ""):
            return None
        seen = seen_rows(self.config, number, rows, length, like.device)
        return None if bool(seen.all()) else attention.additive(seen, like.dtype)[None, None]
