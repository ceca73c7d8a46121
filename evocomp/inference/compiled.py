"""`compress` on a model that is compiled with `torch.compile`, before or after `compress`.

By default, compiled code ignores hooks that are registered or removed after compilation: it would run without them, or
with those of an earlier handle. Therefore compiled code is dropped when hooks are added or removed, and the next call
compiles again with the current hooks. The hooks themselves run in Python, between the compiled parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._dynamo
from torch import nn

from evocomp.log import UserError

REASON = "hooks of evocomp.compress run in Python; compile with fullgraph=False, or call remove() on the handle"

in_python = torch.compiler.disable(reason=REASON)


@contextmanager
def no_full_graph() -> Iterator[None]:
    """Turn the compiler's error that a hook cannot be part of a full graph into a `UserError`."""
    try:
        yield
    except torch._dynamo.exc.Unsupported as error:
        if REASON in str(error):
            raise UserError(REASON) from None
        raise


def without_compile(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` was given; any other module is returned as it is."""
    while isinstance(module, torch._dynamo.OptimizedModule):
        module = module._orig_mod
    return module


def drop_compiled_code() -> None:
    """Drop all code that `torch.compile` has made in this process, so that the next call compiles again.

    Code compiled from now on also has guards on hooks: models of one class share code, and may differ in hooks.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.reset()
