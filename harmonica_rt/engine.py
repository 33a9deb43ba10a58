"""What runs the calls of a compiled model, whatever its level: the interface `CompiledTransformer` speaks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .calling import Seen
from .compiled_blocks import CompiledBlocks
from .cuda_graphs import CudaRecorder, Recorder
from .schedule import Schedule


class Call(Protocol):
    """A forward call's arguments, read.

    Attributes:
        samples: what is denoised: one tensor, or several.
        timestep: a tensor, a number, or None where the model is told none.
        conditioning: what else the output depends on.
        batch: how many are denoised together.
        device: of the sample.
    """

    samples: tuple[Tensor, ...]
    timestep: Tensor | float | None
    conditioning: tuple[Tensor, ...]
    batch: int
    device: torch.device


class Plan(Protocol):
    """A program on the buffers of one shape."""

    shape: Any
    seconds: float

    def release(self) -> None: ...


class Run(ABC):
    """A run under way in one context: where it entered, and its plan."""

    def __init__(self, plan: Any, start: int) -> None:
        self.plan, self.start, self.next = plan, start, start
        self.conditioned = self.before = Seen(())  # what the last call was conditioned on, and the one before

    @abstractmethod
    def step(self, step: int, call: Any, timestep: float | None, known: tuple[float, ...] | None) -> Any:
        """What the model's forward returns at `step`.

        Args:
            timestep: the call's, or None where reading it would mean waiting for a device.
            known: the run's timesteps, where they are known to be right.
        """

    @abstractmethod
    def shape_of(self, call: Any) -> Any:
        """What a plan for `call` must be made for: the run's plan's `shape`, or the call does not fit."""


class Engine(ABC):
    """Runs a model at one level of schedule.

    Attributes:
        plans: by context, shape, step of entry, the least recently used first.
        fallback: why backend ``"auto"`` did not take its first choice, or None.
        compiled: the model's own blocks, compiled, where the backend does that.
    """

    runs_forward: ClassVar[bool]  # the model's own, and so the hooks on it
    gradients: ClassVar[bool] = False  # whether what it returns has any

    def __init__(
        self, model: nn.Module, backend: str, capacity: int, recorder: Callable[[torch.device], Recorder] = CudaRecorder
    ) -> None:
        self.model, self.backend, self.capacity, self.recorder = model, backend, capacity, recorder
        self.plans: OrderedDict[tuple[Hashable, Any, int], Any] = OrderedDict()
        self.fallback: str | None = None
        self.compiled: CompiledBlocks | None = None

    @abstractmethod
    def check(self, schedule: Schedule) -> None:
        """Raise TypeError or ValueError unless `schedule` fits the model and the model can be run so."""

    @abstractmethod
    def read(self, arguments: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A `Call`. Raises TypeError or ValueError on what cannot be expressed.

        Args:
            arguments: all of the forward's, by name.
            args, kwargs: as they came.
        """

    @abstractmethod
    def begin(self, call: Any, schedule: Schedule, start: int, context: Hashable) -> Run:
        """A run of `schedule` that enters at step `start`. Looks at the model anew: weights may have moved."""

    def narrowed(self, run: Run, call: Any, context: Hashable) -> Run | None:
        """`run` for half of its batch, if `call` is for that: where guidance ends midway. None if it is not."""
        if not self.halves(run.plan.shape, call):
            return None
        number = half_kept(run.conditioned.tensors, call.conditioning, call.batch)
        return None if number is None else self.half_run(run, call, number, context)

    @abstractmethod
    def halves(self, was: Any, call: Any) -> bool:
        """Whether `call` is for half of the samples of a plan for `was`, and the same otherwise."""

    @abstractmethod
    def half_run(self, run: Any, call: Any, number: int, context: Hashable) -> Run:
        """`run` for half `number` of its batch, with the values it holds."""

    def loop(
        self, call: Any, schedule: Schedule, timesteps: Tensor, scheduler: Any, guidance_scale: float
    ) -> Any | None:
        """The whole trajectory that begins with `call` as one graph to run, or None where there is none."""
        return None

    def plan(self, key: tuple[Hashable, Any, int], make: Callable[[], Any]) -> Any:
        """The plan of `key`, made if there is none; the context's least recently used beyond the capacity goes."""
        if key not in self.plans:
            self.plans[key] = make()
        self.plans.move_to_end(key)
        own = [k for k in self.plans if k[0] == key[0]]
        for oldest in own[: max(0, len(own) - self.capacity)]:
            self.plans.pop(oldest).release()
        return self.plans[key]

    def free_plans(self) -> None:
        while self.plans:
            self.plans.popitem()[1].release()


def half_kept(were: tuple[Tensor, ...], are: tuple[Tensor, ...], batch: int) -> int | None:
    """Which half of what a call of 2 `batch` samples was conditioned on a call of `batch` samples has.

    None if it has neither, or both: nothing then tells which samples go on.

    Reads the values: once a run at most, the host waits for the device.

    Args:
        were, are: tensors over the batch and others, or each argument's lists of a tensor a sample, one after another.
    """
    listed = len(were) == 2 * len(are) and len(are) % batch == 0
    if not listed and (len(were) != len(are) or not any(t.ndim and len(t) == 2 * batch for t in were)):
        return None
    kept = []
    for number in (0, 1):
        halves = [t.chunk(2)[number] if t.ndim and len(t) == 2 * batch else t for t in were]
        if listed:
            halves = [t for i, t in enumerate(were) if i // batch % 2 == number]
        if all(a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(halves, are)):
            kept.append(number)
    return kept[0] if len(kept) == 1 else None
