"""Pure functions of tensors, compiled by TorchInductor without Dynamo.

A plan's shapes are fixed, so there is nothing to guard: a call costs a few microseconds instead of tens, and neither
other shapes nor other models in the process count against Dynamo's recompile limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class CompilerMissing(RuntimeError):
    """TorchInductor cannot build code on this machine."""


def compile_graph(function: Callable[..., Any], examples: Sequence[Tensor]) -> Callable[..., Any]:
    """`function` compiled for the shapes, strides, dtypes and device of `examples`.

    Raises:
        CompilerMissing: there is no working C++ (CPU) or Triton (CUDA) compiler.
    """
    import torch._inductor as inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    for device in {t.device.type for t in examples}:
        if reason := missing_compiler(device):
            raise CompilerMissing(reason)
    with torch.no_grad():
        graph = make_fx(function, tracing_mode="fake")(*examples)
        return inductor.compile(graph, list(examples))


@lru_cache(maxsize=8)
def missing_compiler(device: str) -> str | None:
    """Why TorchInductor cannot compile for `device`, or None if it can. Found out by compiling one addition."""
    import torch._inductor as inductor
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
    from torch.fx.experimental.proxy_tensor import make_fx

    example = torch.zeros(8, device=device)
    with torch.no_grad():
        graph = make_fx(lambda t: t + 1, tracing_mode="fake")(example)
        try:
            inductor.compile(graph, [example])(example)
        except (InductorError, InvalidCxxCompiler, CppCompileError, ImportError) as error:
            return f"TorchInductor cannot compile for {device} here: {str(error).strip().splitlines()[0]}"
    return None
