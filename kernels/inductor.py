"""Which compilers this machine has, and pure functions of tensors compiled by TorchInductor without Dynamo.

A plan's shapes are fixed, so there is nothing to guard: a call costs a few microseconds instead of tens, and neither
other shapes nor other models in the process count against Dynamo's recompile limit.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from subprocess import SubprocessError
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class CompilerMissing(RuntimeError):
    """A compiler that a backend needs is not on this machine, too old, or cannot do its work here."""


def compile_graph(function: Callable[..., Any], examples: Sequence[Tensor]) -> Callable[..., Any]:
    """`function` compiled for the shapes, strides, dtypes and device of `examples`.

    Raises:
        CompilerMissing: there is no working C++ (CPU) or Triton (CUDA) compiler, or nowhere to put what it makes.
    """
    for device in {t.device.type for t in examples}:
        if reason := missing_compiler(device):
            raise CompilerMissing(reason)
    with _blaming_the_machine(examples[0].device.type):
        return _compile(function, examples)


def _compile(function: Callable[..., Any], examples: Sequence[Tensor]) -> Callable[..., Any]:
    import torch._inductor as inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    def compiled() -> Callable[..., Any]:
        return inductor.compile(make_fx(function, tracing_mode="fake")(*examples), list(examples))

    with torch.no_grad():
        return without_cut_files(compiled)


def without_cut_files(compiled: Callable[[], T]) -> T:
    """`compiled()`, and again without each file of TorchInductor's cache that its error tells it could not read.

    A process killed while the compiler wrote a library leaves a part of it under its name, which all later ones would
    take for whole and fail with.
    """
    removed: set[Path] = set()
    while True:
        try:
            return compiled()
        except (RuntimeError, OSError, ImportError) as error:
            if not (cut := {path for path in _binaries_in(str(error)) if path.exists()} - removed):
                raise
            for path in cut:
                path.unlink(missing_ok=True)
            removed |= cut


def _binaries_in(text: str) -> Iterator[Path]:
    """Of the cache."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for name in re.findall(re.escape(cache_dir()) + r"/[\w./+-]+\.s?o\b", text):
        yield Path(name)


@contextmanager
def _blaming_the_machine(device: str) -> Iterator[None]:
    """Turn whatever TorchInductor raises into CompilerMissing.

    What is compiled here is ours, the same on every machine, never a user's model. So a failure is this machine's: no
    compiler or one that fails (RuntimeErrors of torch and triton), a folder that cannot be written, a full disk
    (OSError), a library that cannot be loaded (ImportError), a process that died.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError, ImportError, SubprocessError) as error:
        raise CompilerMissing(f"TorchInductor cannot compile for {device} here: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """One line: what TorchInductor wraps, and of a compiler's failure the first line that it printed."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    printed = lines[lines.index("Output:") + 1 :][:1] if "Output:" in lines else []
    return ": ".join([type(error).__name__, *lines[:1], *printed])


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
    example = torch.zeros(8, device=device)
    try:
        with _blaming_the_machine(device), torch.no_grad():
            _compile(lambda t: t + 1, [example])(example)
    except CompilerMissing as error:
        return str(error)
    return None
