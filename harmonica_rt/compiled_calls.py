"""Calls of a model's own submodules at level branches, compiled by TorchInductor; those of layers alike share code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from .kernels.inductor import CompilerMissing, first_line, missing_compiler
from .kernels.traces import compile_shared
from .models.stages import Call, Held


class NotCompiledError(Exception):
    """Why a call runs as it is."""


@dataclass(frozen=True, eq=False)
class CompiledCall(Call):
    """A call, its result written where it belongs by the same kernels.

    Attributes:
        kernel: (h, out), for the plan's shape and what it holds.
    """

    kernel: Callable[[Tensor, Tensor], None] = field(kw_only=True)

    def into(self, h: Tensor, held: Held | None, out: Tensor) -> Tensor:
        self.kernel(h.contiguous(), out)
        return out


def compiled_call(call: Call, held: Held, example: Tensor) -> CompiledCall:
    """`call` for tensors as `example`, [batch, tokens, width], and what is `held` for as long as it is.

    Whatever it reads that is no tensor is baked in.

    Raises:
        CompilerMissing: nothing can be compiled here.
        NotCompiledError: it is to run as it is.
    """
    if reason := missing_compiler(example.device.type):
        raise CompilerMissing(reason)
    for module in call.modules:
        if reason := _packed(module):
            raise NotCompiledError(f"{type(module).__name__}: {reason}")

    def run(h: Tensor, out: Tensor) -> None:
        out.copy_(call.compute(h, held))

    try:
        kernel = compile_shared(run, (example, torch.empty_like(example)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's own code does that no trace can follow
        raise NotCompiledError(first_line(error)) from error
    own = {each.name: getattr(call, each.name) for each in fields(Call)}
    return CompiledCall(**own | {"copies": 0}, kernel=kernel)


def _packed(module: nn.Module) -> str | None:
    """What unpacks weights is not traced."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"its {name} is a {type(tensor).__name__}"
    return None
