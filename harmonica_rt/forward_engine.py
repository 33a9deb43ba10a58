"""Levels blocks and output: the model's own forward, with groups of its blocks or the whole of it reused."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .compiled_blocks import CompiledBlocks
from .cuda_graphs import CaptureFailed, Recorder
from .engine import Engine, Run
from .forward_plan import ForwardPlan
from .inspection import check_eval, own_cache
from .kept_streams import ForwardChanged
from .layout import TRUNK, split_evenly
from .loop import LoopGraph
from .lowering import lower_forward
from .models import UnsupportedModelError
from .models.blocks import block_lists, class_name, no_blocks
from .schedule import Schedule

TIMESTEPS = (
    *("timestep", "t", "timesteps", "time", "timestep_img", "sigma", "decoder_noise_time", "timestep_ratio"),
    "vision_timesteps",
)

DENOISED = {  # argument that is denoised, where it is not the first
    "Cosmos3OmniTransformer": "vision_tokens",
    "T5FilmDecoder": "decoder_input_tokens",
}


def denoised(model: nn.Module) -> str:
    """The argument of its forward that is denoised."""
    return DENOISED.get(class_name(model)) or next(iter(inspect.signature(model.forward).parameters), "")


@dataclass(frozen=True, slots=True)
class CallShape:
    """What a plan of the model's own forward is made for: its tensors' shapes, and what else they must agree in."""

    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    device: torch.device
    return_dict: bool
    autocast: torch.dtype | None
    listed: bool = False  # samples are a list of single ones, not a batch

    def halves(self, was: CallShape) -> bool:
        """Whether this is `was` with half of its samples."""
        if replace(self, tensors=()) != replace(was, tensors=()) or self.tensors[0][0] != was.tensors[0][0]:
            return False
        if self.listed:
            name = self.tensors[0][0]
            mine, theirs = ([t for t in shape.tensors if t[0] == name] for shape in (self, was))
            return 2 * len(mine) == len(theirs)
        if len(self.tensors) != len(was.tensors):
            return False
        batch = was.tensors[0][1][:1]
        half = (batch[0] // 2,) if batch and batch[0] % 2 == 0 and batch[0] else None
        return half is not None and self.tensors == tuple(
            (name, half + shape[1:] if shape[:1] == batch else shape, dtype) for name, shape, dtype in was.tensors
        )

    def goes_on(self, other: CallShape) -> bool:
        """Whether `other` is the same but for arguments that one of them leaves out: ControlNet residuals, say."""
        if self == other:
            return True
        common = {name for name, *_ in self.tensors} & {name for name, *_ in other.tensors}
        own, theirs = (replace(s, tensors=tuple(t for t in s.tensors if t[0] in common)) for s in (self, other))
        return own == theirs

    def __str__(self) -> str:
        kinds = ", ".join(
            f"{name} {list(shape)} {str(dtype).removeprefix('torch.')}" for name, shape, dtype in self.tensors
        )
        return f"{kinds} on {self.device}"


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """A call of the model's own forward.

    Attributes:
        samples: tensors of the argument that is denoised.
        timestep: its timestep; None where it has no argument of such a name.
        conditioning: all other tensors among its arguments.
        batch: how many samples there are: of a tensor its first dimension, of a list its tensors.
        args, kwargs: as they came.
    """

    samples: tuple[Tensor, ...]
    timestep: Tensor | float | None
    conditioning: tuple[Tensor, ...]
    batch: int
    shape: CallShape
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.samples[0].device


class ForwardRun(Run):
    """A run through the model's own forward."""

    def __init__(self, plan: ForwardPlan, start: int, engine: ForwardEngine) -> None:
        super().__init__(plan, start)
        self.engine = engine

    def shape_of(self, call: ForwardCall) -> CallShape:
        return self.plan.shape if self.plan.shape.goes_on(call.shape) else call.shape

    def step(self, step: int, call: ForwardCall, timestep: float | None, known: tuple[float, ...] | None) -> Any:
        try:
            return self.plan.run(step - self.start, (call.args, call.kwargs))
        except ForwardChanged:
            if step != self.start:
                raise
            self.plan = self.engine.renewed(self.plan)  # between runs a forward may change: learn it anew
            return self.plan.run(0, (call.args, call.kwargs))
        except CaptureFailed as error:
            self.engine.give_up_graphs(self.plan, error)
            return self.plan.run(step - self.start, (call.args, call.kwargs))


