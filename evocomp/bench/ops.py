"""Benchmarks of the ops against straightforward implementations: small sizes on a CPU, real sizes on a GPU."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evocomp.bench.timing import Clock, compare, compare_all, each, host_waits, peak_memory
from evocomp.mllm.sizes import number_format, shape_named
from evocomp.ops import (
    context_clusters,
    cosine_separation,
    ghm_bce,
    score_separation,
    top_r_compact,
    vocabulary_argmax,
)
from evocomp.ops.context_clusters import reference as clusters_reference
from evocomp.ops.dispatch import choose, triton_installed

Row = dict[str, Any]
Rows = list[Row]


class Shape(NamedTuple):
    """Sizes of one measurement, in the package's alphabet."""

    B: int
    N: int
    D: int
    V: int
    R: int


# CPU: narrow states, so that all benchmarks finish within a minute on one thread. CUDA: LLaVA-1.5 and LLaVA-NeXT.
SHAPES = {
    "cpu": [Shape(B=2, N=576, D=128, V=32_000, R=64), Shape(B=1, N=2880, D=128, V=16_000, R=160)],
    "cuda": [Shape(B=32, N=576, D=4096, V=32_064, R=64), Shape(B=32, N=2880, D=4096, V=32_064, R=160)],
}


def run(device: str = "cpu", repeats: int | None = None, shapes: list[Shape] | None = None) -> Iterator[Row]:
    """Measure all rows for the device ("cpu" or "cuda"): separation, head, grouping (time and memory), GHM, compaction,
    context clusters.

    Each row has baseline, ours, times, "ratio" (above 1: ours is faster or smaller), device and versions. On GPUs,
    states are bfloat16, and short ops have a second row ("queued") that measures the time of the GPU only.

    Raises:
        AssertionError: an op and its baseline disagree; it is raised after all others have been measured.
    """
    kind = torch.device(device).type
    repeats = repeats or (20 if kind == "cuda" else 5)
    benches = (bench_head, bench_ghm, bench_compaction, bench_clusters, bench_separation, bench_grouping)
    works = [partial(bench, shape, device, repeats) for shape in shapes or SHAPES[kind] for bench in benches]
    return each(works)


def at_shape(name: str, device: str) -> Iterator[Row]:
    """Measure all rows at the sizes of a model of `sizes.SHAPES`, for 32 images."""
    shape = shape_named(name)
    text = shape.config().text_config
    return run(device, shapes=[Shape(32, shape.tokens, text.hidden_size, text.vocab_size, shape.kept)])


def _close(rtol: float = 1e-4, atol: float = 1e-5) -> Callable[[Any, Any], None]:
    return lambda a, b: torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def _near(share: float) -> Callable[[Any, Any], None]:
    """Check that the distance of each tensor is at most this fraction of the baseline's norm."""

    def check(baseline: Sequence[Tensor], ours: Sequence[Tensor]) -> None:
        for one, other in zip(baseline, ours, strict=True):
            distance, size = (one.double() - other.double()).norm(), one.double().norm()
            assert distance <= share * size, f"{float(distance):.3g} of {float(size):.3g}"

    return check


def _hidden(shape: Shape, device: str) -> tuple[Tensor, Tensor, float]:
    """States [B, N, D] with positive mean cosine, the mask of retained tokens [B, N], and the rounding tolerance."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(shape.B, shape.N, shape.D, generator=generator, device=device).add_(0.5)
    retained = torch.rand(shape.B, shape.N, generator=generator, device=device) < shape.R / shape.N
    dtype = number_format(device)
    return hidden.to(dtype).requires_grad_(), retained, 1e-4 if dtype == torch.float32 else 1e-2


def _clocks(device: str) -> list[tuple[str, Clock]]:
    """Suffixes of the benchmark's name, each with its clock."""
    return [("", "wall"), (", queued", "device")] if torch.device(device).type == "cuda" else [("", "wall")]


def _ours(tensor: Tensor, name: str, slower: str = "") -> str:
    return f"{name} ({choose(tensor, slower)})"


def pairwise_separation(hidden: Tensor, retained: Tensor) -> Tensor:
    """[B] mean cosine of discarded with retained tokens, as published: over the |I0| x |I1| pairs."""
    unit = F.normalize(hidden.float(), dim=-1)
    return torch.stack([(u[~kept] @ u[kept].T).mean() for u, kept in zip(unit, retained, strict=True)])


def pairwise_separation_batched(hidden: Tensor, retained: Tensor) -> Tensor:
    """The same without host synchronisation: a masked N x N matrix of the batch."""
    unit = F.normalize(hidden.float(), dim=-1)
    pairs = (~retained)[:, :, None] & retained[:, None, :]
    return (unit @ unit.mT * pairs).sum((1, 2)) / pairs.sum((1, 2))


