"""Multiply-accumulates of a model's own forward, counted as it runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
ATTENTION = [f"_scaled_dot_product_{kind}" for kind in KINDS]


class CountMacs(TorchDispatchMode):
    """Adds up what matrix products and convolutions do, in torch's own formulas, and attention.

    Flex attention, which torch compiles within an eager forward, runs in it as without.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports triton

        super().__init__()
        self.macs = 0
        self._flops = flop_registry

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", func)
        if getattr(packet, "__name__", "") in ATTENTION:
            self.macs += _attention(*(t.shape for t in args[:3]))
        elif packet in self._flops:
            self.macs += self._flops[packet](*args, **kwargs, out_val=out) // 2
        return out


def _attention(query: torch.Size, key: torch.Size, value: torch.Size) -> int:
    """Of [batch, heads, tokens, width] each; keys and values may have fewer heads (torch 2.11's own wants as many)."""
    *heads, tokens, width = query
    return math.prod(heads) * tokens * key[-2] * (width + value[-1])


def uncountable(model: nn.Module) -> str | None:
    """Why `model`'s forward cannot be counted as it runs, or None."""
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return f"{name or 'the model'} is compiled by torch.compile, whose code is not looked into"
    return None
