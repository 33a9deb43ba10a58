"""A model whose calls run a schedule's program, behind its own forward."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .branch_engine import BranchEngine
from .calling import Exclusive, ForwardSignature, Seen, without_gradients
from .cuda_graphs import CudaRecorder, Recorder
from .engine import Engine, Run
from .face import ModelFace
from .forward_engine import ForwardEngine
from .inspection import Snapshot, read_timestep, refuse_gradient
from .loop import copied, trajectory
from .models import no_finer
from .report import Report, describe_plan
from .sampling import Sampling
from .schedule import Schedule
from .tracking import Place

_CONFUSED = (
    "calls of a step without names: expected {} as in the step before, got {}; tell them apart by "
    "cache_context(name), or condition each alike at all steps; the same run once more, after one that ended at its "
    "first step, begins with reset()"
)


class _Named(NamedTuple):
    """A context that was entered: its name, and step and sigma if told."""

    name: str | None
    step: int | None
    sigma: Any


ENGINES: dict[str, type[Engine]] = {"branches": BranchEngine, "blocks": ForwardEngine, "output": ForwardEngine}
Schedules = Schedule | Mapping[str, Schedule]


class CompiledTransformer(ModelFace):
    """Same forward, config, dtype, device, parameters and state_dict as `model`, which stays usable on its own.

    Calls must come in the order of the sampler's steps. On a CPU each call's timestep is read and checked; elsewhere
    calls are counted, and `reset()` starts a run (a pipeline's scheduler does so by itself). The calls a sampler makes
    within a step are told apart by `cache_context`, or by their order: each context has values of its own.

    `compile` makes it and `uncompile` takes it back.

    Attributes:
        model: the model itself.
        schedule: its schedule, or one a context.
        backend: as it was asked for.
    """

    _recorder: Callable[[torch.device], Recorder] = CudaRecorder
    _engines: ClassVar[Mapping[str, type[Engine]]] = ENGINES  # by level

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedules,
        *,
        backend: str,
        plans: int,
        strict: bool = False,
        sampling: Sampling | None = None,
    ) -> None:
        schedules = [*schedule.values()] if isinstance(schedule, Mapping) else [schedule]
        own = weakref.ref(self)

        def recorder(device: torch.device) -> Recorder:
            compiled = own()
            assert compiled is not None, "its engine goes with it"
            return compiled._recorder(device)

        engine = self._engines[schedules[0].level](model, backend, plans, recorder)
        for each in schedules:
            engine.check(each)
        ModelFace.__init__(self, model)
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "backend", backend)
        self._engine = engine
        self._options: dict[str, Any] = {"backend": backend, "plans": plans, "strict": strict}
        self._sampling = Sampling(schedules, strict, None) if sampling is None else sampling
        self._signature = ForwardSignature(model)
        self._runs: dict[Hashable, Run] = {}  # by context
        self._begun = self._sampling.runs  # the sampler's run that these belong to
        self._named: list[_Named] = []  # contexts entered, the call's last
        self._unsure = False  # whether order alone told the last call's context from others
        self._exclusive = Exclusive()

    # ---- the model's own face

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledTransformer:
        model, pipeline = copy.deepcopy((self.model, self._sampling.pipeline()), memo)
        sampling = Sampling(self._sampling.schedules, self._sampling.strict, pipeline)
        return CompiledTransformer(model, self.schedule, **self._options, sampling=sampling)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._sampling.abandon()  # cached values belong to the weights that made them
        return self.model.load_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledTransformer:
        before = Snapshot.of(self.model).places
        self.model._apply(fn, recurse)
        if Snapshot.of(self.model).places != before:
            self._sampling.abandon()
        return self

    def __repr__(self) -> str:
        return f"CompiledTransformer({self.schedule!r}, backend={self.backend!r})"

    @property
    def _plans(self) -> Mapping[Any, Any]:
        return self._engine.plans

    def uncompile(self) -> nn.Module:
        """The original model; a pipeline this was compiled for gets it back. Frees all plans."""
        with self._exclusive:
            pipeline = self._sampling.pipeline()
            for name, component in vars(pipeline).items() if pipeline is not None else ():
                if component is self:
                    put(pipeline, name, self.model)
                    break
            self._sampling.end_run()
            self._runs.clear()
            self._engine.free_plans()
        self.share_hook(self.model)
        if "_hf_hook" in vars(self):
            del vars(self)["_hf_hook"], vars(self)["_old_forward"]
        return self.model

    def leave(self, pipeline: Any, successor: nn.Module) -> None:
        """`pipeline` gets `successor` in place of this, which another pipeline may still carry."""
        if (owner := self._sampling.pipeline()) is None or owner is pipeline:
            self.uncompile()
        else:
            self.share_hook(successor)

    def share_hook(self, successor: nn.Module) -> None:
        """Offloading goes on around `successor`."""
        if "_hf_hook" in vars(self):
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(successor, vars(self)["_hf_hook"])

    # ---- runs

    @contextlib.contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """Calls within are of context `name`, as diffusers' pipelines say it.

        Args:
            fields: where the run is: ``step_index`` tells the step, ``sigma`` stands in for a timestep not read.
        """
        if not isinstance(name, str):
            raise TypeError(f"cache_context: expected a name, got {name!r}")
        index = fields.get("step_index")
        if index is not None and (isinstance(index, bool) or not isinstance(index, int) or index < 0):
            raise TypeError(f"cache_context: expected a step_index from 0 on, got {index!r}")
        entered = _Named(name, index, fields.get("sigma"))
        self._named.append(entered)
        try:
            yield
        finally:
            self._named.remove(entered)

    def trajectory(self, noise: Tensor, scheduler: Any, guidance_scale: float = 1.0, **conditioning: Any) -> Tensor:
        """The whole sampling loop in one call; with the cudagraph backend one graph, one launch an image.

        For samplers whose update can be captured and loops without callbacks. What a pipeline does between two steps
        is Python that no graph can hold, so this is a call of its own.

        Args:
            noise: [images, channels, height, width], scaled as the scheduler wants it.
            scheduler: DDIM (eta 0) or DPM-Solver++ multistep, its timesteps set; it is copied, not changed.
            guidance_scale: classifier-free guidance; above 1 the samples are doubled, conditional ones first.
            conditioning: the forward's other arguments, for all samples (``class_labels``: 2 images with guidance).

        Returns:
            The sampler's result, shaped as `noise`: what stepping through `forward` gives.

        Raises:
            ValueError: a scheduler that draws noise, or timesteps that differ from the schedule's.
        """
        refuse_gradient(noise)
        tracker = self._sampling.tracker
        scheduler, before = copied(scheduler), tracker.timesteps
        timestep = scheduler.timesteps.to(noise.device)
        samples = len(noise) * (2 if guidance_scale > 1 else 1)

        def read(step: int, sample: Tensor) -> Any:
            now = timestep.narrow(0, step, 1).expand(samples)
            return self._read((sample,), {"timestep": now, **conditioning, "return_dict": False})

        with self._exclusive, without_gradients():
            self._sampling.follow(scheduler)
            try:
                first = read(0, torch.cat([noise, noise]) if guidance_scale > 1 else noise)
                loop = self._engine.loop(first, self._schedule_of(0), timestep, scheduler, guidance_scale)
                if loop is not None:
                    return loop.run(noise)
                return trajectory(lambda step, x: self._step(read(step, x))[0], scheduler, noise, guidance_scale)
            finally:
                self._sampling.end_run()
                tracker.timesteps = before

    def reset(self) -> None:
        """The next call starts a new run."""
        with self._exclusive:
            self._sampling.end_run()

    def report(self) -> Report:
        """Level, and what the plans made so far cost: slots, bytes, launches, MACs, compile time."""
        plans = tuple(describe_plan(plan, context, start) for (context, _, start), plan in self._plans.items())
        level = self._sampling.schedules[0].level
        compiled = None if self._engine.compiled is None else self._engine.compiled.report()
        finer, fallback = no_finer(self.model, level), self._engine.fallback
        return Report(repr(self.schedule), level, finer, fallback, plans, compiled)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            self.compile()
        # A pipeline offloads the model between its calls; the hook is on the model where that came first
        hook = vars(self).get("_hf_hook")
        if hook is None and not self._engine.runs_forward:
            hook = vars(self.model).get("_hf_hook")
        if hook is not None:
            args, kwargs = hook.pre_forward(self, *args, **kwargs)
        gradients = self._engine.gradients
        if torch.is_grad_enabled() and not gradients:
            refuse_gradient(*(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        with self._exclusive, contextlib.nullcontext() if gradients else without_gradients():
            call = self._read(args, kwargs)
            self._sampling.watch()
            output = self._step(call)
        return output if hook is None else hook.post_forward(self, output)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._engine.read(self._signature.bind(args, kwargs), args, kwargs)

    def _step(self, call: Any) -> Any:
        sampling, tracker = self._sampling, self._sampling.tracker
        name, told, sigma = self._named[-1] if self._named else _Named(None, None, None)
        timestep = read_timestep(call.timestep)
        if timestep is None and told is None:
            timestep = read_timestep(sigma)
        told = sampling.told() if told is None else told
        if name is not None:
            again = tracker.start is not None and name not in tracker.called
        else:  # calls that are counted are a step each
            again = timestep is not None and tracker.sample is not None
            same = again and tracker.sample == Seen(call.samples)
            same = same and timestep is not None and not tracker.may_repeat(timestep)
            again = again and (same or told == tracker.next - 1)
        try:
            place = tracker.locate(timestep, again=again, told=told)
        except RuntimeError as error:
            raise RuntimeError(f"{error}{sampling.owner()}") from None
        fresh = self._begun != sampling.runs or (place.step == place.start and not place.again)
        runs = {} if fresh else self._runs
        context = self._which(name, call, place, runs)
        run = runs.get(context)
        if run is None or run.next != place.step:
            run = self._engine.begin(call, self._schedule_of(context), place.step, context)
        elif (shape := run.shape_of(call)) != (was := run.plan.shape):
            run = self._engine.narrowed(run, call, context)
            if run is None:
                raise ValueError(f"the run under way has samples of {was}, got {shape}: call reset() to change")
        # A device's timestep is not read: only a pipeline's scheduler is then known to have told the right ones
        known = tracker.timesteps if timestep is not None or sampling.scheduler() is not None else None
        try:
            output = run.step(place.step, call, timestep, known)
        except BaseException:  # slots may be half written: what comes next must be a new run
            tracker.commit(place, timestep, context, Seen(call.samples))
            sampling.abandon()
            self._runs = {}
            raise
        run.next, run.before, run.conditioned = place.step + 1, run.conditioned, Seen(call.conditioning)
        self._runs, self._begun = {**runs, context: run}, sampling.runs
        tracker.commit(place, timestep, context, Seen(call.samples))  # once more: models write into what they are given
        return output

    def _which(self, name: str | None, call: Any, place: Place, runs: dict[Hashable, Run]) -> Hashable:
        """The context of a call: its name, or a number: the one conditioned alike, else in the first step's order.

        Raises:
            RuntimeError: calls that are conditioned anew at each step came in another order or number than before.
        """
        if name is not None:
            return name
        tracker = self._sampling.tracker
        numbers = sorted(k for k in runs if isinstance(k, int))
        called = tracker.called if place.again else []
        if not place.again and self._unsure and len(tracker.called) < len(numbers):
            raise RuntimeError(_CONFUSED.format(f"{len(numbers)} calls", len(tracker.called)))
        if len(numbers) == 1 and not place.again:  # nothing to choose from
            self._unsure = False
            return numbers[0]
        free = [number for number in numbers if number not in called]
        seen = Seen(call.conditioning)
        alike = {number: runs[number].conditioned.alike(seen) for number in free}
        best = max(alike.values(), default=0)
        if place.again and best < len(seen.tensors):
            for number in called:
                if isinstance(number, int) and runs[number].before == seen and runs[number].conditioned != seen:
                    raise RuntimeError(_CONFUSED.format(f"call {number} first", "another one before it"))
        likely = [number for number in free if alike[number] == best]
        self._unsure = len(numbers) > 1 and len(likely) > 1
        return (likely or [len(numbers)])[0]

    def _schedule_of(self, context: Hashable) -> Schedule:
        if isinstance(self.schedule, Schedule):
            return self.schedule
        if context not in self.schedule:
            got = f"{context!r}" if isinstance(context, str) else "a call outside of cache_context"
            raise ValueError(f"context: expected one of {tuple(self.schedule)}, which have schedules, got {got}")
        return self.schedule[context]


def put(pipeline: Any, name: str, component: Any) -> None:
    """Set a component past DiffusionPipeline.__setattr__, which would write its class into the saved config."""
    object.__setattr__(pipeline, name, component)
