"""Reuse of groups of blocks, or of the output, on the diffusers model itself: the tests' oracle at those levels.

For DiT, PixArt, Flux and Qwen-Image: each list of blocks is replaced by one of groups. The trunk beside branches is one
group of all blocks, whose branches are reused one by one within.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harmonica_rt import Schedule
from harmonica_rt.forecast import forecast

from .module_reuse import ModuleReuse, Reuse

LISTS = ("transformer_blocks", "single_transformer_blocks")
# The streams through a block in the order it returns them, by the names it takes them by; else one, its first argument
STREAMS = dict.fromkeys(
    ("FluxTransformer2DModel", "QwenImageTransformer2DModel"), ("encoder_hidden_states", "hidden_states")
)


def by_hand(model: nn.Module, schedule: Schedule) -> ModuleReuse | BlockReuse:
    """Reuse on the model itself, at the schedule's level."""
    if schedule.level == "branches":
        return (TrunkReuse if schedule.groups[-1].name == "trunk" else ModuleReuse)(model, schedule)
    return BlockReuse(model, schedule)


class TrunkReuse(ModuleReuse):
    """Reuse at module level, and of all blocks together where `schedule` reuses the trunk."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__(model, schedule)
        self.streams, self.blocks = STREAMS.get(schedule.model, ()), _lists(model)
        _join(self, schedule, -1)

    def remove(self) -> nn.Module:
        _put_back(self)
        return super().remove()


class BlockReuse(Reuse):
    """`model` whose groups of blocks, or itself, return what `schedule` says of their last values.

    `remove()` gives the model its blocks back.
    """

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__(model, schedule)
        self.streams, self.blocks = STREAMS.get(schedule.model, ()), _lists(model)
        groups = {name: count for name, count, _ in schedule.groups}
        if "trunk" in groups:
            _join(self, schedule, 0)
        elif groups:
            self._split(schedule, groups)

    def _split(self, schedule: Schedule, groups: dict[str, int]) -> None:
        numbers = iter(range(sum(groups.values())))
        for name, blocks in self.blocks.items():
            parts = np.array_split(np.arange(len(blocks)), groups[name])
            own = [_Group(self, schedule, [blocks[i] for i in part], next(numbers)) for part in parts]
            setattr(self.model, name, nn.ModuleList(own).eval())

    def remove(self) -> nn.Module:
        _put_back(self)
        return self.model


def _lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    return {name: list(getattr(model, name)) for name in LISTS if hasattr(model, name)}


def _join(owner: BlockReuse | TrunkReuse, schedule: Schedule, number: int) -> None:
    """All lists' blocks in the first, as one group that is entry `number`, none in the others."""
    whole = _Group(owner, schedule, [block for blocks in owner.blocks.values() for block in blocks], number)
    for name in owner.blocks:
        setattr(owner.model, name, nn.ModuleList([whole] if name == LISTS[0] else []).eval())


def _put_back(owner: BlockReuse | TrunkReuse) -> None:
    for name, blocks in owner.blocks.items():
        setattr(owner.model, name, nn.ModuleList(blocks).eval())


class _Group(nn.Module):
    """Consecutive blocks, entry `number` of `schedule`."""

    def __init__(
        self, owner: BlockReuse | TrunkReuse, schedule: Schedule, blocks: Sequence[nn.Module], number: int
    ) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)
        self.blocks = nn.ModuleList(blocks)
        entries = schedule.compute.shape

        def of(table: np.ndarray) -> np.ndarray:
            """This group's, [steps, ...]."""
            return table.reshape(entries[0], -1, *table.shape[len(entries) :])[:, number]

        unlearned = forecast(schedule.compute, schedule.order, schedule.positions)
        tables = (schedule.compute, schedule.weights, unlearned, schedule.carry)
        self.plan = [
            (bool(c), a.tolist(), w.tolist(), float(carry)) for c, a, w, carry in zip(*(of(table) for table in tables))
        ]
        self.channels = None if schedule.channels is None else torch.from_numpy(of(schedule.channels).copy())
        # Streams before and after it, newest first
        self.values: dict[str | None, list[tuple[list[Tensor], list[Tensor]]]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        """DiT asks its first block for the embedding of its head."""
        return super().__getattr__(name) if name == "blocks" else getattr(self.blocks[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        names = self.owner.streams
        if not names:
            return self._streams([args[0]], lambda block, x: [block(*x, *args[1:], **kwargs)])[0]
        rest = {name: value for name, value in kwargs.items() if name not in names}
        x = [kwargs[name] for name in names]
        return tuple(self._streams(x, lambda block, x: block(*args, **dict(zip(names, x)), **rest)))

    def _streams(self, x: list[Tensor], run: Any) -> list[Tensor]:
        """The streams after it: `run`(block, streams) block by block, or what stands in."""
        owner, values = self.owner, self.values[self.owner.context]
        computed, a, w, carry = self.plan[owner.step]
        if computed:
            h = x
            for block in self.blocks:
                h = run(block, h)
            self.values[owner.context] = [(x, h), *(values if owner.step else [])][: len(a)]
            owner.computed += 1
            return h
        owner.reused += 1
        if self.channels is not None:
            own = self.channels[owner.step]
            a, carry = [weight + each for weight, each in zip(a, own)], carry + own[-1]
        out = []
        for stream, now in enumerate(x):
            o = torch.zeros_like(now)
            for weight, (_, h) in zip(a, values):
                o = o + weight * h[stream]
            if isinstance(carry, Tensor) or carry:
                o = o + carry * (now - sum(weight * before[stream] for weight, (before, _) in zip(w, values)))
            out.append(o)
        return out
