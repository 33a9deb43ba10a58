"""Reuse by hand on the unmodified pipeline: everything runs, and what a group of blocks returned is then replaced.

It shares no code with the runtime: steps and contexts come from the list of calls, forecasts from Lagrange.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .parts import DenoiserCall, Made, blocks_of

Streams = list[Tensor]
Group = tuple[nn.Module, nn.Module, tuple[str, ...]]  # first and last block, and which of its arguments go on


def trunk(made: Made, model: nn.Module) -> list[Group]:
    """All blocks of all lists."""
    blocks = made.blocks(model)
    return [(blocks[0], blocks[-1], ())]


def halves(made: Made, model: nn.Module) -> list[Group]:
    """Each list in two, the longer half first."""
    groups = []
    for name, streams in made.streams.items():
        blocks = blocks_of(model, name)
        cut = (len(blocks) + 1) // 2
        groups += [(part[0], part[-1], streams) for part in (blocks[:cut], blocks[cut:])]
    return groups


def whole(made: Made, model: nn.Module) -> list[Group]:
    """The denoiser's output."""
    return [(model, model, ())]


class ByHand:
    """A pipeline whose denoisers compute every `every`-th step and reuse in between.

    Args:
        groups: of a denoiser, what is reused as one.
        carry: of a reused group.
        every: of a context, how many steps there are from one computed to the next.

    Attributes:
        computed: all calls that computed, of the last run, as numbers in the run's list.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        made: Made,
        groups: Callable[[Made, nn.Module], list[Group]],
        *,
        every: Callable[[DenoiserCall], int] = lambda call: 2,
        order: int = 1,
        carry: float = 0.0,
    ) -> None:
        self.pipe, self.made = pipe, made
        self.every, self.order, self.carry = every, order, carry
        self.hooks = []
        for denoiser in made.denoisers:
            model = getattr(pipe, denoiser)
            self.hooks.append(model.register_forward_pre_hook(self.enter))
            for number, (first, last, names) in enumerate(groups(made, model)):
                key = (denoiser, number)
                if carry:
                    self.hooks.append(first.register_forward_pre_hook(self.before(key, names), with_kwargs=True))
                self.hooks.append(last.register_forward_hook(self.after(key)))
        self.start()

    def start(self) -> None:
        self.number = -1
        self.computed: list[int] = []
        self.x: dict[Any, Streams] = {}
        self.kept: dict[Any, list[tuple[int, Streams, Streams]]] = defaultdict(list)

    def run(self, **changes: Any) -> Tensor:
        self.start()
        latents = self.made.call(self.pipe, **changes)
        assert self.number == len(self.made.calls) - 1
        return latents

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    @property
    def call(self) -> DenoiserCall:
        return self.made.calls[self.number]

    def enter(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.number += 1

    def before(self, key: tuple[str, int], names: Sequence[str]) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = inspect.signature(block.forward).bind(*args, **kwargs).arguments
            self.x[key] = [arguments[name].clone() for name in names]

        return hook

    def after(self, key: tuple[str, int]) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
            leaves, spec = tree_flatten(result)
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            names = self.streams_of(result) if self.carry else []
            streams = [leaves[i] for i in places]
            x = [stream for stream, name in zip(self.x.get(key, ()), names) if name]
            values = self.kept[key, self.call.context]
            if not values or self.call.step % self.every(self.call) == 0:
                values.append((self.call.step, [s.clone() for s in x], [s.clone() for s in streams]))
                if self.number not in self.computed:
                    self.computed.append(self.number)
                return result
            for place, value in zip(places, self.forecast(values[-1 - self.order :], x, streams)):
                leaves[place] = value
            return tree_unflatten(leaves, spec)

        return hook

    def streams_of(self, result: Any) -> list[bool]:
        """Which of a block's streams go on: a last block may end one."""
        return [part is not None for part in (result if isinstance(result, tuple) else (result,))]

    def forecast(self, values: list[tuple[int, Streams, Streams]], x: Streams, like: Streams) -> Streams:
        steps = [step for step, _, _ in values]
        out = []
        for number, stream in enumerate(like):
            kind = torch.promote_types(stream.dtype, torch.float32)  # rounded once, as the runtime does
            total = torch.zeros_like(stream, dtype=kind)
            for step, xs, hs in values:
                weight = 1.0
                for other in steps:
                    weight *= (self.call.step - other) / (step - other) if other != step else 1.0
                total = total + weight * self.going_on(hs[number], stream).to(kind)
                if self.carry:
                    total = total - self.carry * weight * self.going_on(xs[number], stream).to(kind)
            total = total + self.carry * x[number].to(kind) if self.carry else total
            out.append(total.to(stream.dtype))
        return out

    def going_on(self, value: Tensor, like: Tensor) -> Tensor:
        """Of a batch of two halves the one that guidance left."""
        return value if value.shape == like.shape else value.chunk(2)[self.made.kept]


class BlockCalls:
    """How many blocks each of a run's denoiser calls computes; of a UNet its first layer.

    Args:
        models: of the pipeline's denoisers, as they were made.
    """

    def __init__(self, pipe: DiffusionPipeline, made: Made, models: Sequence[nn.Module]) -> None:
        self.by_call: list[int] = []
        for denoiser, model in zip(made.denoisers, models):
            getattr(pipe, denoiser).register_forward_pre_hook(lambda *_: self.by_call.append(0))
            for block in made.blocks(model) or [next(model.children())]:
                block.register_forward_pre_hook(self.count)

    def count(self, block: nn.Module, args: Any) -> None:
        self.by_call[-1] += 1

    def take(self) -> list[int]:
        taken, self.by_call = self.by_call, []
        return taken
