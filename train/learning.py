"""Compiled models whose reused values are differentiable functions of weights: what learning puts into a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from harmonica_rt.branch_engine import BranchEngine, BranchRun
from harmonica_rt.compiled import CompiledTransformer
from harmonica_rt.cuda_graphs import Recorder
from harmonica_rt.forecast import forecast
from harmonica_rt.forward_engine import ForwardCall, ForwardEngine, ForwardRun
from harmonica_rt.forward_plan import ForwardPlan
from harmonica_rt.kept_streams import is_stream
from harmonica_rt.lowering import lower_forward
from harmonica_rt.models.base import Inputs, Shape
from harmonica_rt.schedule import Schedule
from harmonica_rt.steered_forward import copied_tensors

from .contexts import NumbersOf
from .denoiser import Denoiser
from .reuse import Numbers, combined, fixed
from .reusing import Branches, Kept, carried


@dataclass(frozen=True)
class Learning:
    """What a run stands on: a schedule entered at some step, and its numbers from there on."""

    schedule: Schedule
    numbers: Numbers
    checkpointing: str

    def call(self, step: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`step`(), of whose activations nothing is kept where that is wanted."""
        if self.checkpointing != "none" and torch.is_grad_enabled():
            return checkpoint(step, use_reentrant=False)
        return step()

    def block(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """What runs a block, of whose activations nothing is kept where that is wanted."""
        if self.checkpointing == "blocks" and torch.is_grad_enabled():
            return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        return run


class LearningEngine:
    """What both engines have in common: numbers to be set before each run.

    Attributes:
        numbers: of each context; the schedule's own unless set.
        checkpointing: one of `CHECKPOINTS`; what is not kept is recomputed in the backward pass.
        carries: find the streams before groups, which a carry that is learned needs, even where it is 0 at first.
    """

    gradients = True
    numbers: NumbersOf | None = None
    checkpointing = "none"
    carries = False

    def learning(self, schedule: Schedule, start: int, context: Hashable, device: torch.device) -> Learning:
        own = schedule.starting_at(start)
        numbers = fixed(schedule, device) if self.numbers is None else self.numbers(context)
        if start:
            unlearned = forecast(own.compute.reshape(own.steps, -1), own.order, own.positions)
            numbers = numbers.starting_at(start, torch.tensor(unlearned, dtype=torch.float32, device=device))
        return Learning(own, numbers, self.checkpointing)


class LearningForwardRun(ForwardRun):
    """A run through the model's own forward, its values kept as they are."""

    def __init__(self, plan: ForwardPlan, start: int, engine: ForwardEngine, learning: Learning) -> None:
        super().__init__(plan, start, engine)
        self.learning = learning
        self.values: dict[int, tuple[list[Tensor], ...]] = dict.fromkeys(plan.entries, ())  # newest first
        self.befores: dict[int, tuple[list[Tensor], ...]] = dict.fromkeys(plan.entries, ())
        self.outputs: tuple[list[Tensor], ...] = ()
        self.rest: tuple[list[Any], Any] = ([], None)  # the output's tree, None for its streams

    @property
    def newest(self) -> list[Tensor]:
        """What the call computed last keeps for later ones."""
        kept = (*self.values.values(), *self.befores.values(), self.outputs)
        return [t for values in kept for t in (values[0] if values else ())]

    def step(self, step: int, call: ForwardCall, timestep: float | None, known: tuple[float, ...] | None) -> Any:
        now, schedule = step - self.start, self.learning.schedule
        if schedule.output[now]:
            return self._reuse_output(now)
        if not self.plan.learned and not schedule.compute[now:].all():
            with torch.no_grad():
                self.plan.observe(copied_tensors((call.args, call.kwargs)))
        values, befores = dict(self.values), dict(self.befores)
        flat = self.learning.call(lambda: self._forward(now, (call.args, call.kwargs), values, befores))
        return self._keep(now, list(flat))

    def _forward(
        self,
        step: int,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        values: dict[int, tuple[list[Tensor], ...]],
        befores: dict[int, tuple[list[Tensor], ...]],
    ) -> tuple[Tensor, ...]:
        """The output's streams, and of each computed entry the streams after and before it."""
        schedule, numbers, entries = self.learning.schedule, self.learning.numbers, self.plan.entries
        computed = schedule.compute.reshape(schedule.steps, -1)[step]
        after: dict[int, list[Any]] = {e: [None] * len(entry.kept) for e, entry in entries.items() if computed[e]}
        before: dict[int, list[Tensor]] = {}

        def handle(number: int, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            entry, which = entries[number], entries[number].done
            if which == 0 and entry.carries:
                before[number] = entry.before(args, kwargs)
            if not computed[number]:
                return entry.stand_in(args, kwargs, lambda stream: reused(number, stream))
            result = entry.compute(None, self.learning.block(run), args, kwargs)
            leaves = tree_flatten(result)[0]
            for stream, (call, leaf) in enumerate(entry.kept):
                if call == which:
                    after[number][stream] = leaves[leaf].clone()  # the model may write into its own
            return result

        def reused(number: int, stream: int) -> Tensor:
            own = tuple(streams[stream] for streams in values[number])
            old = tuple(streams[stream] for streams in befores[number])
            now = before[number][stream] if number in before else None
            return carried(numbers, step, number, own, old, now)

        output = self.plan.forward(arguments, handle)
        leaves, spec = tree_flatten(output)
        self.rest = [None if is_stream(t) else t for t in leaves], spec
        fresh = [t for e in after for t in (*after[e], *before.get(e, ()))]
        return (*(t for t in leaves if is_stream(t)), *fresh)

    def _keep(self, step: int, flat: list[Tensor]) -> Any:
        schedule, keep = self.learning.schedule, self.learning.schedule.order + 1
        streams = [flat.pop(0) for leaf in self.rest[0] if leaf is None]
        for number, entry in self.plan.entries.items():
            if schedule.compute.reshape(schedule.steps, -1)[step, number]:
                fresh = [flat.pop(0) for _ in entry.kept]
                self.values[number] = (fresh, *self.values[number])[:keep]
                if entry.carries:
                    fresh = [flat.pop(0) for _ in entry.sources]
                    self.befores[number] = (fresh, *self.befores[number])[:keep]
        if schedule.output.any():
            self.outputs = (streams, *self.outputs)[:keep]
        return self._whole(streams)

    def _reuse_output(self, step: int) -> Any:
        rows, listed = self.learning.numbers.output_rows(step), self.plan.shape.listed
        streams = []
        for values in zip(*self.outputs):
            axis = -1 if values[0].ndim < 4 else 0 if listed else 1
            streams.append(combined(values, rows, axis))
        return self._whole(streams)

    def _whole(self, streams: list[Tensor]) -> Any:
        leaves, spec = self.rest
        own = iter(streams)
        return tree_unflatten([next(own) if leaf is None else leaf for leaf in leaves], spec)


class ForwardLearning(LearningEngine, ForwardEngine):
    """Levels blocks and output."""

    def __init__(
        self, model: nn.Module, backend: str, capacity: int, recorder: Callable[[torch.device], Recorder]
    ) -> None:
        super().__init__(model, "eager", capacity, recorder)

    def begin(self, call: ForwardCall, schedule: Schedule, start: int, context: Hashable) -> LearningForwardRun:
        self._check_model()
        program = lower_forward(schedule.starting_at(start))
        if self.carries:
            program = replace(program, carries=(True,) * len(program.carries))
        key = (context, call.shape, start)
        plan = self.plan(key, lambda: ForwardPlan(self.model, program, self._groups(schedule), call.shape))
        return LearningForwardRun(plan, start, self, self.learning(schedule, start, context, call.device))

    def halves(self, was: Any, call: ForwardCall) -> bool:
        return False  # what is learned with guidance is learned with it at all steps


@dataclass(frozen=True)
class BranchPlan:
    """A bound model and the shape of its calls."""

    shape: Shape
    denoiser: Denoiser
    split: int

    def release(self) -> None:
        """Nothing is held."""


class LearningBranchRun(BranchRun):
    """A run branch by branch, its values kept as they are."""

    def __init__(self, plan: BranchPlan, start: int, adapter: Any, learning: Learning) -> None:
        super().__init__(plan, start)  # type: ignore[arg-type]  # it stands in for a plan
        self.adapter, self.learning, self.held = adapter, learning, None
        self.kept = Kept(((),) * learning.schedule.compute.reshape(learning.schedule.steps, -1).shape[1])
        self.outputs: tuple[Tensor, ...] = ()

    @property
    def newest(self) -> list[Tensor]:
        """As of a run through the model's own forward."""
        return [values[0] for values in (*self.kept.entries, self.kept.befores, self.outputs) if values]

    def shape_of(self, call: Inputs) -> Shape:
        context = self.adapter.context_tokens(call.conditioning)
        return Shape(tuple(call.sample.shape), call.sample.dtype, call.sample.device, context)

    def step(self, step: int, call: Inputs, timestep: float | None, known: tuple[float, ...] | None) -> Any:
        now, schedule, denoiser = step - self.start, self.learning.schedule, self.plan.denoiser
        if schedule.output[now]:
            output = combined(self.outputs, self.learning.numbers.output_rows(now), self.adapter.channel_dim)
        else:
            if self.held is None:
                self.held = denoiser.encode(call.conditioning, call.sample)
            rows = denoiser.modulation(call.timestep.narrow(0, 0, 1), call.conditioning, call.sample.dtype)[0]
            branches = Branches(schedule, now, self.learning.numbers, self.kept)
            output, *fresh = self.learning.call(lambda: self._forward(call.sample, rows, branches))
            self.kept = branches.keep(fresh, schedule.order)
            self.outputs = (output, *self.outputs)[: schedule.order + 1]
        return self.adapter.output(output) if call.return_dict else (output,)

    def _forward(self, sample: Tensor, rows: Tensor, branches: Branches) -> tuple[Tensor, ...]:
        branches.fresh = []
        output = self.plan.denoiser(sample, rows, branches, self.held, branches.trunk, self.plan.split)
        return (output, *branches.fresh)


class BranchLearning(LearningEngine, BranchEngine):
    """Level branches, of any model that has an adapter."""

    def begin(self, call: Inputs, schedule: Schedule, start: int, context: Hashable) -> LearningBranchRun:
        plan = super().begin(call, schedule, start, context).plan
        plan.denoiser.checkpointing = self.checkpointing == "blocks"
        return LearningBranchRun(plan, start, self.adapter, self.learning(schedule, start, context, call.device))

    def halves(self, was: Any, call: Inputs) -> bool:
        return False

    def _make_plan(self, program: Any, shape: Shape, call: Inputs) -> BranchPlan:  # type: ignore[override]
        assert self._bound is not None, "begin binds the model"
        return BranchPlan(shape, Denoiser(*self._bound), self.adapter.stream(shape)[0])


class LearningTransformer(CompiledTransformer):
    """A compiled model of which gradients reach the weights of reuse, and the sample. Its parameters get none."""

    _engines: ClassVar = {"branches": BranchLearning, "blocks": ForwardLearning, "output": ForwardLearning}

    def __init__(self, model: nn.Module, schedule: Any, *, carries: bool = False, **more: Any) -> None:
        super().__init__(model, schedule, backend="eager", plans=4, **more)
        self._learning.carries = carries

    @property
    def _learning(self) -> LearningEngine:
        assert isinstance(self._engine, LearningEngine)
        return self._engine

    def stand_on(self, numbers: NumbersOf, checkpointing: str) -> None:
        """Have runs that begin from now on reuse by `numbers`."""
        self._learning.numbers, self._learning.checkpointing = numbers, checkpointing
