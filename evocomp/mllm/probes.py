"""What selection methods read besides the visual tokens: CLIP's and the LLM's keys, queries, attention.

Everything is recomputed from projections caught by hooks, so that it works with any attention kernel; kernels
that never materialise attention (SDPA, FlashAttention) stay in use.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from evocomp.data.example import Example
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.reader import PictureKey, picture_key

_VISION = {
    "clip_hidden",
    "clip_keys",
    "clip_queries",
    "clip_next_keys",
    "clip_next_queries",
    "cls_attention",
    "cls_attention_first",
    "project",
}
_LLM = {"llm_attention", "llm_keys", "llm_hidden"}


class Probes:
    """Gathers what methods declare that they need. What a model does not have is simply not in the answer."""

    def __init__(self, mllm: FrozenMLLM):
        self.mllm = mllm
        self._vision: tuple[PictureKey, dict[str, Any]] = ("", {})
        self._llm: tuple[int, dict[str, Any]] = (-1, {})

    @torch.no_grad()
    def gather(self, example: Example, features: Features, needs: Collection[str]) -> dict[str, Any]:
        """The fields of `SelectionInputs` named in `needs`, as far as the model has them."""
        found: dict[str, Any] = {}
        if "text" in needs:
            after = features.prompt_ids[features.picture_end :]
            found["text"] = self.mllm.embed(after)
        if _VISION & set(needs):
            key = picture_key(example)
            if self._vision[0] != key:
                self._vision = (key, self._look(example))
            found |= self._vision[1]
        if _LLM & set(needs):
            if self._llm[0] != features.id:
                self._llm = (features.id, self._read(features))
            found |= self._llm[1]
        return {name: value for name, value in found.items() if name in needs}

    def _look(self, example: Example) -> dict[str, Any]:
        """A CLIP-like tower with a class token that LLaVA's projector reads; {} for any other, or several images."""
        if example.further_images:
            return {}
        tower = getattr(self.mllm.model.base_model, "vision_tower", None)
        config = self.mllm.model.config
        layers = getattr(getattr(tower, "encoder", getattr(tower, "vision_model", None)), "layers", None)
        layers = layers if layers is not None else getattr(getattr(tower, "vision_model", None), "encoder", None)
        layers = getattr(layers, "layers", layers)
        if layers is None or not hasattr(tower, "config") or "clip" not in tower.config.model_type:
            return {}
        if getattr(config, "vision_feature_select_strategy", "") != "default":
            return {}  # no class token to drop: this tower has none
        depth = len(layers)
        read = config.vision_feature_layer
        if not isinstance(read, int):
            return {}
        read = depth + read if read < 0 else read - 1  # 0-based layer whose output the projector reads
        following = min(read + 1, depth - 1)  # PruMerge looks one layer further; a tower may end here
        with _catch([layers[i].self_attn for i in {0, read, following}], ("q_proj", "k_proj")) as caught:
            with _catch_output(layers[read]) as outputs:
                self.mllm.encode_resized(example, None)
        hidden = outputs[0][0]
        queries = {i: caught[layers[i].self_attn]["q_proj"][0] for i in {0, read, following}}
        keys = {i: caught[layers[i].self_attn]["k_proj"][0] for i in {0, read, following}}
        heads = tower.config.num_attention_heads
        return {
            "clip_hidden": hidden,
            "clip_keys": keys[read],
            "clip_queries": queries[read],
            "clip_next_keys": keys[following],
            "clip_next_queries": queries[following],
            "cls_attention": _class_row(queries[read], keys[read], heads),
            "cls_attention_first": _class_row(queries[0], keys[0], heads),
            "project": self.mllm.model.base_model.multi_modal_projector,
        }

    def _read(self, features: Features) -> dict[str, Any]:
        """Run the LLM on all tokens and keep what its layers saw; {} for decoders without plain q and k."""
        decoder = self.mllm.decoder
        attentions = [getattr(layer, "self_attn", None) for layer in decoder.layers]
        if features.positions.ndim != 1 or not all(hasattr(a, "q_proj") and hasattr(a, "k_proj") for a in attentions):
            return {}
        everything = torch.arange(len(features.visual), device=features.visual.device)
        embeds, positions = self.mllm.assemble(features, features.visual[None], everything[None])
        with _catch(attentions, ("q_proj", "k_proj")) as caught, _catch_output(*decoder.layers) as outputs:
            decoder(
                inputs_embeds=embeds,
                attention_mask=torch.ones_like(positions),
                position_ids=positions,
                use_cache=False,
            )
        cos, sin = decoder.rotary_emb(embeds, positions)
        queries_wanted = len(features.prompt_ids) - features.picture_end

        @functools.cache
        def rotated(number: int) -> tuple[Tensor, Tensor]:
            module = attentions[number]
            query, key = (_heads(caught[module][name], module.head_dim) for name in ("q_proj", "k_proj"))
            query, key = (
                getattr(module, name)(x) if hasattr(module, name) else x
                for name, x in (("q_norm", query), ("k_norm", key))
            )
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            return query[0], key[0]

        def attention(number: int) -> Tensor:
            return _causal_rows(*rotated(number), queries_wanted, attentions[number].scaling)

        layers = len(attentions)
        return {
            "llm_attention": _OnDemand(layers, attention),
            "llm_keys": _OnDemand(layers, lambda number: rotated(number)[1].transpose(0, 1).flatten(1)),
            "llm_hidden": _OnDemand(layers, lambda number: decoder.norm(outputs[number][0])),
        }


class _OnDemand(Mapping):
    """What layers saw, worked out when it is asked for: of a deep LLM's layers a method reads few."""

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


def _heads(rows: Tensor, size: int) -> Tensor:
    """[1, L, heads * size] -> [1, heads, L, size]."""
    return rows.unflatten(-1, (-1, size)).transpose(1, 2)


def _class_row(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Attention of the class token (row 0) on the patches, per head [H, N]: softmax over all, own column dropped."""
    query = queries[0].unflatten(0, (heads, -1))
    key = keys.unflatten(1, (heads, -1))
    scores = torch.einsum("hd,lhd->hl", query.float(), key.float()) / query.shape[-1] ** 0.5
    return scores.softmax(-1)[:, 1:]


def _causal_rows(query: Tensor, key: Tensor, rows: int, scaling: float) -> Tensor:
    """The last `rows` rows of causal attention [heads, rows, L] from query [heads, L, d] and key [kv, L, d]."""
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    scores = query[:, -rows:].float() @ key.float().transpose(1, 2) * scaling
    length = key.shape[1]
    allowed = torch.ones(rows, length, dtype=torch.bool, device=key.device).tril(length - rows)
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)


@contextmanager
def _catch(modules: Collection[nn.Module], names: tuple[str, ...]) -> Iterator[dict[nn.Module, dict[str, Tensor]]]:
    """Outputs of the named submodules during the block."""
    caught: dict[nn.Module, dict[str, Tensor]] = {module: {} for module in modules}

    def hook(module: nn.Module, name: str):
        return lambda _, __, output: caught[module].__setitem__(name, output)

    handles = [getattr(m, n).register_forward_hook(hook(m, n)) for m in caught for n in names]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _catch_output(*layers: nn.Module) -> Iterator[list[Tensor]]:
    """Hidden states that the layers return, in order of the layers."""
    outputs: list[Tensor] = [torch.empty(0)] * len(layers)

    def hook(place: int):
        def take(_, __, output):
            outputs[place] = output[0] if isinstance(output, tuple) else output

        return take

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