def bench_separation(shape: Shape, device: str, repeats: int) -> Rows:
    """Cosine separation, factorised against all pairs; forward + backward."""
    hidden, retained, rounding = _hidden(shape, device)

    def step(separation: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        value = separation(hidden, retained)
        return value.detach(), torch.autograd.grad(value.sum(), hidden)[0]

    return [
        compare(
            "cosine separation, forward + backward",
            f"B={shape.B} N={shape.N} D={shape.D} R={shape.R}",
            (name, lambda baseline=baseline: step(baseline)),
            (_ours(hidden, "factorised"), lambda: step(cosine_separation)),
            _near(rounding),
            device,
            min(repeats, 5),
        )
        for name, baseline in (
            ("pairs |I0| x |I1|", pairwise_separation),
            ("masked N x N", pairwise_separation_batched),
        )
    ]


def eager_score_separation(hidden: Tensor, weight: Tensor, bias: Tensor, retained: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, N] of a linear head and the separation [B], by mean unit vectors in plain torch."""
    logits = F.linear(hidden, weight[None], bias)[..., 0]
    segment = torch.stack([~retained, retained], dim=1).float()
    means = segment @ F.normalize(hidden.float(), dim=-1) / segment.sum(-1, keepdim=True)
    return logits.float(), (means[:, 0] * means[:, 1]).sum(-1)


def bench_head(shape: Shape, device: str, repeats: int) -> Rows:
    """Head and cosine separation from one read of the states, against plain torch; forward, and forward + backward."""
    hidden, retained, rounding = _hidden(shape, device)
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(shape.D, generator=generator, device=device).mul_(shape.D**-0.5).to(hidden.dtype)
    weight, bias = weight.requires_grad_(), torch.zeros(1, device=device, dtype=hidden.dtype, requires_grad=True)
    up = torch.randn(shape.B, shape.N, generator=generator, device=device)

    def forward(function: Callable) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return function(hidden, weight, bias, retained)

    def both(function: Callable) -> tuple[Tensor, ...]:
        logits, separation = function(hidden, weight, bias, retained)
        loss = (logits * up).sum() + separation.sum()
        return logits.detach(), separation.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return [
        compare(
            f"head and separation, {name}",
            f"B={shape.B} N={shape.N} D={shape.D} R={shape.R}",
            ("torch, by mean unit vectors", lambda work=work: work(eager_score_separation)),
            (_ours(hidden, "one read"), lambda work=work: work(score_separation)),
            _near(rounding),
            device,
            repeats,
        )
        for name, work in (("forward", forward), ("forward + backward", both))
    ]


def full_matrix_argmax(tokens: Tensor, table: Tensor) -> Tensor:
    """[N] nearest rows through the full N x V matrix of scores, normalised in place."""
    norms = torch.linalg.vector_norm(table, dim=-1, dtype=torch.float32)
    return (tokens @ table.T).float().div_(norms).argmax(-1)


def bench_grouping(shape: Shape, device: str, repeats: int) -> Rows:
    """Nearest vocabulary row, in chunks (on GPUs also by the kernel) against the full matrix: time and memory."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, chunk = number_format(device), shape.V // 8
    tokens = torch.randn(shape.N, shape.D, generator=generator, device=device).to(dtype)
    table = torch.randn(shape.V, shape.D, generator=generator, device=device).to(dtype)
    regret = 1e-6 if dtype == torch.float32 else 2e-3  # the full matrix rounds its scores to this format

    def full() -> Tensor:
        return full_matrix_argmax(tokens, table)

    chunks = _ours(tokens, f"chunks of {chunk}", "vocabulary_argmax")
    ways = [(chunks, lambda: vocabulary_argmax(tokens, table, chunk=chunk)[0])]
    if tokens.is_cuda and triton_installed():
        from evocomp.ops.vocabulary_argmax import triton

        ways.append(("kernel (triton)", lambda: triton.vocabulary_argmax(tokens, table, None)[0]))

    def no_regret(a: Tensor, b: Tensor) -> None:
        best, got = (F.cosine_similarity(tokens.double(), table[index].double(), dim=-1) for index in (a, b))
        torch.testing.assert_close(got, best, rtol=0, atol=regret)

    sizes = f"N={shape.N} D={shape.D} V={shape.V}"
    baseline = "full N x V matrix", full
    rows = compare_all("grouping, time", sizes, baseline, ways, no_regret, device, min(repeats, 5))
    kept = ("shape", "baseline", "ours", "device", "threads", "torch", "triton", "python", "evocomp", "commit")
    most = peak_memory(full, device) / 2**20
    for row, (_, work) in zip(list(rows), ways, strict=True):
        least = peak_memory(work, device) / 2**20
        memory = {"baseline_mib": most, "ours_mib": least, "ratio": most / least}
        rows.append({"bench": "grouping, peak memory"} | {key: row[key] for key in kept} | memory)
    return rows


def eager_ghm(logits: Tensor, targets: Tensor, bins: int = 10) -> Tensor:
    """GHM-C as commonly written: a Python loop over the bins, autograd through a weighted BCE."""
    norm = (torch.sigmoid(logits.detach()) - targets).abs()
    edges = torch.arange(bins + 1, device=logits.device) / bins
    edges[-1] += 1e-6
    weight = torch.zeros_like(norm)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (norm >= low) & (norm < high)
        weight = torch.where(inside, 1 / (inside.sum().clamp_min(1) * bins), weight)
    return F.binary_cross_entropy_with_logits(logits, targets, weight=weight, reduction="sum")


def bench_ghm(shape: Shape, device: str, repeats: int) -> Rows:
    """GHM-C, fused against eager; forward + backward, on the logits of 32 images."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(32, shape.N, generator=generator, device=device).mul_(2)
    targets = (torch.rand(32, shape.N, generator=generator, device=device) < shape.R / shape.N).float()
    position = (logits.sigmoid() - targets).abs() * 10
    # at the edge of a bin, rounding decides the bin, and the two results could differ
    logits[(position - position.round()).abs() < 1e-4] = 0.5
    logits.requires_grad_()

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        value = loss(logits, targets)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    return [
        compare(
            f"GHM-C, forward + backward{suffix}",
            f"B=32 N={shape.N}",
            ("eager loop over bins", lambda: step(eager_ghm)),
            (_ours(logits, "fused"), lambda: step(ghm_bce)),
            _close(),
            device,
            repeats,
            clock,
        )
        for suffix, clock in _clocks(device)
    ]


def nonzero_compact(scores: Tensor, r: int, embeddings: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Top-r by a boolean mask and nonzero, image by image: two host synchronisations per image on GPUs."""
    rows, positions = [], []
    for score, row, position in zip(scores, embeddings, position_ids, strict=True):
        mask = torch.zeros_like(score, dtype=torch.bool)
        mask[score.topk(r).indices] = True
        index = mask.nonzero()[:, 0]
        rows.append(row[index])
        positions.append(position[index])
    return torch.stack(rows), torch.stack(positions)


def bench_compaction(shape: Shape, device: str, repeats: int) -> Rows:
    """Top-r in original order: static shapes against a mask with nonzero."""
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randn(shape.B, shape.N, generator=generator, device=device)
    embeddings = torch.randn(shape.B, shape.N, shape.D, generator=generator, device=device).to(number_format(device))
    positions = torch.arange(shape.N, device=device).expand(shape.B, -1)

    def ours() -> tuple[Tensor, Tensor]:
        kept = top_r_compact(scores, shape.R, embeddings, positions)
        return kept.embeddings, kept.position_ids

    sizes = f"B={shape.B} N={shape.N} D={shape.D} R={shape.R}"
    straight = ("mask + nonzero", lambda: nonzero_compact(scores, shape.R, embeddings, positions))
    static = (_ours(scores, "static shapes"), ours)
    rows = [
        compare(f"top-r compaction{suffix}", sizes, straight, static, _close(0, 0), device, repeats, clock)
        for suffix, clock in _clocks(device)
    ]
    if torch.device(device).type == "cuda":
        waits = [host_waits(work) for _, work in (straight, static)]
        kept = {key: value for key, value in rows[0].items() if isinstance(value, str)}
        counts = {"baseline_waits": waits[0], "ours_waits": waits[1], "ratio": waits[0] / max(1, waits[1])}
        rows.append(kept | {"bench": "top-r compaction, waits of the host"} | counts)
    return rows


def bench_clusters(shape: Shape, device: str, repeats: int) -> Rows:
    """Clusters of the context tokens of one image, with R kept tokens and S = N / 4, against one step per centre."""
    generator = torch.Generator(device).manual_seed(0)
    visual = torch.randn(1, shape.N, shape.D, generator=generator, device=device).to(number_format(device))
    kept = shape.N * 2 // 9
    count = kept - round(kept * shape.N / 4 / (kept + shape.N / 4))
    selected = torch.randperm(shape.N, generator=generator, device=device)[None, None, : kept - count]

    def rows() -> tuple[Tensor, Tensor]:
        centres, assignment = clusters_reference.context_clusters(visual[0], selected[0], count)
        return centres[None], assignment[None]

    def covered(baseline: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor]) -> None:
        """Rounding decides between nearly equal centres: both choices must cover the tokens equally well."""
        for centres, assignment in (baseline, ours):
            assert torch.equal(assignment.gather(-1, centres), centres), "a centre is assigned to another one"
        unit = F.normalize(visual[0].double(), dim=-1)
        one, other = (float((unit * unit[assignment[0, 0]]).sum(-1).mean()) for _, assignment in (baseline, ours))
        assert abs(one - other) <= 1e-3, f"mean cosine to the centre {one:.5f} and {other:.5f}"

    sizes = f"B=1 N={shape.N} D={shape.D} R={kept} C={count}"
    ours = (_ours(visual, "all steps at once"), lambda: context_clusters(visual, selected, count))
    one = ("one row per centre", rows)
    return [
        compare(f"context clusters{suffix}", sizes, one, ours, covered, device, min(repeats, 5), clock)
        for suffix, clock in _clocks(device)
    ]
