"""Chooses the implementation of an op: the Triton kernel or the plain torch reference.

The kernel runs for CUDA tensors if Triton is installed and the kernel is the faster implementation; otherwise the
reference runs. The environment variable ``EVOCOMP_OPS`` (``reference`` or ``triton``) forces one of them. If the forced
backend cannot run, this is an error, not a silent fallback.
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
    """Whether Triton kernels run in Triton's CPU interpreter (must be set before the kernels are imported)."""
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
            raise UserError("EVOCOMP_OPS=triton, but triton is not installed; run `pip install 'evocomp[kernels]'`")
        if not runs_here:
            raise UserError(
                f"EVOCOMP_OPS=triton, but the tensors are on {device}; move them to a GPU, "
                "or set TRITON_INTERPRET=1 to test the kernels on the CPU"
            )
        if double:
            raise UserError(
                "EVOCOMP_OPS=triton, but the tensors are float64 and the kernels compute in float32; convert the "
                "tensors, or unset EVOCOMP_OPS"
            )
    kernel = device == "cuda" and triton_installed() and not double
    chosen = forced or ("triton" if kernel and not slower else "reference")
    _announce(slower if kernel and slower else "ops", chosen, device)
    return chosen


def choose(tensor: Tensor, slower: str = "") -> str:
    """Backend of an op: "triton" or "reference". It is logged once per device.

    Args:
        tensor: main input of the op.
        slower: name of the op if its kernel saves memory but no time, so that it runs only if it is forced.

    Raises UserError if EVOCOMP_OPS names an unknown backend, or one that cannot run here.
    """
    return _choose(os.environ.get("EVOCOMP_OPS", ""), tensor.device.type, tensor.dtype == torch.float64, slower)


def launch_on(tensor: Tensor) -> torch.cuda.device_of:
    """Context in which Triton launches kernels on the tensor's GPU instead of the current one; no effect on the CPU."""
    return torch.cuda.device_of(tensor)


def differentiable(
    op: Any, forward: Callable, setup_context: Callable, backward: Callable, direct_backward: Callable | None = None
) -> Callable:
    """Add a gradient to `op`, a `torch.library.custom_op` of `forward`; without torch.compile `forward` runs directly.

    A custom op costs about 20 us on the host in each direction, more than these kernels take on a GPU. Only
    torch.compile needs it. `backward` gets None as the gradient of unused outputs.

    Args:
        op, forward: the custom op and the function from which it was made.
        setup_context, backward: arguments of `register_autograd`.
        direct_backward: `backward` without custom ops, which launches its kernels directly.
    """

    def setup(ctx, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)  # otherwise zeros for unused outputs cost kernel launches
        setup_context(ctx, inputs, output)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs: Any) -> Any:  # without a setup_context, which makes torch inspect signatures
            output = forward(*inputs)
            setup(ctx, inputs, output)
            return output

    Direct.backward = staticmethod(torch.autograd.function.once_differentiable(direct_backward or backward))
    op.register_autograd(backward, setup_context=setup)

    def call(*inputs: Any) -> Any:
        return op(*inputs) if torch.compiler.is_compiling() else Direct.apply(*inputs)

    return call


def without_gradient(op: Any, forward: Callable) -> Callable:
    """`differentiable` for an op without gradient whose outputs are new tensors."""
    return lambda *inputs: op(*inputs) if torch.compiler.is_compiling() else forward(*inputs)


def blocks(size: int, block: int) -> int:
    """Number of programs for `size` items, `block` each. It replaces `triton.cdiv`, which takes 4 us on the host."""
    return -(-size // block)
