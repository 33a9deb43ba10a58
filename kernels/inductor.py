"""Which compilers this machine has, and pure functions of tensors compiled by TorchInductor without Dynamo.

A plan's shapes are fixed, so there is nothing to guard: a call costs a few microseconds instead of tens, and neither
other shapes nor other models in the process count against Dynamo's recompile limit.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class CompilerMissing(RuntimeError):
    """A compiler that a backend needs is not on this machine, or too old."""


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


TRITON = (3, 6)  # oldest version the kernels are tested with


def missing_triton() -> str | None:
    """Why the Triton kernels cannot be had here, or None. Does not import triton."""
    wanted = ".".join(map(str, TRITON))
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return f"expected triton {wanted} or newer, found none"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < TRITON:
        return f"expected triton {wanted} or newer, found {version}"
    return None


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
