"""A forward pass for Llama-like decoders that computes only what scoring needs.

It skips two kinds of work. In the last layer, it computes queries, output projection, MLP and final norm only at the
requested positions (saves a quarter of the compute with three layers, a thirtieth with 32). In the first layer, it
projects rows that several sequences share once, because the result depends only on the row and its position. On CPUs,
float32 matrix products use oneDNN, which is twice as fast as the default library on AMD machines. It uses the model's
weights; small models on CPUs get a copy in oneDNN's layout. It is used only if its output agrees with transformers'
forward pass on the same model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel, MistralModel, Qwen2_5_VLTextModel, Qwen2Model, Qwen2VLTextModel

from evocomp.config.schema import ScorerConfig
from evocomp.mllm import attention
from evocomp.mllm.agreement import same_states
from evocomp.scoring.sequences import Packing, Past, Table, weighed

Weights = tuple[Tensor, Tensor | None]

PACKED_BYTES = 256 * 2**20
"""Decoders up to this size get a copy of their weights in oneDNN's layout, to save reordering them in each call."""


@dataclass(frozen=True, eq=False)
class _Layer:
    norm: Tensor
    query: Weights
    key: Weights
    value: Weights
    out: Weights
    mlp_norm: Tensor
    gate: Weights
    up: Weights
    down: Weights


@dataclass(eq=False)
class _Known:
    """Values that depend on a table's rows only: embeddings, RoPE angles and, on demand, first-layer projections."""

    embeds: Tensor
    angles: Tensor
    first: tuple[Tensor, ...] | None = None


