"""Ways in which a model's call may be another one: rows of its batch, times in between, other shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

TEXT_TOKENS = ("encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask")


def generator(*seeds: int) -> torch.Generator:
    number = 0
    for seed in seeds:
        number = (number * 1_000_003 + seed + 1) % 2**62
    return torch.Generator().manual_seed(number)


def rows_of(call: dict[str, Any], rows: list[int], like: dict[str, Any], batch: int) -> dict[str, Any]:
    """Those rows of whatever in `like`, a call of such a batch, is over the batch."""

    def pick(value: Any, was: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows].clone() if value.ndim and len(was) == batch else value
        if isinstance(value, dict):
            return {key: pick(each, was[key]) for key, each in value.items()}
        if isinstance(value, list) and len(was) == batch and all(isinstance(each, Tensor) for each in value):
            return [value[row].clone() for row in rows]
        return value

    return {key: pick(value, like[key]) for key, value in call.items()}


def between(a: Any, b: Any, u: float) -> Any:
    if not isinstance(a, Tensor):
        return type(a)(a + (b - a) * u)
    moved = a.double() + (b.double() - a.double()) * u
    return (moved if a.is_floating_point() else moved.round()).to(a.dtype)


def as_it_is(call: dict[str, Any]) -> dict[str, Any]:
    return call


def less_text(call: dict[str, Any]) -> dict[str, Any]:
    """One token less."""
    out = dict(call)
    for name, value in call.items():
        if name in TEXT_TOKENS and isinstance(value, Tensor) and value.ndim >= 2:
            out[name] = value.narrow(1, 0, value.shape[1] - 1).contiguous()
        if name == "txt_ids" and isinstance(value, Tensor):
            axis = value.ndim - 2
            out[name] = value.narrow(axis, 0, value.shape[axis] - 1).contiguous()
    return out


def smaller(call: dict[str, Any]) -> dict[str, Any]:
    """Pictures of half the width, in whole patches."""
    name = next(iter(call))
    if not isinstance(value := call[name], Tensor) or value.ndim < 4 or value.shape[-1] % 8:
        return call
    return call | {name: value.narrow(-1, 0, value.shape[-1] // 2).contiguous()}


def tensors_of(call: dict[str, Any]) -> list[Tensor]:
    return [t for t in tree_leaves(call) if isinstance(t, Tensor)]


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b
