"""The stages of a compressed answer at the sizes of real models: tower, compressor, prefill, decoding.

The uncompressed model uses the fastest attention kernel that is available. Short prefills are bound by the launch
overhead of the host, so GPUs have additional rows of CUDA graph replays.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evocomp.bench.inference import Prompts, Row, _close, _nothing, _same_shape, fastest_attention
from evocomp.bench.timing import Work, ceilings, compare, each, graphed
from evocomp.compressor.model import EvoCompCompressor
from evocomp.labels.estimate import Target
from evocomp.mllm.sizes import ModelShape, pictures, random_model, shape_named
from evocomp.ops import top_r_compact


class Stages:
    """The stages as functions without arguments, for a batch of equal prompts."""

    def __init__(self, model: nn.Module, shape: ModelShape, batch: int):
        self.model, self.shape, self.batch = model, shape, batch
        weight = model.get_input_embeddings().weight
        make = {"device": weight.device, "dtype": weight.dtype}
        text = shape.before + shape.after
        self.text = torch.randn(batch, text, weight.shape[1], **make) * 0.02
        self.visual = torch.randn(batch, shape.tokens, weight.shape[1], **make) * 0.02
        with torch.device(weight.device):
            wide, narrow = (EvoCompCompressor.from_mllm(model, width=w) for w in (0, weight.shape[1] // 4))
        self.wide, self.narrow = (c.eval().requires_grad_(False).to(weight) for c in (wide, narrow))
        self.pixels = pictures(shape, model, batch) if shape.tiles else None

    def see(self) -> Tensor:
        """Vision tower and projector: visual tokens [B, N, D], without separators between tiles."""
        base = self.model.base_model
        states = base.vision_tower(self.pixels, output_hidden_states=True).hidden_states
        tokens = base.multi_modal_projector(states[self.model.config.vision_feature_layer][:, 1:])
        return tokens.view(self.batch, -1, tokens.shape[-1])

    def choose(self) -> Tensor:
        """Compressor and top-r: kept tokens [B, R, D]."""
        return self._chosen(self.visual, self.wide)

    def choose_narrow(self) -> Tensor:
        """The same with a compressor of a quarter of the LLM's width."""
        return self._chosen(self.visual, self.narrow)

    def prefill(self, kept: Tensor) -> tuple[Tensor, Any]:
        """The LLM on text and visual tokens [B, n, D]: last logits and cache."""
        before = self.shape.before
        embeds = torch.cat([self.text[:, :before], kept, self.text[:, before:]], dim=1)
        return Prompts._run(self.model, embeds, None)

    def full(self) -> tuple[Tensor, Any]:
        """Prefill of all tokens."""
        return self.prefill(self.visual)

    def short(self) -> tuple[Tensor, Any]:
        """Prefill of R tokens that are already chosen."""
        return self.prefill(self.visual[:, : self.shape.kept])

    def compressed(self) -> tuple[Tensor, Any]:
        """Compressor, top-r and prefill of the kept tokens."""
        return self.prefill(self.choose())

    def compressed_narrow(self) -> tuple[Tensor, Any]:
        """The same with the narrow compressor."""
        return self.prefill(self.choose_narrow())

    def seen_full(self) -> tuple[Tensor, Any]:
        """Prefill from pixels with all tokens."""
        return self.prefill(self.see())

    def seen_compressed(self) -> tuple[Tensor, Any]:
        """Prefill from pixels with compression."""
        return self.prefill(self._chosen(self.see(), self.wide))

    @torch.inference_mode()
    def decode(self, kept: Tensor) -> Work:
        """A function that decodes one token after a prompt; it then crops the cache to the prompt."""
        _, cache = self.prefill(kept)
        length, token = cache.get_seq_length(), self.text[:, :1]

        def step() -> Tensor:
            logits, _ = Prompts._run(self.model, token, cache)
            cache.crop(length - cache.get_seq_length())
            return logits

        return step

    def _chosen(self, visual: Tensor, compressor: EvoCompCompressor) -> Tensor:
        return top_r_compact(compressor(visual, self.text).logits.float(), self.shape.kept, visual).embeddings


