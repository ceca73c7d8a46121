"""Helpers of the kernel tests: the error bound, guarded memory, and a kernel that does nothing."""

import os

import torch

# TRITON_INTERPRET takes precedence, so that a machine with a GPU can also run the tests in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"

# error from rounding the result, relative to the largest value
FLOOR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
BAND = 64
_real_empty = torch.empty


def assert_accurate(got, eager, truth):
    """Check that the kernel's error against fp64 is at most twice that of eager torch in the same dtype."""
    assert got.shape == truth.shape
    scale = truth.abs().max().clamp_min(1e-30)
    error, allowed = ((x.double() - truth).abs().max() / scale for x in (got, eager))
    assert allowed.isfinite(), "the eager op itself failed"
    # a NaN error compares false
    assert error <= 2 * allowed + FLOOR[got.dtype], f"kernel {error:.2e}, eager {allowed:.2e}"


def poison(dtype):
    return float("nan") if dtype.is_floating_point else (1 if dtype == torch.bool else -7)


class GuardedMemory:
    """Replaces torch.empty; every block lies between two guard bands that must not change."""

    def __init__(self):
        self.blocks = []

    def empty(self, *shape, dtype=None, device=None):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        dtype = dtype or torch.get_default_dtype()
        size = torch.Size(shape).numel()
        block = _real_empty(size + 2 * BAND, dtype=dtype, device=device).fill_(poison(dtype))
        self.blocks.append(block)
        return block[BAND : BAND + size].view(shape)

    def check(self):
        for block in self.blocks:
            for band in (block[:BAND], block[-BAND:]):
                intact = band.isnan() if band.is_floating_point() else band == poison(band.dtype)
                assert intact.all(), f"a kernel wrote outside its {block.dtype} output"


def between_bands(tensor):
    """The same values in the middle of a larger buffer of NaN, so that out-of-bounds reads are detected."""
    size = tensor.numel()
    block = _real_empty(size + 2 * BAND, dtype=tensor.dtype, device=tensor.device).fill_(poison(tensor.dtype))
    view = block[BAND : BAND + size].view(tensor.shape)
    return view.copy_(tensor)


def strided(tensor):
    """The same values, not contiguous in any dimension: every second element of a buffer of NaN."""
    block = torch.full([2 * n for n in tensor.shape], poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    view = block[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


class DoesNothing:
    """A kernel that writes nothing: every check must fail with it."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None
