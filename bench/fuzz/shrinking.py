"""A failing case made as small as it goes while it fails in the same way."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from .case import Case, Plan, Run
from .playing import OracleFailed, Wrong, play
from .subject import Subject

SIMPLE_MODEL = "DiTTransformer2DModel"


def failure_of(case: Case) -> str | None:
    """How a case fails on models of its own; None if it does not."""
    try:
        play(case, Subject(case.model, case.dtype))
    except Wrong as error:
        return str(error)
    except (OracleFailed, ValueError, TypeError):  # no such case
        return None
    return None


def kind_of(failure: str) -> str:
    """What failures have in common that are one: all wrong values are."""
    return re.split(r"[\d:]", failure)[0].strip()


def shrink(
    case: Case, failure: str, seconds: float = 60.0, fails: Callable[[Case], str | None] = failure_of
) -> tuple[Case, str]:
    """The smallest case found in `seconds`, and how it fails."""
    until, smaller = time.monotonic() + seconds, True
    tried: set[Case] = {case}
    while smaller and time.monotonic() < until:
        smaller = False
        for candidate in simpler(case):
            if candidate in tried or time.monotonic() > until:
                continue
            tried.add(candidate)
            found = fails(candidate)
            if found is not None and kind_of(found) == kind_of(failure):
                case, failure, smaller = candidate, found, True
                break
    return case, failure


def simpler(case: Case) -> Iterator[Case]:
    """Cases a little simpler, those that save most first."""
    events = case.events
    for number in range(len(events)):
        rest = (*events[:number], *events[number + 1 :])
        if any(isinstance(event, Run) for event in rest):
            yield replace(case, events=rest)
    if len(case.plans) > 1:
        yield from (replace(case, plans=(plan,)) for plan in case.plans)
    if case.second is not None:
        plain = tuple(replace(event, beside=None) if isinstance(event, Run) else event for event in events)
        yield replace(case, second=None, events=plain)
    if case.model != SIMPLE_MODEL and case.level != "branches":
        yield replace(case, model=SIMPLE_MODEL)
    if "," in case.model:
        yield replace(case, model=case.model.split(",")[0])
    for name in ("backend", "dtype", "sampler", "listed"):
        yield from _as_default(case, name)
    for number, event in enumerate(events):
        if isinstance(event, Run):
            for one in _simpler_runs(event, case.plans[0].steps):
                yield replace(case, events=(*events[:number], one, *events[number + 1 :]))
    for step in reversed(range(1, case.plans[0].steps)):
        yield _without_step(case, step)
    for number, plan in enumerate(case.plans):
        for one in _simpler_plans(plan):
            yield replace(case, plans=(*case.plans[:number], one, *case.plans[number + 1 :]))
    if case.second is not None:
        yield from (replace(case, second=one) for one in _simpler_plans(case.second))
    if case.trunk:
        yield replace(case, trunk=False, plans=tuple(_without_last(plan) for plan in case.plans))
    if case.groups > 1:
        rows = tuple(replace(plan, compute=tuple(row[:1] for row in plan.compute)) for plan in case.plans)
        yield replace(case, groups=1, plans=rows)


def _as_default(value: Any, name: str) -> Iterator[Any]:
    default = next(field.default for field in fields(value) if field.name == name)
    if getattr(value, name) != default:
        yield replace(value, **{name: default})


def _simpler_runs(run: Run, steps: int) -> Iterator[Run]:
    for name in ("fails", "half", "refused", "beside", "contexts", "named", "shape", "batch", "start", "seed"):
        yield from _as_default(run, name)
    stop = steps if run.stop is None else run.stop
    if run.stop == steps:
        yield replace(run, stop=None)
    for last in (run.start + 1, (run.start + stop) // 2, stop - 1):
        if run.start < last < stop:
            yield replace(run, stop=last)


def _simpler_plans(plan: Plan) -> Iterator[Plan]:
    for name in ("channels", "weights", "carry", "forecast"):
        yield from _as_default(plan, name)
    if plan.order > 0:
        yield replace(plan, order=plan.order - 1)
    for step in range(1, plan.steps):
        row = plan.compute[step]
        if plan.output[step] == "1":
            yield replace(
                plan,
                output=_with(plan.output, step, "0"),
                compute=tuple("1" * len(r) if i == step else r for i, r in enumerate(plan.compute)),
            )
        elif "0" in row:
            yield replace(plan, compute=tuple("1" * len(r) if i == step else r for i, r in enumerate(plan.compute)))
    for entry in range(len(plan.compute[0])):
        if any(row[entry] == "0" and out == "0" for row, out in zip(plan.compute, plan.output)):
            yield replace(
                plan,
                compute=tuple(r if out == "1" else _with(r, entry, "1") for r, out in zip(plan.compute, plan.output)),
            )


def _without_step(case: Case, step: int) -> Case:
    def plan(one: Plan) -> Plan:
        return replace(
            one,
            compute=(*one.compute[:step], *one.compute[step + 1 :]),
            output=one.output[:step] + one.output[step + 1 :],
        )

    def at(where: int) -> int:
        return where - (where > step)

    def event(one: Any) -> Any:
        if not isinstance(one, Run):
            return one
        return replace(
            one,
            start=at(one.start),
            stop=None if one.stop is None else max(at(one.stop), at(one.start) + 1),
            half=None if one.half is None else (at(one.half[0]), one.half[1]),
            fails=None if one.fails is None else (at(one.fails[0]), one.fails[1]),
            refused=None if one.refused is None else at(one.refused),
        )

    second = None if case.second is None else plan(case.second)
    return replace(case, plans=tuple(map(plan, case.plans)), second=second, events=tuple(map(event, case.events)))


def _without_last(plan: Plan) -> Plan:
    return replace(plan, compute=tuple(row[:-1] for row in plan.compute))


def _with(text: str, place: int, digit: str) -> str:
    return text[:place] + digit + text[place + 1 :]
