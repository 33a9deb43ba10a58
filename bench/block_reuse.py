"""Reuse of groups of blocks, or of the output, on the diffusers model itself: the tests' oracle at those levels.

For models with one list of blocks and one stream (DiT, PixArt): the list is replaced by one of groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from harmonica_rt import Schedule
from harmonica_rt.forecast import forecast

from .module_reuse import ModuleReuse


def by_hand(model: nn.Module, schedule: Schedule) -> ModuleReuse | BlockReuse:
    """Reuse on the model itself, at the schedule's level."""
    return (ModuleReuse if schedule.level == "branches" else BlockReuse)(model, schedule)


class BlockReuse(nn.Module):
    """`model` whose groups of blocks, or itself, return what `schedule` says of their last values.

    Steps are counted: call `reset()` before each run. `remove()` gives the model its blocks back.
    """

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.model, self.schedule, self.step = model, schedule, 0
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.computed = self.reused = self.outputs_reused = 0
        self.outputs: list[Tensor] = []  # newest first
        self.blocks = list(model.transformer_blocks)
        if schedule.groups:
            parts = np.array_split(np.arange(len(self.blocks)), schedule.groups[0].layers)
            grouped = [_Group(self, [self.blocks[i] for i in part], g) for g, part in enumerate(parts)]
            model.transformer_blocks = nn.ModuleList(grouped).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.schedule.output[self.step]:
            self.outputs_reused += 1
            weights = list(torch.from_numpy(self.schedule.output_weights[self.step].copy()).float())
            if self.schedule.output_channels is not None:
                own = torch.from_numpy(self.schedule.output_channels[self.step].copy())
                weights = [w + each.view(-1, 1, 1) for w, each in zip(weights, own)]
            sample = sum(w * output for w, output in zip(weights, self.outputs))
            output = Transformer2DModelOutput(sample=sample) if kwargs.get("return_dict", True) else (sample,)
        else:
            output = self.model(*args, **kwargs)
            self.outputs = [output[0], *(self.outputs if self.step else [])][: self.schedule.order + 1]
        self.step += 1
        return output

    def reset(self) -> None:
        self.step = 0

    def remove(self) -> nn.Module:
        self.model.transformer_blocks = nn.ModuleList(self.blocks).eval()
        return self.model


class _Group(nn.Module):
    def __init__(self, owner: BlockReuse, blocks: Sequence[nn.Module], number: int) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)
        self.blocks = nn.ModuleList(blocks)
        schedule = owner.schedule
        unlearned = forecast(schedule.compute, schedule.order, schedule.positions)
        self.plan = [
            (bool(c), a.tolist(), w.tolist(), float(carry))
            for c, a, w, carry in zip(
                *(t[:, number, 0] for t in (schedule.compute, schedule.weights, unlearned, schedule.carry))
            )
        ]
        channels = schedule.channels
        self.channels = None if channels is None else torch.from_numpy(channels[:, number, 0].copy())
        self.values: list[tuple[Tensor, Tensor]] = []  # stream before and after, newest first

    def __getattr__(self, name: str) -> Any:
        """DiT asks its first block for the embedding of its head."""
        return super().__getattr__(name) if name == "blocks" else getattr(self.blocks[0], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        computed, a, w, carry = self.plan[self.owner.step]
        if computed:
            h = x
            for block in self.blocks:
                h = block(h, *args, **kwargs)
            self.values = [(x, h), *(self.values if self.owner.step else [])][: len(a)]
            self.owner.computed += 1
            return h
        self.owner.reused += 1
        if self.channels is not None:
            own = self.channels[self.owner.step]
            a, carry = [weight + each for weight, each in zip(a, own)], carry + own[-1]
        o = torch.zeros_like(x)
        for weight, (_, h) in zip(a, self.values):
            o = o + weight * h
        if isinstance(carry, Tensor) or carry:
            o = o + carry * (x - sum(weight * before for weight, (before, _) in zip(w, self.values)))
        return o
