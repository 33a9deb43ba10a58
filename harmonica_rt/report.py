"""What a compiled transformer's plans cost, for `CompiledTransformer.report()`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .compiled_blocks import CompiledBlocksReport
from .executor import Plan
from .forward_plan import ForwardPlan
from .program import ForwardStep, ReuseOutput, Step


@dataclass(frozen=True, slots=True)
class PlanReport:
    """One plan: a program for one shape.

    Attributes:
        shape: batch, resolution, dtype and device.
        backend: the one that runs it.
        level: of its schedule.
        context: which of the calls within a step it serves: a name, or a number in their order.
        start: step of the sampler at which its runs are entered.
        steps, computed, reused: denoiser calls of a run, to the sampler's last step; entries computed and reused (at
            level output, outputs).
        slots, slot_bytes: values held between steps.
        modulation_bytes: modulation rows held for the steps ahead.
        model_bytes: the model's weights, for comparison.
        launches: dispatched non-view ops or compiled kernels of each step; modulation, once a run, is apart, and a
            branch that is a call of the model's own modules counts as one. None where the model's own forward runs.
        step_macs, full_step_macs: multiply-accumulates of each step, and of one that computes everything; None where
            they were not counted.
        uncounted: why they were not.
        uncompiled: branches that are calls of the model's own modules and run as they are with the inductor backend,
            by number, and why.
        seconds: time it took to make the plan, compilation and capture included.
        graphs: captured graphs, or 0.
        graph_seconds, launch_seconds: a run replayed and launched plainly, where ``"auto"`` measured both; else None.
    """

    shape: str
    backend: str
    level: str
    context: Hashable
    start: int
    steps: int
    computed: int
    reused: int
    slots: int
    slot_bytes: int
    modulation_bytes: int
    model_bytes: int
    launches: tuple[int, ...] | None
    step_macs: tuple[int, ...] | None
    full_step_macs: int | None
    seconds: float
    graphs: int = 0
    graph_seconds: float | None = None
    launch_seconds: float | None = None
    uncounted: str | None = None
    uncompiled: dict[int, str] = field(default_factory=dict)

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of a run; None where they were not counted."""
        return None if self.step_macs is None else sum(self.step_macs)

    @property
    def full_macs(self) -> int | None:
        """The same of a run that computes everything."""
        return None if self.full_step_macs is None else self.steps * self.full_step_macs

    def __str__(self) -> str:
        share = 100 * self.slot_bytes / self.model_bytes if self.model_bytes else 0.0
        kind = {"branches": "branches", "blocks": "groups", "output": "outputs"}[self.level]
        head = f"{self.shape}, {self.backend}" + ("" if self.context == 0 else f", context {self.context}")
        lines = [
            f"{head}: {self.steps} steps, {self.computed} {kind} computed, {self.reused} reused",
            f"  {self.slots} slots, {_mib(self.slot_bytes)} ({share:.1f} % of the model)",
        ]
        if self.launches is not None:
            mean = sum(self.launches) / len(self.launches)
            lines[-1] += f"; modulation rows {_mib(self.modulation_bytes)}"
            lines.append(f"  launches a step: mean {mean:.1f}, {min(self.launches)} to {max(self.launches)}")
        if self.macs and self.full_macs:
            lines.append(
                f"  {self.macs / 1e9:.2f} of {self.full_macs / 1e9:.2f} GMACs a run: "
                f"theoretical {self.full_macs / self.macs:.2f}x"
            )
        elif self.uncounted:
            lines.append(f"  MACs not counted: {self.uncounted}")
        for reason in dict.fromkeys(self.uncompiled.values()):
            count = sum(why == reason for why in self.uncompiled.values())
            lines.append(f"  {count} calls of the model's own modules not compiled: {reason}")
        lines.append(f"  made in {self.seconds:.2f} s" + (f", {self.graphs} graphs" if self.graphs else ""))
        if self.graph_seconds is not None and self.launch_seconds is not None:
            lines[-1] += (
                f"; a run takes {1e3 * self.graph_seconds:.2f} ms replayed, {1e3 * self.launch_seconds:.2f} ms launched"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Report:
    """What a compiled model's plans cost.

    Attributes:
        level: of its schedule.
        finer: why the model runs at no finer level, or None.
        fallback: why ``backend="auto"`` did not take its first choice, or None.
        compiled: which of the model's own blocks are, at levels blocks and output with the inductor backend.
    """

    schedule: str
    level: str
    finer: str | None
    fallback: str | None
    plans: tuple[PlanReport, ...]
    compiled: CompiledBlocksReport | None = None

    def __str__(self) -> str:
        lines = [self.schedule, f"level {self.level}" + (f", no finer one: {self.finer}" if self.finer else "")]
        if self.fallback:
            lines.append(f"fallback to eager: {self.fallback}")
        if self.compiled is not None and self.plans:
            lines.append(str(self.compiled))
        return "\n".join(lines + [str(plan) for plan in self.plans] if self.plans else [*lines, "no plan made yet"])


def theoretical_speedup(reports: Sequence[Report]) -> float | None:
    """By multiply-accumulates, of a pipeline's run; None where they were not counted.

    Args:
        reports: of its denoisers. One that another goes on from runs the steps until then.
    """
    plans = [(number, plan) for number, report in enumerate(reports) for plan in report.plans]
    macs = full = 0
    for number, plan in plans:
        if not plan.macs or plan.step_macs is None or plan.full_step_macs is None:
            return None
        later = (other.start - plan.start for by, other in plans if by != number and other.start > plan.start)
        own = plan.step_macs[: min(later, default=plan.steps)]
        macs, full = macs + sum(own), full + len(own) * plan.full_step_macs
    return full / macs if plans else None


def describe_plan(plan: Any, context: Hashable, start: int) -> PlanReport:
    """Of a plan whose runs are of `context` and entered at step `start`."""
    describe = _describe_forward if isinstance(plan, ForwardPlan) else _describe_branches
    return describe(plan, context, start)


def _describe_forward(plan: ForwardPlan, context: Hashable, start: int) -> PlanReport:
    program = plan.program
    calls = [step for step in program.steps if isinstance(step, ForwardStep)]
    total = len(program.steps) * len(program.slots) if program.slots else len(program.steps)
    computed = program.computed if program.slots else len(calls)
    step_macs, full_step_macs = plan.counted or (None, None)
    return PlanReport(
        shape=str(plan.shape),
        backend=plan.backend,
        level="blocks" if program.slots else "output",
        context=context,
        start=start,
        steps=len(program.steps),
        computed=computed,
        reused=total - computed,
        slots=sum(program.slots) + program.outputs,
        slot_bytes=plan.slot_bytes,
        modulation_bytes=0,
        model_bytes=plan.model_bytes,
        launches=None,
        step_macs=step_macs,
        full_step_macs=full_step_macs,
        uncounted=plan.uncounted,
        seconds=plan.seconds,
        graphs=0 if plan.graphs is None else len(plan.graphs.graphs),
    )


def _describe_branches(plan: Plan, context: Hashable, start: int) -> PlanReport:
    shape, program, adapter = plan.shape, plan.program, plan.adapter
    macs = adapter.macs_of(shape)
    entries = adapter.by_entry(macs.branches)
    around = adapter.layers * macs.around  # what is fixed of the trunk goes with it
    step_macs = tuple(
        macs.fixed - around * (number in (program.trunks or ())) + sum(int(entries[c.entry]) for _, c in step.body)
        if isinstance(step, Step)
        else 0
        for number, step in enumerate(program.steps)
    )
    total = len(program.steps) * (program.entries + (program.trunks is not None))
    return PlanReport(
        shape=str(shape),
        backend=plan.backend,
        level="branches",
        context=context,
        start=start,
        steps=len(program.steps),
        computed=program.computed,
        reused=total - program.computed,
        slots=program.slots,
        slot_bytes=plan.slot_bytes,
        modulation_bytes=plan.modulation_bytes,
        model_bytes=sum(p.numel() * p.element_size() for p in adapter.model.parameters()),
        launches=tuple(launches(plan, step) for step in range(len(program.steps))),
        step_macs=step_macs,
        full_step_macs=macs.fixed + int(entries.sum()),
        seconds=plan.seconds,
        graphs=0 if plan.graphs is None else len(plan.graphs.graphs),
        graph_seconds=plan.measured and plan.measured[0],
        launch_seconds=plan.measured and plan.measured[1],
        uncompiled=dict(plan.ops.uncompiled),
    )


def launches(plan: Plan, step: int) -> int:
    """Dispatched non-view ops and compiled kernels of one step, from its instructions."""
    instructions = plan.program.steps[step]
    if isinstance(instructions, ReuseOutput):
        return 1 + len(instructions.terms)
    gaps = sum(plan.ops.gap_launches(gap) for gap in instructions.gaps)
    computes = sum(plan.ops.branch_launches(compute.entry) for _, compute in instructions.body)
    ends = plan.adapter.end_launches - (0 if instructions.embeds else plan.adapter.embed_launches)
    kept = (instructions.keep is not None) + (instructions.after is not None)
    return ends + gaps + computes + kept


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