def at_shape(name: str, device: str, repeats: int = 5, batches: Sequence[int] = (1, 8)) -> Iterator[Row]:
    """Yield the rows of one model of `sizes.SHAPES` as they are measured, with half the repeats for batches above 1.

    Raises:
        UserError: an unknown name.
    """
    shape = shape_named(name)
    model = random_model(shape, device)
    model.set_attn_implementation(fastest_attention(torch.device(device)))
    limits = ceilings(device)
    for batch in batches:
        with torch.inference_mode():
            stages = Stages(model, shape, batch)
        yield from _rows(name, stages, device, repeats if batch == 1 else (repeats + 1) // 2, limits)


def _rows(name: str, stages: Stages, device: str, repeats: int, limits: tuple[float, float]) -> Iterator[Row]:
    shape, target = stages.shape, Target.from_config(stages.model.config.to_dict())
    text = shape.before + shape.after
    sizes = f"{name} B={stages.batch} N={shape.tokens} R={shape.kept} T={text}"
    names = f"{shape.tokens} tokens", f"{shape.kept} tokens"

    @torch.inference_mode()
    def row(bench: str, baseline: tuple[str, Work], ours: tuple[str, Work], agree: Callable = _nothing) -> Row:
        found = compare(bench, sizes, baseline, ours, agree, device, repeats)
        return found | {"ceiling_tflops": limits[0] / 1e12, "ceiling_copy_gbs": limits[1] / 1e9}

    def floor(tokens: int) -> dict[str, float]:
        """Lower bound of a prefill: its arithmetic, or one read of the weights."""
        flop = stages.batch * target.forward(tokens + text, 1)
        return {"floor_ms": 1e3 * max(flop / limits[0], target.body * stages.text.itemsize / limits[1])}

    whole = (f"{names[1]}, compressor included", stages.compressed)
    thin = (f"{names[1]}, narrow compressor included", stages.compressed_narrow)
    least = floor(shape.kept)

    def shares(bench: str, short: Work, wide: Work, narrow: Work) -> Iterator[Row]:
        for name, work in (("compressor and top-r", wide), ("narrow compressor and top-r", narrow)):
            yield row(bench, (f"prefill of {names[1]}", short), (name, work))

    def launched() -> Iterator[Row]:
        yield row("prefill", (names[0], stages.full), (names[1], stages.short), _same_shape) | least
        yield row("prefill", (names[0], stages.full), whole, _same_shape) | least
        yield row("prefill", (names[0], stages.full), thin, _same_shape) | least
        yield from shares("compressor's share", stages.short, stages.choose, stages.choose_narrow)

    def replayed() -> Iterator[Row]:
        works = (stages.full, stages.short, stages.choose, stages.choose_narrow, stages.compressed)
        with torch.inference_mode():
            full, short, choose, choose_narrow, compressed = map(graphed, works)
        yield row("CUDA graph", whole, (f"{whole[0]}, replayed", compressed), _close)
        yield row("prefill, replayed", (names[0], full), (names[1], short), _same_shape) | least
        yield row("prefill, replayed", (names[0], full), (whole[0], compressed), _same_shape) | least
        yield from shares("compressor's share, replayed", short, choose, choose_narrow)

    def decoding() -> Iterator[Row]:
        visual = stages.visual
        steps = (names[0], stages.decode(visual)), (names[1], stages.decode(visual[:, : shape.kept]))
        yield row("decode, one token", *steps, _same_shape)

    def from_pixels() -> Iterator[Row]:
        yield row("tower's share", (f"prefill of {names[1]}", stages.short), ("tower and projector", stages.see))
        seen = (f"{names[0]}, from pixels", stages.seen_full), (f"{names[1]}, from pixels", stages.seen_compressed)
        yield row("from pixels to the first token", *seen, _same_shape)

    cuda = torch.device(device).type == "cuda"
    return each([launched, *[replayed] * cuda, decoding, *[from_pixels] * (stages.pixels is not None)])
