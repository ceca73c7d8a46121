"""Hooks that record hidden states, queries, keys and attention of a CLIP tower and of a decoder.

Attention is recomputed from the recorded queries and keys. It therefore works with every attention kernel, including
those that never return attention probabilities (SDPA, FlashAttention).
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evocomp.log import UserError
from evocomp.mllm import families
from evocomp.mllm.agreement import same_states
from evocomp.mllm.attention import FULL, layer_types, plain_masks, short_windows
from evocomp.mllm.layer_attention import has_projections, queries_and_keys

TOWER_FIELDS = frozenset(
    {
        "clip_hidden",
        "clip_keys",
        "clip_queries",
        "clip_next_keys",
        "clip_next_queries",
        "cls_attention",
        "cls_attention_first",
        "project",
    }
)
"""Fields of `SelectionInputs` that come from the vision tower."""

DECODER_FIELDS = frozenset({"llm_attention", "llm_keys", "llm_hidden"})
"""Fields of `SelectionInputs` that come from the decoder."""


# ------------------------------------------------------------ the vision tower


@dataclass(frozen=True, eq=False)
class ClipTower:
    """A CLIP tower with a class token; LLaVA's projector takes the output of one of its layers.

    layers:    the tower's layers
    read:      0-based index of the layer whose output the projector takes
    following: index of the layer after it, or the same index if it is the last layer
    """

    tower: nn.Module
    layers: nn.ModuleList
    read: int
    following: int
    heads: int
    projector: nn.Module

    @classmethod
    def of(cls, model: nn.Module) -> "ClipTower | None":
        """The tower of a multimodal LLM; None if it has no class token, or is not read as LLaVA reads it."""
        config, base = families.unwrap(model).config, families.base(model)
        # LLaVA-NeXT and others cut an image into tiles: a row of the tower is not an image there
        if config.model_type != "llava" or config.vision_feature_select_strategy != "default":
            return None
        tower, layer = base.vision_tower, config.vision_feature_layer
        if "clip" not in tower.config.model_type or not isinstance(layer, int):
            return None
        layers = getattr(tower, "vision_model", tower).encoder.layers
        depth = len(layers)
        read = depth + layer if layer < 0 else layer - 1
        heads = tower.config.num_attention_heads
        return cls(tower, layers, read, min(read + 1, depth - 1), heads, base.multi_modal_projector)


@dataclass
class TowerRecord:
    """Record of one forward pass of a CLIP tower over images [I, ...].

    queries, keys: by layer, heads concatenated [I, N+1, C]; token 0 is the class token
    hidden: input of the projector, with the class token [I, N+1, C]
    projected: output of the projector [I, N, D]
    """

    clip: ClipTower
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    projected: Tensor | None = None

    def find(self, visual: Tensor, first: int = 0) -> int | None:
        """Index of the image whose visual tokens [N, D] are bitwise equal to `visual`; None if there is none.

        first: index to begin with. `generate` repeats prompts for beams, so their order may differ from the images'.
        """
        seen = () if self.projected is None else self.projected
        for step in range(len(seen)):
            image = (first + step) % len(seen)
            if torch.equal(seen[image].to(visual), visual):
                return image
        return None

    def fields(self, image: int) -> dict[str, Any]:
        """Values of `TOWER_FIELDS` for one of the images."""
        read, following = self.clip.read, self.clip.following
        queries, keys = ({n: x[image] for n, x in found.items()} for found in (self.queries, self.keys))
        return {
            "clip_hidden": self.hidden[image],
            "clip_keys": keys[read],
            "clip_queries": queries[read],
            "clip_next_keys": keys[following],
            "clip_next_queries": queries[following],
            "cls_attention": class_attention(queries[read], keys[read], self.clip.heads),
            "cls_attention_first": class_attention(queries[0], keys[0], self.clip.heads),
            "project": self.clip.projector,
        }


class TowerObserver:
    """Records every forward pass of a CLIP tower until `remove()` or the end of its `with` block.

    Each thread has its own record.
    """

    def __init__(self, clip: ClipTower):
        self.clip = clip
        self._records: dict[int, TowerRecord] = {}
        self._hooks = [clip.tower.register_forward_pre_hook(self._start)]
        for number in {0, clip.read, clip.following}:
            attention = clip.layers[number].self_attn
            for name in ("queries", "keys"):
                projection = getattr(attention, {"queries": "q_proj", "keys": "k_proj"}[name])
                self._hooks.append(projection.register_forward_hook(functools.partial(self._project, name, number)))
        self._hooks.append(clip.layers[clip.read].register_forward_hook(self._hidden))
        self._hooks.append(clip.projector.register_forward_hook(self._projected))

    @property
    def record(self) -> TowerRecord | None:
        """Record of this thread's last forward pass; None before the first."""
        return self._records.get(threading.get_ident())

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._records.clear()

    def __enter__(self) -> "TowerObserver":
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    @torch.compiler.disable
    def _start(self, module: nn.Module, args: tuple) -> None:
        alive = {thread.ident for thread in threading.enumerate()}
        self._records = {thread: known for thread, known in self._records.items() if thread in alive}
        self._records[threading.get_ident()] = TowerRecord(self.clip)

    @torch.compiler.disable
    def _project(self, name: str, number: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.record is not None:
            getattr(self.record, name)[number] = output.detach()

    @torch.compiler.disable
    def _hidden(self, module: nn.Module, args: tuple, output) -> None:
        if self.record is not None:
            self.record.hidden = (output[0] if isinstance(output, tuple) else output).detach()

    @torch.compiler.disable
    def _projected(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        # later calls come from selectors that project merged tokens
        if self.record is not None and self.record.projected is None:
            self.record.projected = output.detach()


def class_attention(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Attention probabilities of the class token (token 0) over the patches, per head [H, N].

    The softmax is over all tokens; the class token's own probability is dropped.
    """
    query = queries[0].unflatten(0, (heads, -1))
    key = keys.unflatten(1, (heads, -1))
    scores = torch.einsum("hd,lhd->hl", query.float(), key.float()) / query.shape[-1] ** 0.5
    return scores.softmax(-1)[:, 1:]


# ------------------------------------------------------------ the decoder


def is_readable(model: nn.Module) -> bool:
    """Whether `DecoderReading` computes this decoder's attention correctly, checked on a short random sequence."""
    policy = families.policy(model)
    decoder = families.decoder(model)
    if policy.deepstack or policy.blocks or not all(has_projections(layer) for layer in decoder.layers):
        return False
    try:
        return _agrees(decoder)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, UserError):
        return False


@torch.no_grad()
def _agrees(decoder: nn.Module) -> bool:
    """Whether `DecoderReading`'s attention times the values equals the input of each layer's output projection."""
    weight = decoder.layers[0].self_attn.o_proj.weight
    embeds = torch.randn(1, 12, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
    everything = torch.arange(embeds.shape[1], device=weight.device)
    caught: list[dict[str, Tensor]] = [{} for _ in decoder.layers]
    hooks = []
    for layer, own in zip(decoder.layers, caught, strict=True):
        attention = layer.self_attn
        hooks.append(attention.v_proj.register_forward_hook(lambda _, __, out, own=own: own.update(values=out)))
        hooks.append(attention.o_proj.register_forward_pre_hook(lambda _, args, own=own: own.update(mixed=args[0])))
    try:
        with short_windows(decoder.config):
            run = functools.partial(decoder.forward, inputs_embeds=embeds, use_cache=False)
            reading = DecoderReading(decoder, run, stop=False)
            for number, own in enumerate(caught):
                probabilities = reading.attention(number, 0, everything, everything)
                values = own["values"][0].unflatten(-1, (-1, decoder.layers[number].self_attn.head_dim)).transpose(0, 1)
                values = values.repeat_interleave(len(probabilities) // len(values), dim=0).float()
                mixed = (probabilities @ values).transpose(0, 1).flatten(1)
                if not same_states(mixed, own["mixed"][0], weight.dtype):
                    return False
    finally:
        for hook in hooks:
            hook.remove()
    return True


class LayerReading(NamedTuple):
    """One layer's queries [B, H, S, d] and keys [B, K, S, d] after RoPE, and its output [B, S, D]."""

    queries: Tensor
    keys: Tensor
    output: Tensor


class _Stop(Exception):
    """Ends a forward pass after the last layer that is needed."""


class _Caught:
    """Hooks of one layer and the values that they record.

    Only calls from the thread that created it are recorded: other threads may run the same decoder.
    """

    def __init__(self):
        self.values: dict[str, Any] = {}
        self._thread = threading.get_ident()

    @torch.compiler.disable
    def rotary(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if threading.get_ident() == self._thread:
            self.values["rotary"] = kwargs["position_embeddings"]
            self.values["positions"] = kwargs.get("position_ids")

    @torch.compiler.disable
    def output(self, name: str, module: nn.Module, args: tuple, output) -> None:
        if threading.get_ident() == self._thread:
            self.values[name] = output[0] if isinstance(output, tuple) else output

    @torch.compiler.disable
    def stop(self, module: nn.Module, args: tuple, output) -> None:
        if threading.get_ident() == self._thread:
            raise _Stop


class DecoderReading:
    """Queries, keys, attention and outputs of a decoder's layers for one batch of full prompts, computed on demand.

    Args:
        decoder: decoder for which `is_readable` is True.
        run: runs the decoder on the batch.
        stop: stop the forward pass after the requested layer instead of running all layers.
    """

    def __init__(self, decoder: nn.Module, run: Callable[[], Any], stop: bool):
        self.decoder, self.layers = decoder, decoder.layers
        self._run, self._stop = run, stop
        self._caught: dict[int, dict[str, Any]] = {}
        self._known: dict[int, LayerReading] = {}  # functools.cache would keep the tensors alive in a reference cycle

    def __len__(self) -> int:
        return len(self.layers)

    def layer(self, number: int) -> LayerReading:
        """Queries, keys and output of one layer; runs the layers before it if necessary."""
        if number not in self._known:
            self._known[number] = self._layer(number)
        return self._known[number]

    @torch.no_grad()
    def _layer(self, number: int) -> LayerReading:
        if number not in self._caught:
            self._read_up_to(number if self._stop else len(self) - 1)
        caught, module = self._caught[number], self.layers[number].self_attn
        if caught["rotary"][0].ndim != 3:
            raise UserError("reading a decoder with M-RoPE needs a newer transformers; pip install -U transformers")
        query, key = (caught[f"{name}_proj"] for name in ("q", "k"))
        rotated = queries_and_keys(module, query, key, caught["rotary"], caught["positions"])
        return LayerReading(*rotated, caught["output"])

    def _read_up_to(self, last: int) -> None:
        hooks, found = [], [_Caught() for _ in range(last + 1)]
        for layer, caught in zip(self.layers, found, strict=False):
            hooks += [
                layer.register_forward_pre_hook(caught.rotary, with_kwargs=True),
                layer.self_attn.q_proj.register_forward_hook(functools.partial(caught.output, "q_proj")),
                layer.self_attn.k_proj.register_forward_hook(functools.partial(caught.output, "k_proj")),
                layer.register_forward_hook(functools.partial(caught.output, "output")),
            ]
        if self._stop:
            hooks.append(self.layers[last].register_forward_hook(found[last].stop))
        try:
            self._run()
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if not all(caught.values.keys() >= {"rotary", "q_proj", "k_proj", "output"} for caught in found):
            raise UserError("the decoder did not call its hooks, so its attention cannot be read; do not compile it")
        self._caught |= {number: caught.values for number, caught in enumerate(found)}

    def per_layer(self, make: Callable[[int], Tensor]) -> "OnDemand":
        """Mapping from layer index to make(index), each value computed on first access."""
        return OnDemand(len(self), make)

    def attention(self, number: int, row: int, queries: Tensor, keys: Tensor) -> Tensor:
        """Attention probabilities [H, q, k] in float32 of one prompt of the batch, within the layer's window.

        Args:
            number: 0-based layer index.
            row: index of the prompt in the batch.
            queries, keys: indices into the prompt's sequence [q], [k]; the softmax is over these keys only.
        """
        read = self.layer(number)
        query, key = read.queries[row][:, queries], read.keys[row][:, keys]
        key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
        scores = query.float() @ key.float().transpose(1, 2) * self.layers[number].self_attn.scaling
        seen = keys[None] <= queries[:, None]
        kind = layer_types(self.decoder.config)[number]
        if kind != FULL:
            length = read.keys.shape[2]
            seen = seen & plain_masks(self.decoder.config, length, seen.device)[kind][queries][:, keys]
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)


class OnDemand(Mapping):
    """A mapping from layer index to value, computed on first access: a selector uses few of an LLM's layers."""

    def __init__(self, layers: int, make: Callable[[int], Tensor]):
        self._layers, self._make = layers, functools.cache(torch.no_grad()(make))

    def __getitem__(self, number: int) -> Tensor:
        if not 0 <= number < self._layers:
            raise KeyError(number)
        return self._make(number)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._layers))

    def __len__(self) -> int:
        return self._layers


def selector_order(everything: Tensor, image: Tensor, after: Tensor) -> Tensor:
    """Indices of a prompt's tokens in the order of `SelectionInputs`: the rest, the image, the text after the image.

    Tokens between the rows or tiles of an image, and other images, belong to the rest. All arguments are indices into
    the prompt's sequence.
    """
    return torch.cat([everything[~torch.isin(everything, torch.cat([image, after]))], image, after])


def decoder_fields(reading: DecoderReading, row: int, order: Tensor, queries: Tensor) -> dict[str, OnDemand]:
    """Values of `DECODER_FIELDS` for one prompt of the batch.

    Args:
        reading: the decoder's layers for the batch.
        row: index of the prompt in the batch.
        order: output of `selector_order` [L].
        queries: indices of the text tokens after the image [T], the last ones of `order`.
    """
    return {
        "llm_attention": reading.per_layer(lambda n: reading.attention(n, row, queries, order)),
        "llm_keys": reading.per_layer(lambda n: reading.layer(n).keys[row][:, order].transpose(0, 1).flatten(1)),
        "llm_hidden": reading.per_layer(lambda n: reading.decoder.norm(reading.layer(n).output[row, order])),
    }
