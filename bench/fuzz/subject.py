"""The models of the campaign, all denoiser classes of diffusers in small, and calls of them that vary."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import harmonica_rt as hrt
from bench.by_hand.module_reuse import MODULES

from .calls import as_it_is, between, generator, less_text, rows_of, same, smaller, tensors_of
from .models import NAMES, NOT_AT_BRANCHES
from .oracle import entries_of, find_sources, is_value, tensors

CLOCKS = ("time", "sigma")  # in the names of arguments that tell the time, and no other changes from step to step
TIMED = ("timestep", "t", "timesteps", "time", "timestep_img", "sigma", "decoder_noise_time", "timestep_ratio")
TIMED += ("vision_timesteps",)
TEXTS = ("text", "prompt", "caption", "pooled", "encoder_hidden_states")
UNITS = 5.5  # from the first of a small denoiser's timesteps to 0, in steps of its own clock
ALL_STEPS = 6


class Subject:
    """A model and its twin, of the same numbers in other memory: one for the runtime, one for the oracle.

    Args:
        name: one of `NAMES`.

    Attributes:
        timed: whether calls have a timestep that the runtime reads; rising: whether it rises.
        batched: whether calls can be of any batch; conditioned: whether what they are conditioned on varies.
        variants: how many shapes its calls can have.
    """

    def __init__(self, name: str, dtype: str = "float32") -> None:
        self.name, self.dtype = name, getattr(torch, dtype)
        self.denoiser = NAMES[name]
        self.kind = name.split(",")[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("diffusers").setLevel(logging.ERROR)
            self.model, self.twin = self.denoiser.make(), self.denoiser.make()
        self._calls = [self.denoiser.call(self.twin, step) for step in range(ALL_STEPS)]  # of float32 models
        self.model.to(self.dtype), self.twin.to(self.dtype)
        self.dirty = False
        self.groups_at, self.width = functools.cache(self.groups_at), functools.cache(self.width)  # gone with this
        self._originals = [_state(model) for model in (self.model, self.twin)]
        leaves, others = tree_leaves(self._calls[0]), tree_leaves(self._calls[1])
        self._names = [key for key, value in self._calls[0].items() for _ in tree_leaves(value)]
        self._changing = [not same(a, b) for a, b in zip(leaves, others, strict=True)]
        self.timed = any(self._calls[0].get(key) is not None for key in TIMED)
        self.batch = self._batch_of_calls()
        self.rising = False
        if self.timed:
            first, second = (self.timestep(self.call(0, 0, [u])) for u in (0.0, 1.0))
            self.rising = second > first
        self.conditioned = any(map(self._is_text, range(len(leaves)))) or "class_labels" in self._calls[0]
        self.runs = self._output() is not None
        self._shapes = [how for how in (as_it_is, less_text, smaller) if self._runs(how)] if self.runs else []
        self.variants = len(self._shapes)
        self.batched = self.runs and self._is_batched()
        self._sources: dict[Any, dict[Any, int]] = {}
        self._lists: dict[str, tuple[str, ...]] = {}

    # ---- levels

    @functools.cached_property
    def levels(self) -> tuple[str, ...]:
        return tuple(level for level in ("branches", "blocks", "output") if self.groups_at(level) is not None)

    def groups_at(self, level: str, groups: int = 1, trunk: bool = False) -> Any:
        """What a schedule's groups are at `level`, or None if the model cannot have it."""
        options = {"groups": groups} if level == "blocks" else {"trunk": trunk} if level == "branches" else {}
        if level == "branches" and (self.kind not in MODULES or self.name in NOT_AT_BRANCHES):
            return None
        try:
            return hrt.Schedule.full(self.model, 2, level=level, **options).groups
        except hrt.UnsupportedModelError:
            return None

    def lists(self, level: str) -> tuple[str, ...]:
        """Names of the model's lists of blocks, as schedules name them."""
        if level == "output":
            return ()
        groups = self.groups_at(level, 2 if level == "blocks" else 1)
        return tuple(name for name, _, _ in groups)

    def sources(self, schedule: Any) -> dict[Any, int]:
        """What the streams of a schedule's entries continue."""
        key = (schedule.level, schedule.groups)
        if key not in self._sources:
            entries = entries_of(self.twin, self.lists(schedule.level), schedule)
            self._sources[key] = find_sources(self.twin, entries, self.call(0, 0, [0.0]))
        return self._sources[key]

    def width(self, level: str, groups: int = 1, trunk: bool = False) -> int | None:
        """Channels of its entries, or of the output at level output; None where they differ."""
        if level == "output":
            found = {t.shape[-1 if t.ndim < 4 else 1] for t in self._output() if is_value(t)}
            listed = any(isinstance(value, list) for value in self._calls[0].values())
            return None if listed else _only(found)
        schedule = hrt.Schedule.full(
            self.model, 2, level=level, **({"trunk": trunk} if level == "branches" else {"groups": groups})
        )
        widths: set[int] = set()
        handles = []

        def look(module: nn.Module, args: Any, result: Any) -> None:
            widths.update(t.shape[-1] for t in tree_leaves(result) if is_value(t))

        for modules in entries_of(self.twin, self.lists(level), schedule):
            handles += [module.register_forward_hook(look) for module in modules]
        self._output()
        for handle in handles:
            handle.remove()
        return _only(widths)

    # ---- calls

    def call(
        self,
        seed: int,
        step: int,
        clock: list[float],
        context: int = 0,
        batch: int | None = None,
        shape: int = 0,
        half: int | None = None,
    ) -> dict[str, Any]:
        """Arguments of a call, all tensors new.

        Args:
            seed: of the run: of its samples and, with `context`, of what they are conditioned on.
            clock: when each step is, from 0 to `UNITS`.
            half: of a batch, which.
        """
        base = self._rows(self._calls[(seed + step) % ALL_STEPS], batch)
        leaves, spec = tree_flatten(base)
        early, later = (tree_leaves(self._rows(self._calls[i], batch)) for i in (0, 1))
        out: list[Any] = []
        for number, (leaf, a, b) in enumerate(zip(leaves, early, later)):
            name = self._names[number]
            if self._changing[number] and any(clock_name in name or name == "t" for clock_name in CLOCKS):
                out.append(between(a, b, clock[step]))
            elif self._changing[number] and is_value(leaf):
                out.append(torch.randn(leaf.shape, generator=generator(seed, step, number)).to(leaf.dtype))
            elif self._is_text(number):
                noise = torch.randn(leaf.shape, generator=generator(seed, 977 + context, number))
                out.append(leaf + 0.3 * noise.to(leaf.dtype))
            elif name == "class_labels":
                out.append((leaf + torch.arange(len(leaf)) * (1 + seed % 2) + seed + 2 * context) % 5)
            else:
                out.append(leaf.clone() if isinstance(leaf, Tensor) else leaf)
        out = [t if self._keeps_dtype(i, t) else t.to(self.dtype) for i, t in enumerate(out)]
        call = self._shapes[shape](tree_unflatten(out, spec)) if shape else tree_unflatten(out, spec)
        return call if half is None else self._half(call, half, self.batch if batch is None else batch)

    def timestep(self, call: dict[str, Any]) -> float:
        """What the runtime reads of a call."""
        value = next(call[name] for name in TIMED if call.get(name) is not None)
        return float(value.max()) if isinstance(value, Tensor) else float(value)

    def _keeps_dtype(self, number: int, t: Any) -> bool:
        if not is_value(t) or self.dtype == torch.float32:
            return True
        name = self._names[number]
        return (
            any(part in name for part in (*CLOCKS, "ids", "mask", "guidance", "rotary", "cond_kwargs")) or name == "t"
        )

    def _is_text(self, number: int) -> bool:
        name, leaf = self._names[number], tree_leaves(self._calls[0])[number]
        named = any(part in name for part in TEXTS) and not any(part in name for part in ("mask", "ids", "time"))
        return named and is_value(leaf) and leaf.ndim >= 2 and not self._changing[number]

    def _batch_of_calls(self) -> int:
        for number, leaf in enumerate(tree_leaves(self._calls[0])):
            if (
                self._changing[number]
                and isinstance(leaf, Tensor)
                and not any(c in self._names[number] for c in CLOCKS)
            ):
                value = self._calls[0][self._names[number]]
                return len(value) if isinstance(value, list) else len(leaf) if leaf.ndim else 1
        return 1

    def _rows(self, call: dict[str, Any], batch: int | None) -> dict[str, Any]:
        if batch is None or batch == self.batch:
            return call
        return rows_of(call, [i % self.batch for i in range(batch)], self._calls[0], self.batch)

    def _half(self, call: dict[str, Any], which: int, batch: int) -> dict[str, Any]:
        rows = list(range(which * batch // 2, (which + 1) * batch // 2))
        return rows_of(call, rows, self._calls[0], self.batch)

    # ---- what it can do, tried once

    def _output(self, **options: Any) -> list[Tensor] | None:
        try:
            with torch.no_grad():
                return [t.clone() for t in tensors(self.twin(**self.call(0, 0, [0.0], **options)))]
        except Exception:  # whatever a model of diffusers says to such a call, it is none
            return None

    def _runs(self, how: Callable[[dict[str, Any]], dict[str, Any]]) -> bool:
        call = self.call(0, 0, [0.0])
        try:
            shaped = how(call)
            with torch.no_grad():
                out, plain = ([*tensors(self.twin(**each))] for each in (shaped, self.call(0, 0, [0.0])))
        except Exception:
            return False
        if [t.shape[:1] for t in out] != [t.shape[:1] for t in plain]:  # it took a part of a picture for a picture
            return False
        return how is as_it_is or [t.shape for t in tensors_of(shaped)] != [
            t.shape for t in tensors_of(self.call(0, 0, [0.0]))
        ]

    def _is_batched(self) -> bool:
        """Whether rows of a batch of 4 are what halves and singles of it are, alone."""
        whole, half, other = self._output(batch=4), self._output(batch=4, half=1), self._output(batch=3)
        if whole is None or half is None or other is None:
            return False
        return all(
            b.shape[:1] == (2,) and len(a) == 4 and len(c) == 3 and _near(a[2:], b)
            for a, b, c in zip(whole, half, other, strict=True)
        )

    # ---- back to where it was

    def restore(self) -> None:
        """The weights it began with."""
        if self.dirty:
            raise ValueError("expected a model without added layers: make another one")
        for model, state in zip((self.model, self.twin), self._originals):
            _put_back(model, state)


def _state(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter, Tensor]]:
    return [
        (module, name, parameter, parameter.detach().clone())
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _put_back(model: nn.Module, state: list[tuple[nn.Module, str, nn.Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for module, name, parameter, value in state:
            if module._parameters[name] is not parameter:
                module._parameters[name] = parameter
            parameter.data.copy_(value)


def _only(found: set[int]) -> int | None:
    return found.pop() if len(found) == 1 else None


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.double() - b.double()).abs().max() <= 1e-2 * b.double().abs().max())
