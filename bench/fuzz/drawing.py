"""Cases at random, from a seed."""

from __future__ import annotations

import random
from dataclasses import replace

from .case import Case, Change, Event, Plan, Recompile, Run
from .changes import KINDS, LORA
from .models import NO_LORA
from .schedules import REPEATING, SAMPLERS, clock_of
from .subject import Subject

STEPS = (2, 3, 4, 5, 5, 6, 6, 6, 7, 8)


def draw(rng: random.Random, subject: Subject, level: str, backend: str) -> Case:
    """One that `subject` can have, at a level it has."""
    groups = rng.choice([1, 1, 2, 3]) if level == "blocks" else 1
    trunk = level == "branches" and rng.random() < 0.4
    case = Case(subject.name, level, (), (), groups, trunk, backend, str(subject.dtype).removeprefix("torch."))
    entries = sum(layers * len(branches) for _, layers, branches in subject.groups_at(level, groups, trunk))
    steps = rng.choice(STEPS)
    listed = subject.timed and (subject.rising or rng.random() < 0.5)
    plan = _plan(rng, case, steps, entries, listed)
    case = replace(
        case, plans=(plan,), listed=listed, sampler=_sampler(rng, subject, replace(case, plans=(plan,)), listed)
    )
    if case.sampler in REPEATING:
        plan = replace(plan, forecast="index")
    two = rng.random() < 0.12
    plans = (plan, _plan(rng, case, steps, entries, listed and case.sampler not in REPEATING)) if two else (plan,)
    second = _plan(rng, case, steps, entries, False) if rng.random() < 0.12 else None
    case = replace(case, plans=plans, second=second)
    return replace(case, events=_events(rng, subject, case))


def _plan(rng: random.Random, case: Case, steps: int, entries: int, listed: bool) -> Plan:
    style, share = rng.choice(["every", "entries", "entries", "steps"]), rng.choice([0.2, 0.5, 0.8])
    every = rng.randint(2, 4)
    output, compute = ["0"], ["1" * entries]
    reuses_output = share if case.level == "output" else rng.choice([0.0, 0.0, 0.15])
    for step in range(1, steps):
        skip = step % every > 0 if case.level == "output" and style == "every" else rng.random() < reuses_output
        output.append("01"[skip])
        match style:
            case "every":
                row = "10"[step % every > 0] * entries
            case "steps":
                row = "01"[rng.random() < share] * entries
            case _:
                row = "".join("01"[rng.random() < share] for _ in range(entries))
        if case.trunk and row:
            reused = rng.random() < 0.4
            row = "0" * entries if reused else row[:-1] + "1"
        compute.append("0" * entries if skip else row)
    return Plan(
        tuple(compute),
        "".join(output),
        rng.choice([0, 1, 1, 2, 2]),
        rng.randint(1, 99) if rng.random() < 0.6 else None,
        rng.choice([0.0, 0.0, 0.5, 1.0, 0.7]) if case.level == "blocks" or case.trunk else 0.0,
        rng.randint(1, 99) if rng.random() < 0.25 else None,
        rng.choice(["index"] * 4 + ["logsnr"] + ["timestep"] * (2 * listed)),
    )


def _sampler(rng: random.Random, subject: Subject, case: Case, listed: bool) -> str | None:
    """One whose timesteps the subject's calls tell apart."""
    sampler = rng.choice([None, *SAMPLERS])
    if sampler is None or not subject.timed or (sampler in REPEATING and not listed):
        return None
    clock = clock_of(replace(case, sampler=sampler))
    times = [subject.timestep(subject.call(0, step, clock)) for step in range(len(clock))]
    apart = all(abs(a - b) > 1e-3 * max(abs(a), abs(b)) for i, a in enumerate(times) for b in times[:i])
    repeats = sampler in REPEATING and times[0] not in times[1:]
    return sampler if apart or repeats else None


def _events(rng: random.Random, subject: Subject, case: Case) -> tuple[Event, ...]:
    found: list[Event] = []
    lora = False
    for _ in range(rng.choice([2, 3, 4, 5, 6])):
        if found and (chance := rng.random()) < 0.3:
            if chance < 0.04:
                found.append(Recompile())
            else:
                kinds = [kind for kind in KINDS if kind not in LORA]
                if lora:
                    kinds = [*KINDS]
                    kinds.remove("lora")
                elif rng.random() < 0.25 and case.level not in NO_LORA.get(subject.kind, ()):
                    kinds = ["lora"]
                kind = rng.choice(kinds)
                lora = lora or kind == "lora"
                found.append(Change(kind, rng.randint(0, 99)))
        found.append(_run(rng, subject, case, len(found)))
    return tuple(found)


def _run(rng: random.Random, subject: Subject, case: Case, number: int) -> Run:
    steps = case.plans[0].steps
    run = Run(seed=10 * number + rng.randint(0, 9))
    if rng.random() < 0.2:
        run = replace(run, stop=rng.randint(1, steps))
    if rng.random() < 0.15 and case.sampler not in REPEATING:
        run = replace(run, start=rng.randint(0, (steps if run.stop is None else run.stop) - 1))
    if subject.batched and case.backend != "inductor":
        run = replace(run, batch=rng.choice([2, 2, 2, 1, 3, 4]))
    if rng.random() < 0.2 and case.backend != "inductor":
        run = replace(run, shape=rng.randrange(subject.variants))
    if rng.random() < 0.15:
        unnamed = subject.conditioned and case.sampler not in REPEATING and subject.timed
        run = replace(run, contexts=2, named=not unnamed or rng.random() < 0.6)
    two = run.contexts == 2 or len(case.plans) == 2
    last = (steps if run.stop is None else run.stop) - 1
    inside = rng.randint(run.start, last)
    if rng.random() < 0.15 and not two and subject.batched and subject.conditioned and run.batch % 2 == 0:
        return replace(run, half=(inside, rng.randint(0, 1))) if case.backend != "inductor" else run
    if rng.random() < 0.08 and case.backend == "eager":
        return replace(run, fails=(inside, rng.randint(0, 120)))
    if rng.random() < 0.06 and inside > run.start and subject.batched:
        run = replace(run, refused=inside)
    if case.second is not None and rng.random() < 0.5:
        run = replace(run, beside=rng.randint(100, 199))
    return run
