"""`compress` on a model that is compiled with `torch.compile`, before or after.

By default compiled code does not notice hooks that are registered or removed later: it would go on without them, or
with those of an earlier handle. So compiled code is dropped at both moments and made again at the next call, where the
compiler sees the hooks that there are. The hooks themselves run in Python, between the compiled parts.
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
    """Turn the compiler's report that a hook cannot be part of its one graph into a `UserError`."""
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
    """Drop the code that `torch.compile` has made so far in this process, so that it is made again when next called.

    From then on compiled code also checks for hooks itself: two models of one class share it, and may differ in hooks.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.reset()
