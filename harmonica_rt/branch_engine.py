"""Level branches: a schedule's Program on an adapter's description of the model."""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .cuda_graphs import CaptureFailed, Recorder
from .engine import Engine, Run
from .executor import Plan
from .forward_graphs import state_of
from .inspection import Snapshot, check_model, shape_of
from .kernels.inductor import CompilerMissing
from .loop import LoopGraph
from .lowering import lower
from .models import Adapter, adapt, adapt_at_branches
from .models.base import Inputs, Shape
from .models.branch import Branch, Norm
from .program import Program
from .schedule import Schedule


class BranchRun(Run):
    """A run, and what its modulation rows and text were last filled for."""

    def __init__(self, plan: Plan, start: int) -> None:
        super().__init__(plan, start)
        self.filled: dict[int, float | None] = {}
        self.conditioning: tuple[Tensor, ...] = ()  # the caller's tensors
        self.versions: tuple[int | None, ...] = ()
        self.copies: tuple[Tensor, ...] = ()
        self._told: tuple[Any, ...] = ()  # timesteps, and what calls have for them: see `_coming`

    def shape_of(self, call: Inputs) -> Shape:
        return shape_of(self.plan.adapter, call)

    def step(self, step: int, call: Inputs, timestep: float | None, known: tuple[float, ...] | None) -> Any:
        self._condition(call, step, timestep, known)
        output = self.plan.run(step - self.start, call.sample)
        return self.plan.adapter.output(output) if call.return_dict else (output,)

    def _condition(self, call: Inputs, step: int, timestep: float | None, known: tuple[float, ...] | None) -> None:
        """Have filled what cross-attention reads, and the modulation rows of `step` and of those ahead, if known."""
        current = call.conditioning
        versions: tuple[int | None, ...] = ()
        if timestep is not None:  # host tensors: look at the values
            same = len(self.copies) == len(current) and all(map(torch.equal, self.copies, current))
        else:
            versions = tuple(None if t.is_inference() else t._version for t in current)
            same = (
                None not in versions
                and versions == self.versions
                and all(map(operator.is_, self.conditioning, current))
            )
        if not same:
            self.plan.encode(current)
        coming = [] if known is None else self._coming(known, step, timestep, call.timestep.dtype)
        expected = timestep if timestep is not None or not coming else coming[0]
        if same and expected is not None and self.filled.get(step) == expected:
            return
        self.filled.clear()
        index, window = step - self.start, self.plan.window
        # Unread labels may be new at each call, and then steps ahead would be filled in vain
        ahead = timestep is not None or same or not self.copies
        timesteps = call.timestep.narrow(0, 0, 1)
        if ahead and coming:
            count = min(window - index % window, len(self.plan.program.steps) - index)
            timesteps = torch.tensor(coming[:count], dtype=timesteps.dtype, device=timesteps.device)
            self.filled.update(zip(range(step, step + count), coming))
        self.plan.modulate(index, timesteps, current)
        self.conditioning, self.versions, self.copies = current, versions, tuple(t.clone() for t in current)

    def _coming(self, known: tuple[float, ...], step: int, timestep: float | None, dtype: torch.dtype) -> list[float]:
        """What the calls from `step` on will have for timesteps, if `known` tells.

        Args:
            known: the sampler's, or the model's own in a loop that is not a pipeline's.
            timestep: this call's, unless it is not read: then there is a pipeline.
        """
        if not self._told or self._told[0] is not known or self._told[1] != dtype:  # the same at every step
            empty = torch.empty(0, dtype=dtype)
            both = (self.plan.adapter.timesteps(known, empty), torch.tensor(known, dtype=dtype))
            self._told = (known, dtype, [told.tolist() for told in both])
        for told in self._told[2]:
            if timestep is None or told[step] == timestep:
                return told[step:]
        return []


