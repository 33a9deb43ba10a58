"""A plan's `Schedule` for a subject, its unlearned weights held against a Lagrange polynomial of this folder's own."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np

import harmonica_rt as hrt

from .case import Case, Plan
from .oracle import lagrange
from .subject import UNITS, Subject

REPEATING = ("HeunDiscreteScheduler",)
SAMPLERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    *REPEATING,
)


def clock_of(case: Case) -> list[float]:
    """When each step is, from 0 to `UNITS`."""
    steps = case.plans[0].steps
    if case.sampler is None:
        return [UNITS * step / steps for step in range(steps)]
    scheduler = getattr(diffusers, case.sampler)()
    scheduler.set_timesteps(max(steps, 2))
    times = scheduler.timesteps.tolist()[:steps]
    return [UNITS * (times[0] - time) / max(times[0], 1.0) for time in times]


def build(case: Case, plan: Plan, subject: Subject) -> hrt.Schedule:
    """
    Raises:
        AssertionError: its unlearned weights are no polynomial's.
    """
    groups = subject.groups_at(case.level, case.groups, case.trunk)
    table = np.array([[digit == "1" for digit in row] for row in plan.compute], dtype=bool)
    table = table.reshape(plan.steps, -1)
    output = np.array([digit == "1" for digit in plan.output], dtype=bool)
    shape = (plan.steps, groups[0].layers, len(groups[0].branches)) if len(groups) == 1 else table.shape
    rng = np.random.default_rng(plan.weights or 0)
    fields: dict[str, Any] = {"model": subject.kind, "level": case.level, "groups": groups, "order": plan.order}
    fields |= {"output": output, "forecast": plan.forecast}
    if case.listed or plan.forecast == "timestep":
        clock = clock_of(case)
        fields["timesteps"] = [subject.timestep(subject.call(0, step, clock)) for step in range(plan.steps)]
    if plan.forecast == "logsnr":
        fields["log_snr"] = np.cumsum(0.2 + np.random.default_rng(plan.steps).random(plan.steps)).tolist()
    schedule = hrt.Schedule(table.reshape(shape), **fields)
    at = {"index": range(plan.steps), "timestep": schedule.timesteps, "logsnr": schedule.log_snr}[plan.forecast]
    alone = np.repeat(output[:, None], table.shape[1], 1)
    if case.trunk:
        alone[:, :-1] |= ~table[:, -1:]
    weights = unlearned(table, alone, plan.order, at)
    outputs = unlearned(~output[:, None], np.zeros((plan.steps, 1), bool), plan.order, at)[:, 0]
    for name, own, theirs in (
        ("weights", weights, schedule.weights),
        ("output_weights", outputs, schedule.output_weights),
    ):
        if not np.allclose(own.ravel(), theirs.ravel(), rtol=1e-9, atol=1e-9):
            off = np.abs(own.ravel() - theirs.ravel()).max()
            raise AssertionError(f"{name}: expected those of a polynomial, got others by {off:.1e}")
    changes: dict[str, Any] = {}
    if plan.weights is not None:
        changes["weights"] = schedule.weights * rng.normal(1.0, 0.4, schedule.weights.shape)
        changes["output_weights"] = schedule.output_weights * rng.normal(1.0, 0.2, schedule.output_weights.shape)
    carried = ~table & ~alone
    if case.level == "branches":
        carried[:, : -1 if case.trunk else None] = False
    if plan.carry and case.level != "output":
        changes["carry"] = np.where(carried, plan.carry, 0.0).reshape(shape)
    if plan.channels is not None:
        changes |= _channels(case, plan, subject, table, output, alone, carried, shape)
    return schedule.replace(**changes) if changes else schedule


def unlearned(compute: np.ndarray, alone: np.ndarray, order: int, at: Any) -> np.ndarray:
    """[T, entries, order + 1], 0 where an entry is computed, left alone, or a value does not exist."""
    out = np.zeros((*compute.shape, order + 1))
    for step, entry in np.argwhere(~compute & ~alone):
        past = [i for i in reversed(range(step)) if compute[i, entry]][: order + 1]
        out[step, entry, : len(past)] = lagrange(at[step], [at[i] for i in past])
    return out


def _channels(
    case: Case,
    plan: Plan,
    subject: Subject,
    table: np.ndarray,
    output: np.ndarray,
    alone: np.ndarray,
    carried: np.ndarray,
    shape: tuple[int, ...],
) -> dict[str, Any]:
    rng, found = np.random.default_rng(plan.channels), {}

    def exist(compute: np.ndarray, left: np.ndarray) -> np.ndarray:
        before = np.cumsum(compute, 0) - compute
        return (before[..., None] > np.arange(plan.order + 1)) & (~compute & ~left)[..., None]

    width = None if case.level == "output" else subject.width(case.level, case.groups, case.trunk)
    if width is not None:
        there = exist(table, alone)
        if case.level == "blocks" or case.trunk:
            there = np.concatenate([there, carried[..., None] & bool(plan.carry)], -1)
        own = rng.normal(0.0, 0.2, (*there.shape, width)) * there[..., None]
        found["channels"] = own.reshape(*shape, *own.shape[2:]).astype(np.float32)
    if (outputs := subject.width("output")) is not None:
        there = exist(~output[:, None], np.zeros((len(output), 1), bool))[:, 0]
        found["output_channels"] = (rng.normal(0.0, 0.2, (*there.shape, outputs)) * there[..., None]).astype(np.float32)
    return found
