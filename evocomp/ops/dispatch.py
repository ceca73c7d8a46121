"""Which implementation of an op runs: the Triton kernel or the plain torch reference.

CUDA tensors with Triton installed take the kernel where it is the faster one, everything else the reference. The
environment variable ``EVOCOMP_OPS`` (``reference`` or ``triton``) forces one; a forced backend that cannot run is an
error and never a silent fallback.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evocomp.log import UserError, logger

BACKENDS = ("reference", "triton")


@functools.cache
def triton_installed() -> bool:
    """Whether the `triton` package can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (set before the kernels are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _announce(what: str, backend: str, device: str) -> None:
    logger.info(f"{what}: {backend} on {device}")


@torch.compiler.assume_constant_result
def _choose(forced: str, device: str, double: bool, slower: str) -> str:
    if forced not in ("", *BACKENDS):
        raise UserError(f"EVOCOMP_OPS={forced!r} is unknown; set it to reference or triton, or unset it")
    runs_here = device == "cuda" or interpreting()
    if forced == "triton":
        if not triton_installed():
            raise UserError("EVOCOMP_OPS=triton, but triton is not installed; pip install 'evocomp[kernels]'")
        if not runs_here:
            raise UserError(
                f"EVOCOMP_OPS=triton, but the tensors are on {device}; move them to a GPU, "
                "or set TRITON_INTERPRET=1 to test the kernels on the CPU"
            )
        if double:
            raise UserError("EVOCOMP_OPS=triton, but the tensors are float64; the kernels compute in float32")
    kernel = device == "cuda" and triton_installed() and not double
    chosen = forced or ("triton" if kernel and not slower else "reference")
    _announce(slower if kernel and slower else "ops", chosen, device)
    return chosen


def choose(tensor: Tensor, slower: str = "") -> str:
    """Backend for an op whose main input is `tensor`: "triton" or "reference"; said once per device.

    Args:
        tensor: main input.
        slower: name of an op whose kernel saves memory but no time, so that it runs only where it is forced.

    Raises UserError when EVOCOMP_OPS names an unknown backend or one that cannot run here.
    """
    return _choose(os.environ.get("EVOCOMP_OPS", ""), tensor.device.type, tensor.dtype == torch.float64, slower)


def launch_on(tensor: Tensor) -> torch.cuda.device_of:
    """Context in which Triton launches on the tensor's own GPU, whichever is current; nothing on the CPU."""
    return torch.cuda.device_of(tensor)


def differentiable(
    op: Any, forward: Callable, setup_context: Callable, backward: Callable, direct_backward: Callable | None = None
) -> Callable:
    """`op`, a `torch.library.custom_op` of `forward`, with its gradient; left out where nothing is compiled.

    A custom op costs some 20 us on the host each way, more than these kernels take on a GPU; torch.compile needs it.
    Gradients of outputs that nobody used come to `backward` as None.

    Args:
        op, forward: the custom op and the function that it was made of.
        setup_context, backward: as `register_autograd` takes them.
        direct_backward: the same as `backward`, launching directly what that does by a custom op.
    """

    def setup(ctx, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)  # zeros for every saved output would be launches too
        setup_context(ctx, inputs, output)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs: Any) -> Any:  # not with its own setup_context, for which torch inspects signatures
            output = forward(*inputs)
            setup(ctx, inputs, output)
            return output

    Direct.backward = staticmethod(torch.autograd.function.once_differentiable(direct_backward or backward))
    op.register_autograd(backward, setup_context=setup)

    def call(*inputs: Any) -> Any:
        return op(*inputs) if torch.compiler.is_compiling() else Direct.apply(*inputs)

    return call


def without_gradient(op: Any, forward: Callable) -> Callable:
    """The same for an op whose outputs are fresh memory that no gradient flows from."""
    return lambda *inputs: op(*inputs) if torch.compiler.is_compiling() else forward(*inputs)


def blocks(size: int, block: int) -> int:
    """Programs for `size` items, `block` each; `triton.cdiv` takes 4 us on the host."""
    return -(-size // block)
