"""Multiply-accumulates of a model's own forward, counted as it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class CountMacs(TorchDispatchMode):
    """Adds up what matrix products, convolutions and attention do, in torch's own formulas.

    Flex attention, which torch compiles within an eager forward, runs in it as without.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry, sdpa_flop_count  # imports triton

        super().__init__()
        self.macs = 0
        self._flops = flop_registry
        self._attention = sdpa_flop_count

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", func)
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.macs += self._attention(*(t.shape for t in args[:3])) // 2
        elif packet in self._flops:
            self.macs += self._flops[packet](*args, **kwargs, out_val=out) // 2
        return out


def uncountable(model: nn.Module) -> str | None:
    """Why `model`'s forward cannot be counted as it runs, or None."""
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return f"{name or 'the model'} is compiled by torch.compile, whose code is not looked into"
    return None
