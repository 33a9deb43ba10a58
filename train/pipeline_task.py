"""What a schedule is learned for on a person's own pipeline: prompts, latents, costs of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonica_rt.checks import may_carry
from harmonica_rt.compiled import Schedules
from harmonica_rt.generating import Generation
from harmonica_rt.layout import WHOLE
from harmonica_rt.models import layout_of
from harmonica_rt.models.blocks import block_lists
from harmonica_rt.models.refusals import NoCarryError
from harmonica_rt.resampling import falling
from harmonica_rt.schedule import Schedule

from .budget import Costs
from .contexts import ContextWeights, each
from .memory import Memory, available, count_step, nbytes, predict, samples_of, workspaces
from .sampled import Sampled
from .starts import Starts
from .weights import VALIDATION_SEED, WeightSettings

HELD_OUT_FROM = 8  # prompts
POWERS = (1.0, 0.8, 0.65)  # a flow's late steps matter more
MET = 0.99  # of a target: a model's ends run at every step, and half of the steps are to be 2x


class PipelineTask:
    """A pipeline with a call's arguments, and the level its schedule is learned at.

    Args:
        sampled: the pipeline, ready.
        generation: all prompts, and the call's arguments.
        level: ``"output"``, ``"blocks"``, ``"branches"``, or ``"auto"``: one group of blocks where there are blocks.
        groups: at level blocks, how many groups each list is split into.
        size: images a call.

    Attributes:
        steps: T, of the pipeline's scheduler.
        carry: whether carries are learned: at level blocks, where the streams after groups are those that go in.
        costs: MACs of a step; equal shares where they cannot be counted.
        width: channels of the streams; None at level output.
        contexts: that the calls of a step are of: their names, numbers where the pipeline names none.
        start: carry, and order of the forecast, that schedules have before anything is learned.
        held_out: starts of a verdict.
    """

    held_out = 64

    def __init__(
        self, sampled: Sampled, generation: Generation, level: str = "auto", groups: int = 1, size: int = 4
    ) -> None:
        self.sampled, self.generation, self.size = sampled, generation, size
        with generation.explained():
            sampled.probe(generation, 0)
        self.timesteps = sampled.timesteps()
        self.steps, self.device = len(self.timesteps), sampled.device
        denoiser = next(iter(sampled.denoisers.values()))
        if level == "auto":
            level = "blocks" if block_lists(denoiser) else "output"
        self.layout = layout_of(denoiser, level, groups)
        self.carry = level == "blocks"
        self.width: int | None = None
        self.start = (0.0, 0)
        self._values = 0  # bytes that a computed call keeps of an image
        self.costs = self._costs()
        held = generation.count // 4 if generation.count >= HELD_OUT_FROM else 0
        numbers = range(generation.count)
        self.judged_on, self.learned_on = (numbers[-held:], numbers[:-held]) if held else (numbers, numbers)

    @property
    def entered(self) -> tuple[int, ...]:
        """Steps at which another denoiser than the first goes on."""
        return tuple(sorted({*self.sampled.starts.values()} - {0}))

    def fields(self) -> dict[str, Any]:
        """What a `Schedule` for this task says of it."""
        return {
            "model": self.layout.model,
            "level": self.layout.level,
            **({"groups": self.layout.groups} if self.layout.groups else {}),
            "sampler": type(self.sampled.pipeline.scheduler).__name__,
            "timesteps": self.timesteps,
            "guidance_scale": self.generation.guidance,
        }

    def parameters(self) -> dict[str, Tensor]:
        """Of the denoisers, by name."""
        parts = self.sampled.denoisers.items()
        return {f"{part}.{name}": own for part, model in parts for name, own in model.named_parameters()}

    def asked(self) -> dict[str, Any]:
        """What images are to be, for whoever goes on."""
        asked = self.generation
        return {
            "pipeline": type(self.sampled.pipeline).__name__,
            "prompts": asked.subjects,
            "inputs": asked.images,
            "call": asked.call,
        }

    def named_contexts(self) -> tuple[str, ...]:
        """Those that can have schedules of their own.

        Raises:
            ValueError: there is one context, or the pipeline does not name them.
        """
        kind = type(self.sampled.pipeline).__name__
        if len(self.contexts) < 2:
            raise ValueError(
                f"contexts: expected 'shared' where {kind} calls its denoiser once a step (no guidance, or guidance in "
                "one batch), got 'own'"
            )
        if not all(isinstance(context, str) for context in self.contexts):
            raise ValueError(
                f"contexts: expected 'shared' for {kind}, which does not name all its {len(self.contexts)} calls of a "
                "step, got 'own': schedules go by names, which its loop can give: with "
                'self.transformer.cache_context("uncond"): ...'
            )
        return self.contexts

    def unlearned(self, schedules: Schedules) -> Schedules:
        """What `schedules` are compared with: the same computed, `start`."""
        return each(schedules, self._unlearned)

    def _unlearned(self, schedule: Schedule) -> Schedule:
        what: dict[str, Any] = {"output": schedule.output} if schedule.output.any() else {}
        if schedule.level != "output":
            what |= {"compute": schedule.compute, "groups": schedule.groups}
        return self._from_start(schedule.order, *self.start, **what)

    def full(self, order: int) -> Schedule:
        """The one that computes everything."""
        return self.schedule(range(self.steps), order)

    def check(self, schedule: Schedule) -> None:
        """Raise ValueError unless one can learn from `schedule` on."""
        fields = self.fields()
        own: dict[str, Any] = {"model": self.layout.model, "level": self.layout.level}
        if schedule.groups != (*self.layout.groups, WHOLE) or self.layout.level != "branches":  # the trunk beside them
            own["groups"] = self.layout.groups
        own |= {"steps": self.steps, "sampler": fields["sampler"], "timesteps": tuple(self.timesteps)}
        for name, expected in own.items():
            got = getattr(schedule, name)
            if got != expected and not (got is None and name in ("sampler", "timesteps")):
                raise ValueError(f"init: expected a schedule with {name} {expected}, got {got}")

    def schedule(
        self, computed: Sequence[int], order: int, carry: float = 0.0, forecast: int | None = None
    ) -> Schedule:
        """Whole steps computed, the others reused, all with the forecast's weights.

        Args:
            forecast: its order, `order` at most, which it is unless given; values beyond it weigh 0 at first.
        """
        at = np.zeros(self.steps, dtype=bool)
        at[list(computed)] = True
        for start in self.sampled.starts.values():  # a denoiser's first call computes everything
            at[start] = True
        if self.layout.level == "output":
            return self._from_start(order, carry, forecast, output=~at)
        entries = sum(group.layers * len(group.branches) for group in self.layout.groups)
        compute = np.repeat(at[:, None], entries, axis=1)
        if len(self.layout.groups) == 1:
            group = self.layout.groups[0]
            compute = compute.reshape(self.steps, group.layers, len(group.branches))
        return self._from_start(order, carry, forecast, compute=compute)

    def _from_start(self, order: int, carry: float, forecast: int | None, **what: Any) -> Schedule:
        """`what` computed or reused, with that carry and the forecast's weights."""
        if forecast is not None and forecast < order:
            low, wide = (self._from_start(own, carry, None, **what) for own in (forecast, order))
            given = {}
            for name in ("weights", "output_weights"):
                own, more = getattr(low, name), np.zeros_like(getattr(wide, name))
                more[..., : own.shape[-1]] = own
                given[name] = more
            return wide.replace(**given)
        if carry and (compute := what.get("compute")) is not None:
            allowed = may_carry(compute, self.layout.groups, self.layout.level) & ~compute
            if allowed.any():
                what = {**what, "carry": np.where(allowed, carry, 0.0)}
        return self._entered(Schedule(order=order, **{**self.fields(), **what}))

    def _entered(self, schedule: Schedule) -> Schedule:
        """The same, nothing standing on what another denoiser made."""
        for start in self.entered:
            own = schedule.starting_at(start)
            weights = np.concatenate([schedule.weights[:start], own.weights])
            outputs = np.concatenate([schedule.output_weights[:start], own.output_weights])
            schedule = schedule.replace(weights=weights, output_weights=outputs)
        return schedule

    def speedup(self, computed: int) -> float:
        """Theoretical, of a run with so many computed steps."""
        full = self.costs.fixed + self.costs.entries.sum()
        return self.steps * full / (computed * full + (self.steps - computed) * self.costs.fixed)

    def told(self, schedule: Schedule) -> str:
        """What `schedule` computes, and what that is in theory."""
        entries = len(self.costs.entries)
        own = schedule.compute.reshape(self.steps, -1)[:, :entries]  # the trunk beside branches costs nothing
        if schedule.level == "output":
            own = ~schedule.output[:, None]
        full = self.costs.fixed + self.costs.entries.sum()
        speedup = self.steps * full / (self.steps * self.costs.fixed + (own @ self.costs.entries).sum())
        parts = int((own.any(1) & ~own.all(1)).sum())
        partly = f", {parts} in parts" if parts else ""
        return f"{int(own.all(1).sum())} of {self.steps} steps computed{partly}, {speedup:.2f}x in theory"

    def spread(self, speedup: float, power: float = 1.0, sort: bool = False) -> list[int]:
        """As many computed steps as `speedup` allows, within a hundredth.

        Args:
            power: below 1 moves them towards the end.
            sort: gaps between them fall: where not all are alike, the longer ones come first.

        Raises:
            ValueError: none does.
        """
        needed = {0, *self.entered}
        most, low = self.speedup(len(needed)), self.speedup(self.steps)
        if not low <= speedup <= most:
            raise ValueError(
                f"target speed-up: expected {low:.2f} to {most:.2f} for {self.steps} steps, got {speedup:g}"
            )
        count = max(n for n in range(len(needed), self.steps + 1) if self.speedup(n) >= MET * speedup)
        for spaced in range(count, 0, -1):
            for exponent in (power, 1.0):
                at = np.round(self.steps * (np.arange(spaced) / spaced) ** exponent - 1e-6).astype(int)
                if len(np.unique(at)) == spaced and at[-1] < self.steps:
                    break
            if sort:
                at = np.flatnonzero(falling(np.isin(np.arange(self.steps), at)))
            if len(computed := needed | {*at.tolist()}) <= count:
                break
        return sorted(computed)

    def spreads(self, speedup: float) -> list[tuple[int, ...]]:
        """Spreads to try: even, and with falling gaps by each of `POWERS`.

        Falling gaps are worth 2 to 4 dB unlearned on flux-emoji and pixart-emoji (train/STUDY.md).
        """
        tried = [self.spread(speedup), *(self.spread(speedup, power, sort=True) for power in POWERS)]
        return [*dict.fromkeys(map(tuple, tried))]

    def memory(self, schedules: Schedules, settings: WeightSettings) -> Memory:
        """What learning takes at most, counted before anything runs.

        Raises:
            NotCounted: a denoiser's forward cannot be followed by shapes alone.
        """
        models, own = list(self.sampled.denoisers.values()), self.generation
        some = own.at([i % own.count for i in range(self.size)], own.seed)
        call = self.sampled.first_call(some, range(self.size))
        width = self.width if settings.channels else None
        return predict(
            count_step(models[0], call, blockwise=settings.checkpointing == "blocks"),
            ContextWeights(schedules, "cpu", settings.carry, width, self.entered),
            settings,
            weights=nbytes(t for model in models for t in (*model.parameters(), *model.buffers())),
            values=self.size * self._values,
            sample=nbytes(samples_of(models[0], call)),
            contexts=len(self.contexts),
            images=self.size,
            libraries=workspaces(self.device),
            available=available(self.device),
        )

    def starts(self, target: str, count: int, seed: int) -> Starts:
        """`count` of the prompts with noises of `seed`; those held out where they are to judge by."""
        numbers = self.judged_on if seed >= VALIDATION_SEED else self.learned_on
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [numbers[i % len(numbers)] for i in order]
        return Starts(self, self.generation.at(chosen, seed), target)

    def _costs(self) -> Costs:
        """Of one image's step; learns what the groups are, which refuses a model that cannot be reused so."""
        probe = self.schedule([0], 0)
        with torch.no_grad():
            try:
                self.sampled.run(self.generation, [0], probe, carries=self.carry)
            except NoCarryError:  # weights alone are learned
                self.carry = False
                self.sampled.run(self.generation, [0], probe)
        models = [getattr(self.sampled.pipeline, name) for name in self.sampled.denoisers]
        self.contexts = tuple(dict.fromkeys(context for model in models for context in model._runs))
        model = models[0]
        self._values = max(nbytes(run.newest) for run in model._runs.values())
        plan = next(iter(model._plans.values()))
        entries = probe.compute.reshape(self.steps, -1).shape[1]
        if self.layout.level == "branches":
            adapter = plan.denoiser.adapter
            self.width = adapter.width
            counted = adapter.macs_of(plan.shape)
            return Costs(adapter.by_entry(counted.branches), float(counted.fixed))
        if self.layout.level == "output":
            return Costs(np.ones(1), 0.0)
        self.width = plan.entries[0].values.slots[0][0].shape[-1]
        if plan.macs is None:
            return Costs(np.full(entries, 1.0 / entries), 0.0)
        full, own = plan.macs
        return Costs(np.array([own.get(e, 0) for e in range(entries)], dtype=float), float(full - sum(own.values())))
