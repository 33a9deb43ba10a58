"""How far rounding alone may move what a run returns: the tolerance of a case, found on the oracle itself.

The runtime adds up in another order than the model. So the oracle runs again with the result of every layer moved by
what its dtype rounds to, at random, and an error counts that is several times what this does. Nearly all float32 runs
are within a fixed multiple of the rounding, and there nothing is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .oracle import is_value

TIMES = 8.0  # more than rounding of every layer's result: layers round inside, too
DRAWS = 3
AT_ONCE = {torch.float64: 64.0, torch.float32: 64.0, torch.bfloat16: 1.0}  # of the dtype's eps, that need no look


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference over the largest value expected; infinite where shape, dtype or what is finite differ."""
    if len(ours) != len(theirs):
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if not is_value(b):
            worst = worst if torch.equal(a, b) else float("inf")
            continue
        wide = torch.complex128 if b.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        there = b.isfinite()
        if not torch.equal(there, a.isfinite()):
            return float("inf")
        if there.any():
            scale = b[there].abs().max().clamp(min=1e-30)
            worst = max(worst, ((a - b)[there].abs().max() / scale).item())
    return worst


def allowed(dtype: torch.dtype, channels: bool = False, compiled: bool = False) -> float:
    """
    Args:
        channels: there are weights per channel, which are float32 whatever the model is.
        compiled: by TorchInductor, whose sine and exponential round otherwise: within a DiT's block they are float32,
            whatever the model is, and of angles up to a thousand.
    """
    found = AT_ONCE[dtype] * torch.finfo(dtype).eps
    found = max(found, allowed(torch.float32) if channels else 0.0)
    return max(found, 4 * allowed(torch.float32) if compiled else 0.0)


def reach(dtype: torch.dtype, twin: nn.Module, again: Callable[[], list[Tensor]], theirs: list[Tensor]) -> float:
    """How far `again`, the oracle's run up to the output `theirs`, moves if its layers round otherwise."""
    found = 0.0
    for draw in range(DRAWS):
        with _rounding_otherwise(twin, torch.finfo(dtype).eps, draw):
            found = max(found, error(again(), theirs))
    return TIMES * found


@contextmanager
def _rounding_otherwise(model: nn.Module, eps: float, seed: int) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)

    def move(leaf: Any) -> Any:
        if not is_value(leaf) or leaf.is_complex():
            return leaf
        return leaf + eps * leaf.abs() * torch.randn(leaf.shape, generator=generator).to(leaf.dtype)

    def hook(module: nn.Module, args: Any, result: Any) -> Any:
        return tree_map(move, result)

    modules = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