class BranchEngine(Engine):
    """Plans on the weights where they lie; bound anew where they have moved."""

    runs_forward = False

    def __init__(
        self, model: nn.Module, backend: str, capacity: int, recorder: Callable[[torch.device], Recorder]
    ) -> None:
        super().__init__(model, backend, capacity, recorder)
        self._seen: Snapshot | None = None  # the model that was checked and bound
        self._kind: tuple[torch.dtype, torch.device] | None = None
        self._bound: tuple[Adapter, list[Branch], Norm] | None = None
        self._captured: tuple[Any, ...] | None = None  # what plans have baked in of the model's own calls

    def check(self, schedule: Schedule) -> None:
        adapter = adapt_at_branches(self.model)
        adapter.check_schedule(schedule)
        check_model(self.model, adapter.float32_parts)

    @property
    def adapter(self) -> Adapter:
        return self._bound[0] if self._bound is not None else adapt(self.model)

    def read(self, arguments: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        inputs = self.adapter.inputs(arguments)
        device = inputs.device
        if torch.is_autocast_enabled(device.type):
            raise RuntimeError(
                "autocast: expected it off, since a compiled program has one dtype; load the model in the dtype "
                "you want (torch_dtype=...)"
            )
        if inputs.timestep.device.type == "cpu" and len(values := set(inputs.timestep.tolist())) != 1:
            raise ValueError(f"timestep: expected the same for all samples, got {sorted(values)[:4]}")
        for t in (inputs.timestep, *inputs.conditioning):
            if t.device != device:
                raise ValueError(f"expected timestep and conditioning on the sample's device, {device}, got {t.device}")
        return inputs

    def begin(self, call: Inputs, schedule: Schedule, start: int, context: Hashable) -> BranchRun:
        seen = Snapshot.of(self.model)
        if seen == self._seen and self._kind is not None:
            adapter, kind = self.adapter, self._kind
        else:
            adapter = adapt_at_branches(self.model)
            kind = check_model(self.model, adapter.float32_parts)
        shape = shape_of(adapter, call)
        if (shape.dtype, shape.device) != kind:
            raise ValueError(
                f"expected a sample of the model's dtype and device, {kind[0]} on {kind[1]}, "
                f"got {shape.dtype} on {shape.device}"
            )
        adapter.stream(shape)  # whether such a sample fits
        if self._seen is None or seen.places != self._seen.places:
            self.free_plans()
            self._bound = (adapter, *adapter.bind())
            seen = Snapshot.of(self.model)  # binding may join tensors
        self._seen, self._kind = seen, kind
        if self._captured is not None and self._captured != state_of(self.model):
            self.free_plans()
            self._captured = None
        plan = self.plan(
            (context, shape, start), lambda: self._make_plan(lower(schedule.starting_at(start)), shape, call)
        )
        return BranchRun(plan, start)

    def halves(self, was: Shape, call: Inputs) -> bool:
        shape = shape_of(self.adapter, call)
        return was == replace(shape, sample=(2 * shape.batch, *shape.sample[1:]))

    def half_run(self, run: Any, call: Inputs, number: int, context: Hashable) -> BranchRun:
        old, shape = run.plan, run.shape_of(call)
        plan = self.plan((context, shape, run.start), lambda: self._make_plan(old.program, shape, call))
        for name in ("slots", "outputs"):
            kept = getattr(old.buffers, name).narrow(1, number * shape.batch, shape.batch)
            getattr(plan.buffers, name).copy_(kept)
        return BranchRun(plan, run.start)

    def loop(
        self, call: Inputs, schedule: Schedule, timesteps: Tensor, scheduler: Any, guidance_scale: float
    ) -> LoopGraph | None:
        plan = self.begin(call, schedule, 0, 0).plan
        if plan.graphs is None or plan.window < len(timesteps):  # modulation rows for all steps, or none
            return None
        plan.encode(call.conditioning)
        plan.modulate(0, timesteps, call.conditioning)
        try:
            return plan.loop(scheduler, guidance_scale, len(call.sample) // (2 if guidance_scale > 1 else 1))
        except CaptureFailed as error:
            if self.backend != "auto":
                raise
            self.fallback = str(error)
            return None

    def _make_plan(self, program: Program, shape: Shape, call: Inputs) -> Plan:
        """A plan that will have calls such as `call`."""
        if self.backend != "auto":
            return self._plan(program, shape, self.backend, call)
        first = "cudagraph" if shape.device.type == "cuda" else "inductor"
        try:
            plan = self._plan(program, shape, first, call)
        except (CompilerMissing, CaptureFailed) as error:
            if self.fallback is None:
                warnings.warn(f"harmonica_rt runs its eager backend, not {first}: {error}", stacklevel=7)
            self.fallback = str(error)
            return self._plan(program, shape, "eager", call)
        if plan.graphs is not None and not plan.measure():
            plan.release_graphs()
        return plan

    def _plan(self, program: Program, shape: Shape, backend: str, call: Inputs) -> Plan:
        assert self._bound is not None, "a run binds the model as it begins"
        plan = Plan(*self._bound, program, shape, backend)
        if backend == "cudagraph":
            self._capture(plan, call)
        if plan.ops.bakes and self._captured is None:
            self._captured = state_of(self.model)  # else plans made midway would hide that others are older
        return plan

    def _capture(self, plan: Plan, call: Inputs) -> None:
        plan.capture(self.recorder(plan.shape.device))
        started = time.perf_counter()
        try:  # these are captured too, so that what a card refuses is known before the first step
            plan.encode(call.conditioning)
            plan.modulate(0, call.timestep.narrow(0, 0, 1), call.conditioning)
        except Exception:
            plan.release()
            raise
        plan.seconds += time.perf_counter() - started
