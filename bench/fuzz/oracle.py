"""Reuse by hand, from its formula alone: nothing of the runtime is imported, of a schedule its arrays are read.

Modules of a twin model have their forward replaced for the time of a call: those of a branch, or all blocks of a group.
What they return at a computed step is kept; at a reused one they return sum_k a_k h_k + c (x - sum_k w_k x_k).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from bench.by_hand.module_reuse import MODULES

UNCLEAR = -1  # a source, where a tensor continues none of the arguments it might
NEAR = 0.3  # to 1, of how far what continues an argument moves with it
PUSH = 1e4  # far beyond what a block's branches return, which norms keep bounded
Key = tuple[int, int]  # number of a call within a forward, leaf of what it returns


class Unclear(ValueError):
    """A carry of what continues no argument: the formula does not say what is carried."""


def lagrange(at: float, nodes: Sequence[float]) -> list[float]:
    """What the values at `nodes` weigh in the polynomial through them."""
    weights = []
    for node in nodes:
        weight = 1.0
        for other in nodes:
            weight *= 1.0 if other == node else (at - other) / (node - other)
        weights.append(weight)
    return weights


def tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor of what a forward returned, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)


def is_value(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def blocks_of(model: nn.Module, names: Sequence[str]) -> dict[str, list[nn.Module]]:
    """The blocks of the lists `names`; a ModuleDict in a list stands for what it holds, a module alone for a list."""
    found = {}
    for name in names:
        part = model.get_submodule(name)
        blocks = list(part) if isinstance(part, nn.ModuleList) else [part]
        found[name] = [b for block in blocks for b in (block.values() if isinstance(block, nn.ModuleDict) else [block])]
    return found


def entries_of(model: nn.Module, lists: Sequence[str], schedule: Any) -> list[list[nn.Module]]:
    """The modules that each entry of a schedule stands for.

    Args:
        lists: names of the model's lists of blocks.
    """
    blocks = blocks_of(model, lists)
    found: list[list[nn.Module]] = []
    for name, layers, branches in schedule.groups:
        if name == "trunk":
            found.append([block for own in blocks.values() for block in own])
        elif schedule.level == "blocks":
            own = blocks[name]
            ends = np.cumsum([0] + [len(own) // layers + (i < len(own) % layers) for i in range(layers)])
            found += [own[a:b] for a, b in itertools.pairwise(ends)]
        else:
            modules = MODULES[schedule.model]
            for block in blocks[name]:
                parts = [[getattr(block, attribute, None) for attribute in modules[branch]] for branch in branches]
                found += [[module for module in own if module is not None] for own in parts]
    return found


@contextmanager
def replaced(entries: list[list[nn.Module]], call: Callable[..., Any]) -> Iterator[None]:
    """Calls of the modules' forward go to `call(entry, forward, args, kwargs)`."""

    def instead(entry: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(entry, forward, args, kwargs)

    put: list[nn.Module] = []
    try:
        for entry, modules in enumerate(entries):
            for module in modules:
                put.append(module)
                module.forward = functools.partial(instead, entry, module.forward)
        yield
    finally:
        for module in put:
            vars(module).pop("forward", None)


class Reuse:
    """One context of a run of `schedule` on `model`.

    Args:
        lists: names of the model's lists of blocks.
        sources: of each returned tensor, by entry and key, the argument that it continues: see `find_sources`.
        start: the step the run enters at.
    """

    def __init__(
        self,
        model: nn.Module,
        lists: Sequence[str],
        schedule: Any,
        sources: dict[tuple[int, Key], int],
        start: int = 0,
    ) -> None:
        self.model, self.schedule, self.sources, self.start = model, schedule, sources, start
        self.entries = entries_of(model, lists, schedule)
        steps, count = len(schedule.output), len(self.entries)
        self.compute = schedule.compute.reshape(steps, count)
        self.weights = schedule.weights.reshape(steps, count, schedule.order + 1)
        self.carry = schedule.carry.reshape(steps, count)
        own = schedule.channels
        self.channels = None if own is None else own.reshape(steps, count, *own.shape[-2:])
        self.at = {
            "index": list(range(steps)),
            "timestep": schedule.timesteps,
            "logsnr": schedule.log_snr,
        }[schedule.forecast]
        carries = self.carry.any(0)
        if self.channels is not None and own.shape[-2] > schedule.order + 1:
            carries = carries | self.channels[:, :, -1].any((0, 2))
        self.carries = carries.tolist()
        self.kept: list[list[tuple[int, dict[Key, Tensor], dict[int, Tensor]]]] = [[] for _ in self.entries]
        self.outputs: list[tuple[int, list[Tensor]]] = []
        self.returned: dict[tuple[int, int], tuple[list[Any], Any]] = {}

    def call(self, step: int, kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors that the model returns at `step`."""
        if self.schedule.output[step] and step != self.start:
            return self._output(step)
        self.step, self.done = step, [0] * len(self.entries)
        self.x: list[dict[int, Tensor]] = [{} for _ in self.entries]
        with replaced(self.entries, self._module), torch.no_grad():
            out = [t.clone() for t in tensors(self.model(**kwargs))]
        self.outputs = [(step, out), *self.outputs][: self.schedule.order + 1]
        return out

    def narrow(self, kwargs: dict[str, Any], which: int) -> None:
        """Go on with half `which` of the batch; `kwargs` are of a call of it."""
        shapes: dict[tuple[int, Key], torch.Size] = {}
        done = [0] * len(self.entries)

        def look(entry: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            number = done[entry]
            done[entry] += 1
            for leaf, t in enumerate(tree_flatten((args, kwargs))[0] if number == 0 else []):
                if is_value(t):
                    shapes[entry, (-1, leaf)] = t.shape
            result = forward(*args, **kwargs)
            for leaf, t in enumerate(tree_flatten(result)[0]):
                if is_value(t):
                    shapes[entry, (number, leaf)] = t.shape
            return result

        with replaced(self.entries, look), torch.no_grad():
            outputs = [t.shape for t in tensors(self.model(**kwargs))]
        for entry, kept in enumerate(self.kept):
            self.kept[entry] = [
                (
                    step,
                    {key: _half(t, shapes[entry, key], which) for key, t in after.items()},
                    {leaf: _half(t, shapes[entry, (-1, leaf)], which) for leaf, t in before.items()},
                )
                for step, after, before in kept
            ]
        self.outputs = [
            (step, [_half(t, shape, which) for t, shape in zip(out, outputs)]) for step, out in self.outputs
        ]

    # ---- what stands in

    def _module(self, entry: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number, step = self.done[entry], self.step
        self.done[entry] += 1
        computed = step == self.start or self.compute[step, entry]
        if number == 0:
            if self.carries[entry]:
                leaves = tree_flatten((args, kwargs))[0]
                self.x[entry] = {i: t.clone() for i, t in enumerate(leaves) if is_value(t)}
            if computed:
                kept = [(step, {}, self.x[entry]), *self.kept[entry]]
                self.kept[entry] = kept[: self.schedule.order + 1]
        if computed:
            result = forward(*args, **kwargs)
            leaves, spec = self.returned[entry, number] = tree_flatten(result)
            values = {(number, leaf): t.clone() for leaf, t in enumerate(leaves) if is_value(t)}
            self.kept[entry][0][1].update(values)
            return result
        leaves, spec = self.returned[entry, number]
        return tree_unflatten(
            [self._stand_in(entry, (number, leaf)) if is_value(t) else t for leaf, t in enumerate(leaves)], spec
        )

    def _stand_in(self, entry: int, key: Key) -> Tensor:
        step, kept = self.step, self.kept[entry]
        past = [each[0] for each in kept]
        like = kept[0][1][key]
        row, channels = self._row(step, past, ~self.compute[:, entry], self.weights[:, entry]), None
        if row is not None and self.channels is not None and self.channels.shape[-1] == like.shape[-1]:
            channels = torch.from_numpy(self.channels[step, entry].copy()).double()
        a = lagrange(self.at[step], [self.at[i] for i in past]) if row is None else row
        out = _sum(a, [each[1][key] for each in kept], channels)
        source, carry = self.sources.get((entry, key)), self.carry[step, entry]
        if self.carries[entry] and source == UNCLEAR:
            if key[0] == max(number for number, _ in kept[0][1]):
                raise Unclear(f"entry {entry}")
            source = None
        if self.carries[entry] and source is not None:
            c = carry if channels is None else carry + channels[-1]
            w = lagrange(self.at[step], [self.at[i] for i in past])
            new = _wide(self.x[entry][source]) - _sum(w, [each[2][source] for each in kept], None)
            out = out + c * new
        return out.to(like.dtype)

    def _output(self, step: int) -> list[Tensor]:
        past = [i for i, _ in self.outputs]
        row, own = self._row(step, past, self.schedule.output, self.schedule.output_weights), None
        if row is not None and self.schedule.output_channels is not None:
            own = torch.from_numpy(self.schedule.output_channels[step].copy()).double()
        a = lagrange(self.at[step], [self.at[i] for i in past]) if row is None else row
        columns = list(zip(*(out for _, out in self.outputs)))
        return [
            _sum(a, column, own, -1 if column[0].ndim < 4 else 1).to(column[0].dtype)
            if is_value(column[0])
            else column[0]
            for column in columns
        ]

    def _row(self, step: int, past: list[int], reused: np.ndarray, weights: np.ndarray) -> list[float] | None:
        """The schedule's weights, where what they weigh is there: in a run from step 0 always."""
        planned = [i for i in reversed(range(step)) if not reused[i]][: self.schedule.order + 1]
        row = weights[step].tolist()
        same = all(a == 0.0 or past[k : k + 1] == planned[k : k + 1] for k, a in enumerate(row))
        return row if same else None


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float64))