class LlamaBody:
    """`Body` for decoders with RoPE or M-RoPE, RMSNorm and SwiGLU (Llama, Mistral, Qwen2, Qwen2-VL, Qwen2.5-VL).

    Args:
        decoder: a decoder of transformers for which `fits` is True.
        dtype: dtype of the computation.
        settings: which of the optimizations to use.
    """

    def __init__(self, decoder: nn.Module, dtype: torch.dtype, settings: ScorerConfig):
        self.config, self.rotary = decoder.config, decoder.rotary_emb
        self.dtype, self.settings = dtype, settings
        first = decoder.layers[0]
        self.head_dim = first.self_attn.head_dim
        self.eps = first.input_layernorm.variance_epsilon
        self.norm = decoder.norm.weight.to(dtype)
        on_cpu = self.norm.device.type == "cpu"
        # the two numbers of each rotary pair are adjacent, so that RoPE is one complex product
        self.paired = on_cpu and dtype == torch.float32
        self.onednn = settings.onednn and on_cpu and dtype == torch.float32 and _has_onednn()
        small = sum(p.numel() for p in decoder.parameters()) * dtype.itemsize <= PACKED_BYTES
        self.pack = self.onednn and small
        self._known: tuple[Table | None, _Known | None] = (None, None)
        self.layers = [self._layer(layer) for layer in decoder.layers[: self.config.num_hidden_layers]]

    def head(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The model's output head, computed by oneDNN if its weights are small enough for a second copy."""
        if type(module) is not nn.Linear or module.weight.nbytes > PACKED_BYTES:
            return module
        weights = self._weights(module)
        return lambda rows: self.linear(rows, weights)

    def __call__(
        self, table: Table, index: Tensor, read: Tensor, packing: Packing | None = None, past: Past | None = None
    ) -> Tensor:
        """See `Body`."""
        hidden = self._run(table, index, read, packing, past)
        return F.rms_norm(hidden, hidden.shape[-1:], self.norm, self.eps)

    def prefix(self, table: Table, rows: Tensor) -> Past:
        """See `Body`."""
        past: list[tuple[Tensor, Tensor]] = []
        self._run(table, rows[None], torch.tensor([len(rows) - 1], device=rows.device), None, None, past)
        return tuple(past)

    @property
    def packs(self) -> bool:
        """See `Body`. Always True: this forward pass applies the mask itself."""
        return True

    def linear(self, rows: Tensor, weights: Weights) -> Tensor:
        """rows @ weight.T + bias."""
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise(rows, *weights, "none", [], "")
        return F.linear(rows, *weights)

    # ------------------------------------------------------------ the pass

    def _run(
        self,
        table: Table,
        index: Tensor,
        read: Tensor,
        packing: Packing | None,
        past: Past | None,
        made: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Hidden states [Q, A, D] before the final norm; appends every layer's keys and values to `made`."""
        count, length = index.shape
        flat = index.flatten()
        at_read = self._flat_read(read, count, length)
        known = self._know(table)
        here = known.angles.index_select(0, flat)
        hidden = known.embeds.index_select(0, flat)
        before = past[0][0].shape[2] if past else 0
        seen = _seen(length, before, packing, index.device)
        if table.log_size is not None:
            seen = weighed(seen, F.pad(table.log_size[index], (before, 0)), length, self.dtype)
        for number, layer in enumerate(self.layers):
            last = number == len(self.layers) - 1
            shorten = last and self.settings.last_layer_at_answers
            rows = at_read if shorten else None
            if number == 0 and self.settings.first_layer_once and known.embeds.shape[0] < flat.shape[0]:
                query, key, value = self._first(layer, known, flat, rows)
            else:
                query, key, value = self._project(layer, hidden, here, rows)
            query, key, value = (self._heads(x, count) for x in (query, key, value))
            if made is not None:
                made.append((key, value))
            if past:
                key, value = (
                    torch.cat([old.expand(count, -1, -1, -1), new], dim=2)
                    for old, new in zip(past[number], (key, value), strict=True)
                )
            if shorten:
                hidden = hidden.index_select(0, at_read)
            mixed = attend(query, key, value, _seen_from(seen, read, key.shape[2]) if shorten else seen)
            hidden = self._after(layer, hidden, mixed.transpose(1, 2).reshape(len(hidden), -1))
            if last and not shorten:
                hidden = hidden.index_select(0, at_read)
        return hidden.view(count, -1, hidden.shape[-1])

    def _project(self, layer: _Layer, hidden: Tensor, angles: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
        """Rotated queries, rotated keys and values of hidden states [M, D]; queries at `rows` only."""
        normed = F.rms_norm(hidden, hidden.shape[-1:], layer.norm, self.eps)
        key = self._rotate(self.linear(normed, layer.key), angles)
        value = self.linear(normed, layer.value)
        if rows is not None:
            normed, angles = normed.index_select(0, rows), angles.index_select(0, rows)
        return self._rotate(self.linear(normed, layer.query), angles), key, value

    def _first(self, layer: _Layer, known: _Known, flat: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
        """`_project` for the first layer, in which each row of the table is projected once."""
        if known.first is None:
            known.first = self._project(layer, known.embeds, known.angles, None)
        query, key, value = known.first
        wanted = flat if rows is None else flat.index_select(0, rows)
        return query.index_select(0, wanted), key.index_select(0, flat), value.index_select(0, flat)

    def _after(self, layer: _Layer, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Output projection and MLP, each with its residual connection."""
        hidden = self.linear(mixed, layer.out).add_(hidden)
        normed = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, self.eps)
        inner = F.silu(self.linear(normed, layer.gate), inplace=True).mul_(self.linear(normed, layer.up))
        return self.linear(inner, layer.down).add_(hidden)

    def _heads(self, rows: Tensor, count: int) -> Tensor:
        """[Q * L, heads * d] -> [Q, heads, L, d]"""
        return rows.view(count, -1, rows.shape[1] // self.head_dim, self.head_dim).transpose(1, 2)

    # ------------------------------------------------------------ rotation

    def _know(self, table: Table) -> _Known:
        """Values of the table, cached until the next table: a search scores one sample many times."""
        if self._known[0] is not table or self._known[1] is None:
            self._known = (table, _Known(table.embeds.to(self.dtype), self._angles(table)))
        return self._known[1]

    def _angles(self, table: Table) -> Tensor:
        """RoPE angles of every row: cosines and sines [S, 2, 1, d], or complex numbers [S, 1, d / 2]."""
        positions = table.positions if table.positions.ndim == 1 else table.positions[1:]  # row 0 is the text position
        cos, sin = self.rotary(table.embeds[None].to(self.dtype), positions[..., None, :])
        if self.paired:
            half = self.head_dim // 2
            return torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())[:, None]
        return torch.stack([cos[0], sin[0]], dim=1)[:, :, None]

    def _rotate(self, rows: Tensor, angles: Tensor) -> Tensor:
        """Apply RoPE to rows [M, heads * d]."""
        if self.paired:
            pairs = torch.view_as_complex(rows.view(len(rows), -1, self.head_dim // 2, 2))
            return torch.view_as_real(pairs * angles).view(rows.shape)
        heads, (cos, sin) = rows.view(len(rows), -1, self.head_dim), angles.unbind(1)
        half = self.head_dim // 2
        rotated = heads * cos  # the rest in place: half the memory traffic of a rotated copy
        rotated[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
        rotated[..., half:].addcmul_(heads[..., :half], sin[..., half:])
        return rotated.view(rows.shape)

    @staticmethod
    def _flat_read(read: Tensor, count: int, length: int) -> Tensor:
        starts = torch.arange(count, device=read.device)[:, None] * length
        return (starts + read).flatten()

    # ------------------------------------------------------------ weights

    def _layer(self, layer: nn.Module) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            layer.input_layernorm.weight.to(self.dtype),
            self._rotated(attention.q_proj),
            self._rotated(attention.k_proj),
            self._weights(attention.v_proj),
            self._weights(attention.o_proj),
            layer.post_attention_layernorm.weight.to(self.dtype),
            self._weights(mlp.gate_proj),
            self._weights(mlp.up_proj),
            self._weights(mlp.down_proj),
        )

    def _weights(self, module: nn.Linear, order: Tensor | slice = slice(None)) -> Weights:
        weight = module.weight.detach()[order].to(self.dtype)
        bias = None if module.bias is None else module.bias.detach()[order].to(self.dtype)
        if self.pack:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return weight, bias

    def _rotated(self, module: nn.Linear) -> Weights:
        """Weights of queries or keys, reordered so that the two numbers of each rotary pair (i, i + d/2) are adjacent.

        The order is the same in queries and keys, so their dot products do not change.
        """
        if not self.paired:
            return self._weights(module)
        order = torch.arange(module.out_features, device=module.weight.device)
        return self._weights(module, order.view(-1, 2, self.head_dim // 2).mT.flatten())


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries [Q, heads, A, d] over keys and values [Q, kv heads, L, d]; causal if `mask` is None."""
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def _seen(length: int, before: int, packing: Packing | None, device: torch.device) -> Tensor | None:
    """Attention mask, bool [L, P + L]; None: causal, without cached keys."""
    if packing is not None:
        plain = torch.ones(packing.longest, packing.longest, dtype=torch.bool, device=device).tril()
        return packing.mask(plain, before)
    if not before:
        return None
    return torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)


def _seen_from(seen: Tensor | None, read: Tensor, length: int) -> Tensor:
    """The rows of the attention mask at the positions `read`: [A, P + L], or [Q, 1, A, P + L]."""
    if seen is not None and seen.ndim == 4:
        rows = read.expand(len(seen), -1)[:, None, :, None]
        return seen.gather(2, rows.expand(-1, -1, -1, seen.shape[3]))
    if seen is None:
        rows = torch.arange(length, device=read.device) <= read[..., None]
    else:
        rows = seen[read]
    return rows if read.ndim == 1 else rows[:, None]


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


# ---------------------------------------------------------------- where it may be used


def fits(decoder: nn.Module) -> bool:
    """Whether `LlamaBody` supports the decoder: a known class, in which no module is wrapped or replaced."""
    if type(decoder) not in (LlamaModel, MistralModel, Qwen2Model, Qwen2VLTextModel, Qwen2_5_VLTextModel):
        return False
    config = decoder.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if multi_axis(decoder) and not hasattr(decoder.rotary_emb, "recomposition_frequencies"):
        return False  # older releases combine the axes in the attention, not in the rotary module
    if config.hidden_act != "silu" or rope not in ("default", "linear", "llama3"):
        return False
    if not attention.attends_fully(config):
        return False
    projections = [
        getattr(part, f"{name}_proj", None)
        for layer in decoder.layers
        for part, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down")))
        for name in names
    ]
    hooked = any(hasattr(module, "_hf_hook") for module in decoder.modules())
    return all(type(one) is nn.Linear for one in projections) and not hooked


def multi_axis(decoder: nn.Module) -> bool:
    """Whether the decoder uses M-RoPE, with positions [4, S]: text, time, height and width."""
    return "mrope_section" in (getattr(decoder.config, "rope_parameters", None) or {})


@torch.inference_mode()
def agrees(ours: LlamaBody, theirs: nn.Module) -> bool:
    """Whether `ours` gives the same states as transformers, on two short random sequences with gaps in positions."""
    embeds = theirs.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(embeds), (24,), generator=generator)
    positions = 3 * torch.arange(24, device=embeds.device)
    if multi_axis(theirs):
        positions = torch.stack([positions, positions // 2, positions % 7, positions % 5])
    table = Table(embeds[rows.to(embeds.device)], positions)
    index = torch.rand(2, 24, generator=generator).argsort(1)[:, :16].sort(1).values.to(embeds.device)
    expected = theirs(
        inputs_embeds=table.embeds[index],
        position_ids=table.positions[..., index],
        attention_mask=torch.ones_like(index),
        use_cache=False,
    ).last_hidden_state
    given = ours(table, index, torch.arange(16, device=embeds.device))
    return same_states(given, expected, ours.dtype, embeds.dtype)
