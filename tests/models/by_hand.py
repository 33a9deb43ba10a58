"""Reuse of groups of blocks written from its formula alone: the oracle of levels blocks and output."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from harmonica_rt import Schedule
from harmonica_rt.forecast import forecast
from tests.models.denoisers import STEPS, Denoiser

Run = list[Tensor]
PUSH = 1e4  # far beyond what a block's branches return, which norms keep bounded


def tensors(output: object) -> Iterator[Tensor]:
    """Every tensor of what a forward returned, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)


def run(denoiser: Denoiser, model: nn.Module, callee: Callable, steps: Iterable[int] = range(STEPS)) -> list[Run]:
    """The tensors that `callee` returns at each of `steps`, called as `model` would be."""
    with torch.no_grad():
        return [[t.clone() for t in tensors(callee(**denoiser.call(model, step)))] for step in steps]


def blocks_of(model: nn.Module, names: Iterable[str]) -> dict[str, list[nn.Module]]:
    """The blocks of the lists `names`; a ModuleDict in a list stands for what it holds."""
    lists = {name: getattr(model, name) for name in names}
    return {
        name: [part for block in blocks for part in (block.values() if isinstance(block, nn.ModuleDict) else [block])]
        for name, blocks in lists.items()
    }


def is_stream(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class ByHand:
    """A model whose groups of blocks are reused as `schedule` says.

    The forward of every block is replaced on the block itself. Whatever floating tensors the calls of a group return at
    a computed step are kept; at a reused one each call returns sum_k a_k h_k + c (x - sum_k w_k x_k) of them, where x
    is the argument of the group's first call that the tensor continues.

    Args:
        groups: the blocks of each entry.
    """

    def __init__(self, denoiser: Denoiser, model: nn.Module, schedule: Schedule, groups: list[list[nn.Module]]) -> None:
        self.denoiser, self.model, self.groups, self.order = denoiser, model, groups, schedule.order
        entries = len(groups)
        self.compute = schedule.compute.reshape(STEPS, entries)
        self.a = schedule.weights.reshape(STEPS, entries, -1)
        self.w = forecast(schedule.compute, schedule.order).reshape(STEPS, entries, -1)
        self.carry = schedule.carry.reshape(STEPS, entries)
        self.after: dict[tuple[int, int, int], dict[int, Tensor]] = defaultdict(dict)  # entry, call, leaf: by step
        self.before: dict[tuple[int, int], dict[int, Tensor]] = defaultdict(dict)  # entry, leaf of the arguments
        self.returned: dict[tuple[int, int], tuple[list[Any], Any]] = {}
        self.x: dict[int, list[Any]] = {}
        self.source = self.find_sources() if self.carry.any() else {}

    def run(self) -> list[Run]:
        out = []
        for step in range(STEPS):
            self.calls = Counter()
            arguments = self.denoiser.call(self.model, step)
            with replaced(self.groups, functools.partial(self.call, step)), torch.no_grad():
                out.append([t.clone() for t in tensors(self.model(**arguments))])
        return out

    def call(self, step: int, entry: int, forward: Callable, args: tuple, kwargs: dict) -> Any:
        number = self.calls[entry]
        self.calls[entry] += 1
        if number == 0:
            self.x[entry] = [t.double().clone() if is_stream(t) else None for t in tree_flatten((args, kwargs))[0]]
        if self.compute[step, entry]:
            result = forward(*args, **kwargs)
            leaves, spec = self.returned[entry, number] = tree_flatten(result)
            for leaf, t in enumerate(leaves):
                if is_stream(t):
                    self.after[entry, number, leaf][step] = t.double().clone()
            if number == 0:
                for leaf, t in enumerate(self.x[entry]):
                    self.before[entry, leaf][step] = t
            return result
        leaves, spec = self.returned[entry, number]
        leaves = [
            self.stand_in(step, entry, number, leaf).to(t.dtype) if is_stream(t) else t for leaf, t in enumerate(leaves)
        ]
        return tree_unflatten(leaves, spec)

    def stand_in(self, step: int, entry: int, number: int, leaf: int) -> Tensor:
        past = [i for i in reversed(range(step)) if self.compute[i, entry]][: self.order + 1]
        after, source = self.after[entry, number, leaf], self.source.get((entry, number, leaf))
        out = sum(a * after[i] for a, i in zip(self.a[step, entry], past))
        if source is not None and (c := self.carry[step, entry]):
            before = self.before[entry, source]
            out = out + c * (self.x[entry][source] - sum(w * before[i] for w, i in zip(self.w[step, entry], past)))
        return out

    def find_sources(self) -> dict[tuple[int, int, int], int]:
        """The argument of a group's first call that each tensor it returns continues: it moves on by as much.

        Found by pushing one argument at a time, far.
        """
        rest = self.observe(None, None)
        gains: dict[tuple[int, int, int], dict[int, float]] = defaultdict(dict)
        for entry in range(len(self.groups)):
            for argument, x in enumerate(self.x[entry]):
                shapes = {t.shape for key, t in rest.items() if key[0] == entry}
                if x is None or x.shape not in shapes:
                    continue
                push = PUSH * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
                for key, t in self.observe(entry, (argument, push)).items():
                    if key[0] == entry and t.shape == x.shape:
                        gain = ((t - rest[key]).double() * push).sum() / push.double().square().sum()
                        gains[key][argument] = gain.item()
        return {key: min(found, key=lambda i: (round(abs(found[i] - 1), 2), i)) for key, found in gains.items()}

    def observe(self, entry: int | None, pushed: tuple[int, Tensor] | None) -> dict[tuple[int, int, int], Tensor]:
        """What the calls return at step 0, with an argument of `entry`'s first call pushed."""
        seen: dict[tuple[int, int, int], Tensor] = {}
        calls = Counter()
        moved: list[tuple[Tensor, Tensor]] = []

        def call(which: int, forward: Callable, args: tuple, kwargs: dict) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            if calls[which] == 0:
                self.x[which] = [t.clone() if is_stream(t) else None for t in leaves]
                if which == entry:
                    moved.append((leaves[pushed[0]], leaves[pushed[0]] + pushed[1]))
            for original, further in moved:  # wherever it goes
                leaves = [further if t is original else t for t in leaves]
            args, kwargs = tree_unflatten(leaves, spec)
            result = forward(*args, **kwargs)
            for leaf, t in enumerate(tree_flatten(result)[0]):
                if is_stream(t):
                    seen[which, calls[which], leaf] = t.clone()
            calls[which] += 1
            return result

        arguments = self.denoiser.call(self.model, 0)
        with replaced(self.groups, call), torch.no_grad():
            self.model(**arguments)
        return seen


@contextmanager
def replaced(groups: list[list[nn.Module]], call: Callable) -> Iterator[None]:
    """Calls of the blocks' forward go to `call(entry, forward, args, kwargs)`."""

    def instead(entry: int, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        return call(entry, forward, args, kwargs)

    try:
        for entry, blocks in enumerate(groups):
            for block in blocks:
                block.forward = functools.partial(instead, entry, block.forward)
        yield
    finally:
        for blocks in groups:
            for block in blocks:
                del block.forward


def outputs_by_hand(schedule: Schedule, plain: list[Run]) -> list[Run]:
    """The model's output as a value: sum_k a_k out_k over the last computed steps."""
    out = []
    for step in range(STEPS):
        past = [i for i in reversed(range(step)) if not schedule.output[i]][: schedule.order + 1]
        if schedule.output[step]:
            columns = zip(*(plain[i] for i in past))
            weights = schedule.output_weights[step]
            out.append([sum(a * t.double() for a, t in zip(weights, column)).to(column[0].dtype) for column in columns])
        else:
            out.append(plain[step])
    return out


def learned(schedule: Schedule, seed: int = 0) -> Schedule:
    """Weights that are not the forecast's, as training leaves them."""
    rng = np.random.default_rng(seed)
    return schedule.replace(weights=schedule.weights * rng.normal(1.0, 0.3, schedule.weights.shape))