def _sum(weights: Sequence[float], values: Sequence[Tensor], channels: Tensor | None, axis: int = -1) -> Tensor:
    total = torch.zeros_like(_wide(values[0]))
    for number, (weight, value) in enumerate(zip(weights, values)):
        own: Any = weight
        if channels is not None:
            tail = value.ndim - 1 - (axis % value.ndim)
            own = weight + channels[number].view(-1, *(1,) * tail)
        total = total + own * _wide(value)
    return total


def _half(t: Tensor, shape: torch.Size, which: int) -> Tensor:
    for axis, (was, now) in enumerate(zip(t.shape, shape)):
        if was == 2 * now:
            return t.narrow(axis, which * now, now)
    return t


def find_sources(
    model: nn.Module, entries: list[list[nn.Module]], kwargs: dict[str, Any]
) -> dict[tuple[int, Key], int]:
    """The argument of an entry's first call that each tensor it returns continues: it moves on by as much.

    Found by pushing one argument at a time, far. `UNCLEAR` where none does: a projection of two streams, say.
    """
    rest, x = _observe(model, entries, kwargs, None, None)
    gains: dict[tuple[int, Key], dict[int, float]] = {}
    for entry in range(len(entries)):
        for leaf, argument in x[entry].items():
            if argument.shape not in {t.shape for (which, _), t in rest.items() if which == entry}:
                continue
            push = PUSH * torch.randn(argument.shape, generator=torch.Generator().manual_seed(0)).to(argument.dtype)
            for key, t in _observe(model, entries, kwargs, entry, (leaf, push))[0].items():
                if key[0] == entry and t.shape == argument.shape:
                    gain = ((t - rest[key]).double() * push).sum() / push.double().square().sum()
                    gains.setdefault(key, {})[leaf] = gain.item()
    nearest = {key: min(found, key=lambda i: (round(abs(found[i] - 1), 2), i)) for key, found in gains.items()}
    return {key: leaf if abs(gains[key][leaf] - 1) < NEAR else UNCLEAR for key, leaf in nearest.items()}


def _observe(
    model: nn.Module,
    entries: list[list[nn.Module]],
    kwargs: dict[str, Any],
    entry: int | None,
    pushed: tuple[int, Tensor] | None,
) -> tuple[dict[tuple[int, Key], Tensor], list[dict[int, Tensor]]]:
    """What entries' calls return, and the arguments of their first, with one of these pushed wherever it goes."""
    seen: dict[tuple[int, Key], Tensor] = {}
    x: list[dict[int, Tensor]] = [{} for _ in entries]
    done, moved = [0] * len(entries), []

    def call(which: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        if done[which] == 0:
            x[which] = {i: t.clone() for i, t in enumerate(leaves) if is_value(t)}
            if which == entry:
                moved.append((leaves[pushed[0]], leaves[pushed[0]] + pushed[1]))
        for original, further in moved:
            leaves = [further if t is original else t for t in leaves]
        args, kwargs = tree_unflatten(leaves, spec)
        result = forward(*args, **kwargs)
        for leaf, t in enumerate(tree_flatten(result)[0]):
            if is_value(t):
                seen[which, (done[which], leaf)] = t.clone()
        done[which] += 1
        return result

    with replaced(entries, call), torch.no_grad():
        model(**tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, kwargs))
    return seen, x
