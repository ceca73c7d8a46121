"""Time of the stages of a compressed answer, and the number of kept tokens up to which pruning saves time.

Vision tower, selector, prefill and decoding are timed separately, then full `generate` calls over a grid of batch sizes
and answer lengths. Compressed and uncompressed runs alternate, and only their ratios are comparable between machines.
The uncompressed model uses the fastest attention kernel that is available.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evocomp.bench.timing import compare, environment, peak_memory
from evocomp.compressor.model import EvoCompCompressor
from evocomp.inference.hooks import compress
from evocomp.inference.selectors import picker_for
from evocomp.mllm.cache_argument import CACHE
from evocomp.mllm.nano import build_nano, nano_config

Row = dict[str, Any]

# 0.7 M parameters with 144 visual tokens; 10 M with the 576 of LLaVA-1.5. Latency does not depend on the weights.
SIZES = {
    "nano": {},
    "mid": {"image_size": 336, "patch": 14, "width": 256, "layers": 4, "heads": 4},
}
TEXT = 32
"""Prompt tokens in addition to the image (T)."""
KEPT = (1 / 9, 1 / 3, 2 / 3)
"""Fractions of the N visual tokens that are kept."""


@dataclass
class Prompts:
    """A batch of equal prompts for a model with random weights, as token ids with pixels, and as LLM input."""

    model: nn.Module
    batch: int
    device: torch.device

    def __post_init__(self):
        config, generator = self.model.config, torch.Generator().manual_seed(0)
        count = config.image_seq_length
        side = config.vision_config.image_size
        words = torch.randint(5, config.text_config.vocab_size, (self.batch, TEXT), generator=generator)
        words[:, 0] = config.text_config.bos_token_id
        image = torch.full((self.batch, count), config.image_token_index)
        self.ids = torch.cat([words[:, :1], image, words[:, 1:]], dim=1).to(self.device)
        self.pixels = torch.randn(self.batch, 3, side, side, generator=generator).to(self.device)
        self.count = count
        self.text = self.model.get_input_embeddings()(words.to(self.device))
        self.visual = self.see()

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of `generate`."""
        return {
            "input_ids": self.ids,
            "pixel_values": self.pixels,
            "attention_mask": torch.ones_like(self.ids),
        }

    def see(self) -> Tensor:
        """Vision tower and projector: visual tokens [B, N, D]."""
        output = self.model.base_model.get_image_features(pixel_values=self.pixels, return_dict=True)
        return torch.stack(list(output.pooler_output))

    def prefill(self, model: nn.Module, kept: int) -> Callable[[], Any]:
        """A function that runs the LLM on the prompt with `kept` visual tokens and returns logits and cache."""
        embeds = torch.cat([self.text[:, :1], self.visual[:, :kept], self.text[:, 1:]], dim=1)
        return lambda: self._run(model, embeds, None)

    def decode(self, model: nn.Module, kept: int) -> Callable[[], Any]:
        """A function that decodes one token after that prompt; it then crops the cache to the prompt."""
        _, cache = self.prefill(model, kept)()
        length, token = cache.get_seq_length(), self.text[:, :1]

        def step() -> Tensor:
            logits, _ = self._run(model, token, cache)
            cache.crop(length - cache.get_seq_length())
            return logits

        return step

    @staticmethod
    def _run(model: nn.Module, embeds: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = model.get_decoder()(inputs_embeds=embeds, use_cache=True, **{CACHE: cache})
        return model.get_output_embeddings()(output.last_hidden_state[:, -1]), output[CACHE]


def run(
    device: str = "cpu",
    repeats: int = 5,
    sizes: Sequence[str] = tuple(SIZES),
    batches: Sequence[int] = (1, 4),
    answers: Sequence[int] = (1, 8, 32),
) -> list[Row]:
    """Measure all rows; `answers` are lengths of the answer [tokens].

    Rows are those of `timing.compare`: "ratio" above 1 means that the second is faster. Rows "break-even" hold
    in "break_even_kept" the number of kept tokens up to which `generate` with `compress` is faster than without.
    """
    rows = []
    for size in sizes:
        for batch in batches:
            with torch.inference_mode():
                rows += list(_rows(size, batch, answers, torch.device(device), repeats))
    return rows


def fastest_attention(device: torch.device) -> str:
    """The fastest kernel that transformers can use here."""
    if device.type == "cuda":
        try:
            import flash_attn  # noqa: F401

            return "flash_attention_2"
        except ImportError:
            pass
    return "sdpa"


def build(size: str, device: torch.device) -> nn.Module:
    """A LLaVA with random weights and the fastest attention kernel."""
    model = build_nano(nano_config(**SIZES[size]), torch.Generator().manual_seed(0)).eval().to(device)
    if device.type == "cuda":
        model = model.bfloat16()
    model.set_attn_implementation(fastest_attention(device))
    return model.requires_grad_(False)


def _rows(size: str, batch: int, answers: Sequence[int], device: torch.device, repeats: int) -> Iterator[Row]:
    model = build(size, device)
    prompts = Prompts(model, batch, device)
    count = prompts.count
    counts = [round(share * count) for share in KEPT]
    compressor = EvoCompCompressor.from_mllm(model, keep=counts[0]).eval().to(prompts.visual)
    shape = f"{size} B={batch} N={count} T={TEXT}"
    whole = (f"prefill of {count}", prompts.prefill(model, count))

    def row(bench: str, baseline: tuple, ours: tuple, agree=_same_shape, sizes: str = shape) -> Row:
        return compare(bench, sizes, baseline, ours, agree, device, repeats)

    eager = _sharing_weights(model)
    eager.set_attn_implementation("eager")
    kernel = model.config._attn_implementation
    yield row("attention kernel", ("eager", prompts.prefill(eager, count)), (kernel, whole[1]), _close)
    yield row("ViT and projector", whole, ("ViT and projector", prompts.see), _nothing)
    picker = picker_for(compressor, model)
    images, texts = list(prompts.visual), list(prompts.text)
    choose = partial(picker.pick, images, texts, [counts[0]] * batch)
    yield row("selector", whole, ("compressor and top-r", choose), _nothing)
    for kept in counts:
        for stage, work in (("prefill", prompts.prefill), ("decode, one token", prompts.decode)):
            yield row(stage, (f"{count} tokens", work(model, count)), (f"{kept} tokens", work(model, kept)))
    for length in answers:
        found = list(_generate(model, compressor, prompts, [*counts, count], length, row, shape))
        yield from found
        yield {
            "bench": "break-even",
            "shape": f"{shape} A={length}",
            "baseline": "all tokens",
            "ours": "compress()",
            "break_even_kept": break_even({row["kept"]: row["ratio"] for row in found}),
            **environment(device),
        }
    yield _memory(model, compressor, prompts, counts[0], max(answers), shape)


def _generate(
    model: nn.Module,
    compressor: nn.Module,
    prompts: Prompts,
    counts: Sequence[int],
    length: int,
    row: Callable[..., Row],
    shape: str,
) -> Iterator[Row]:
    """Full calls of `generate` with and without `compress`, from pixels to tokens."""
    hooked = _sharing_weights(model)
    with compress(hooked, compressor, keep=counts[0]) as handle:
        full, short = (_generation(m, prompts, length) for m in (model, hooked))
        for kept in counts:
            handle.keep = kept
            names = "all tokens", f"{kept} tokens, selector included"
            yield row("generate", (names[0], full), (names[1], short), sizes=f"{shape} A={length}") | {"kept": kept}


def _memory(model: nn.Module, compressor: nn.Module, prompts: Prompts, kept: int, length: int, shape: str) -> Row:
    full = peak_memory(_generation(model, prompts, length), prompts.device) / 2**20
    with compress(model, compressor, keep=kept):
        short = peak_memory(_generation(model, prompts, length), prompts.device) / 2**20
    return {
        "bench": "generate, peak memory",
        "shape": f"{shape} A={length}",
        "baseline": "all tokens",
        "ours": f"{kept} tokens",
        "baseline_mib": full,
        "ours_mib": short,
        "ratio": full / short,
        **environment(prompts.device),
    }


def _generation(model: nn.Module, prompts: Prompts, length: int) -> Callable[[], Tensor]:
    settings = {"min_new_tokens": length, "max_new_tokens": length, "do_sample": False}
    return lambda: model.generate(**prompts.inputs, **settings)


def break_even(ratios: dict[int, float]) -> float | None:
    """The number of kept tokens up to which pruning saves time, from measured ratios of unpruned to pruned time.

    Interpolates linearly between the saved fractions of time. None if no measured number of tokens saves time.
    """
    points = sorted(((kept, 1 - 1 / ratio) for kept, ratio in ratios.items()), reverse=True)
    if points[0][1] >= 0:
        return float(points[0][0])
    for (more, loss), (fewer, gain) in zip(points, points[1:], strict=False):
        if gain >= 0:
            return fewer + (more - fewer) * gain / (gain - loss)
    return None


def _sharing_weights(model: nn.Module) -> nn.Module:
    """A second model with the same weights, for another attention kernel or separate hooks."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)


def _same_shape(one: Any, other: Any) -> None:
    """Check shapes and finite values only, because different tokens give different answers."""
    one, other = (answer[0] if isinstance(answer, tuple) else answer for answer in (one, other))
    assert one.shape[0] == other.shape[0] and bool(torch.isfinite(other).all())


def _close(one: Any, other: Any) -> None:
    error = (one[0].float() - other[0].float()).abs().max()
    assert float(error) < (1e-3 if one[0].dtype == torch.float32 else 0.1), error


def _nothing(one: Any, other: Any) -> None:
    """No check: the two functions compute different things."""
