"""Small models that are no diffusers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harmonica_rt as hrt

levels = pytest.mark.parametrize("level", ["blocks", "output"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Small(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.out = nn.Linear(8, 8)
        self.eval()

    def forward(self, x: Tensor, timestep: Any, cond: Tensor | None = None) -> Any:
        h = x if cond is None else x + cond[:, None]
        for block in self.blocks:
            h = block(h)
        return (self.out(h),)


def compiled(model: nn.Module, steps: int = 6, every: int = 2, **options: Any) -> nn.Module:
    return hrt.compile(model, hrt.Schedule.uniform(model, steps, every, **{"level": "output", "order": 0, **options}))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape)
