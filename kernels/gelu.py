"""GELU with the tanh approximation, as x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): the same function, but
one exponential where torch's CPU kernel has a tanh. bench/suites/bench_gelu.py measures what that saves.

Shapes: any; fp32, fp16 or bf16, computed in fp32. In place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .inductor import compile_graph


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """The tanh approximation, with one exponential."""
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * x * (1 + 0.044715 * x * x))


def gelu_reference(h: Tensor, approximate: str) -> Tensor:
    """In float64."""
    return F.gelu(h.double(), approximate=approximate)


@lru_cache(maxsize=64)
def compiled_gelu(
    approximate: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, threads: int
) -> Callable[[Tensor], None]:
    """One compiled kernel for contiguous tensors of `shape`, in place. `threads`: torch.get_num_threads()."""

    def gelu(h: Tensor) -> None:
        x = h.float()
        h.copy_(gelu_by_sigmoid(x) if approximate == "tanh" else F.gelu(x))

    return compile_graph(gelu, [torch.empty(shape, dtype=dtype, device=device)])