class ForwardEngine(Engine):
    """Plans on the blocks as they are at the start of a run: LoRA layers, quantised weights, hooks are within."""

    runs_forward = True

    def __init__(
        self, model: nn.Module, backend: str, capacity: int, recorder: Callable[[torch.device], Recorder]
    ) -> None:
        super().__init__(model, backend, capacity, recorder)
        self.compiled = CompiledBlocks(model) if backend == "inductor" else None
        self._first = denoised(model)

    def check(self, schedule: Schedule) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(self.model).__name__}")
        name = class_name(self.model)
        if self.backend == "inductor" and not block_lists(self.model):
            raise ValueError(
                f"backend: expected 'auto', 'eager' or 'cudagraph' for {name}, got 'inductor', which compiles blocks: "
                "it has no lists of them; torch.compile of the model itself goes with 'eager'"
            )
        if schedule.model != name:
            raise ValueError(f"schedule does not fit the model: model expected {name}, got {schedule.model}")
        if schedule.level == "blocks":
            blocks = {name: len(blocks) for name, blocks in block_lists(self.model).items()}
            groups = {group.name: group.layers for group in schedule.groups}
            if not blocks:
                raise UnsupportedModelError(f"{no_blocks(self.model)}: level 'output' takes it, level 'blocks' not")
            if not _is_trunk(schedule) and (
                groups.keys() != blocks.keys() or any(groups[n] > blocks[n] for n in blocks)
            ):
                raise ValueError(
                    f"schedule does not fit the model: groups of {groups}, but {name}'s lists have blocks {blocks}"
                )
        self._check_model()

    def read(self, arguments: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardCall:
        first = self._first if self._first in arguments else next(iter(arguments))
        sample = tuple(_tensors(arguments[first]))
        if not sample:
            raise TypeError(f"{first}: expected tensors, got {type(arguments[first]).__name__}")
        timestep = next((arguments[name] for name in TIMESTEPS if arguments.get(name) is not None), None)
        others = [(n, value) for n, value in sorted(arguments.items()) if n != first and value is not timestep]
        rest = [(name, t) for name, value in others for t in _tensors(value)]
        kinds = [(first, tuple(t.shape), t.dtype) for t in sample]
        kinds += [(name, tuple(t.shape), t.dtype) for name, t in rest if t.ndim >= 3]
        device = sample[0].device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        listed = arguments[first] is not sample[0] or not sample[0].ndim
        shape = CallShape(tuple(kinds), device, bool(arguments.get("return_dict", True)), autocast, listed)
        batch = len(sample) if listed else len(sample[0])
        return ForwardCall(sample, timestep, tuple(t for _, t in rest), batch, shape, args, kwargs)

    def begin(self, call: ForwardCall, schedule: Schedule, start: int, context: Hashable) -> ForwardRun:
        self._check_model()
        if self.compiled is not None:
            self.compiled.follow(call.device)
        key, groups = (context, call.shape, start), self._groups(schedule)
        if (plan := self.plans.get(key)) is not None and plan.groups != groups:  # blocks were replaced
            self.plans.pop(key).release()
        program = lower_forward(schedule.starting_at(start))
        plan = self.plan(
            key, lambda: self._captured(ForwardPlan(self.model, program, groups, call.shape, self.compiled))
        )
        if plan.graphs is not None:
            plan.graphs.follow(self.model)
        return ForwardRun(plan, start, self)

    def _captured(self, plan: ForwardPlan) -> ForwardPlan:
        """`plan`, replaying graphs if the backend does."""
        on_cuda = plan.shape.device.type == "cuda"
        if self.backend == "cudagraph" or (self.backend == "auto" and on_cuda and self.fallback is None):
            plan.capture(self.recorder(plan.shape.device))
        return plan

    def give_up_graphs(self, plan: ForwardPlan, error: CaptureFailed) -> None:
        """Launch plainly from now on, where the backend leaves it open."""
        if self.backend != "auto":
            raise error
        if self.fallback is None:
            warnings.warn(f"harmonica_rt runs its eager backend, not cudagraph: {error}", stacklevel=7)
        self.fallback = str(error)
        plan.release()

    def renewed(self, plan: ForwardPlan) -> ForwardPlan:
        """A plan for the same, which has learned nothing yet."""
        key = next(key for key, each in self.plans.items() if each is plan)
        plan.release()
        self.plans[key] = self._captured(ForwardPlan(self.model, plan.program, plan.groups, plan.shape, self.compiled))
        return self.plans[key]

    def halves(self, was: CallShape, call: ForwardCall) -> bool:
        return call.shape.halves(was)

    def half_run(self, run: Any, call: ForwardCall, number: int, context: Hashable) -> ForwardRun:
        key, batch = (context, call.shape, run.start), 2 * call.batch
        if (stale := self.plans.pop(key, None)) is not None:
            stale.release()
        plan = self.plan(key, lambda: self._captured(run.plan.half(number, batch, call.shape)))
        return ForwardRun(plan, run.start, self)

    def loop(
        self, call: ForwardCall, schedule: Schedule, timesteps: Tensor, scheduler: Any, guidance_scale: float
    ) -> LoopGraph | None:
        plan, images = self.begin(call, schedule, 0, 0).plan, call.batch // (2 if guidance_scale > 1 else 1)
        if plan.graphs is None:
            return None
        options = (call.args, call.kwargs), timesteps, scheduler, guidance_scale, images
        try:
            try:
                return plan.loop(*options)
            except ForwardChanged:  # between runs a forward may change: learn it anew
                plan = self.renewed(plan)
                return plan.loop(*options)
        except CaptureFailed as error:
            self.give_up_graphs(plan, error)
            return None

    def _groups(self, schedule: Schedule) -> list[tuple[str, list[nn.Module]]]:
        """Name and blocks of every entry."""
        if schedule.level == "output":
            return []
        lists = block_lists(self.model)
        if _is_trunk(schedule):
            return [(TRUNK, [block for blocks in lists.values() for block in blocks])]
        return [
            (f"{group.name}.{part.start}-{part.stop - 1}", [lists[group.name][i] for i in part])
            for group in schedule.groups
            for part in split_evenly(len(lists[group.name]), group.layers)
        ]

    def _check_model(self) -> None:
        if (cache := own_cache(self.model)) is not None:
            raise UnsupportedModelError(
                f"expected a model without a cache of its own, got one with {cache}: take that off first "
                "(disable_cache)"
            )
        check_eval(self.model)


def _is_trunk(schedule: Schedule) -> bool:
    return schedule.groups[0].name == TRUNK


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
