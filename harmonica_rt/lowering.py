"""Schedule -> Program: which values every step adds up, and which slot each of them lives in. Pure Python."""

from __future__ import annotations

import heapq

from .program import Compute, Gap, Program, ReuseOutput, Step, Term
from .schedule import Schedule

Value = tuple[int, int]  # (entry, step that computed it)
# Before slots are known: [(entry to compute, [(value, weight), ...] to add first), ...]; the head is entry L B
Draft = list[list[tuple[int, list[tuple[Value, float]]]]]


def lower(schedule: Schedule) -> Program:
    """Lower `schedule` to a static program.

    Every value gets a slot from its Compute to the last Gap that reads it. Slots are given out first come first served
    along the run, which for intervals on a line needs no more slots than values alive at once. Of the free slots a
    value takes the one its own branch used last, so that addresses repeat from step to step.
    """
    draft, outputs = _draft(schedule), _draft_outputs(schedule)
    slots, count = _allocate(draft)
    kept, kept_count = _allocate(outputs)
    entries = schedule.layers * len(schedule.branches)
    steps: list[Step | ReuseOutput] = []
    for i, drafted in enumerate(draft):
        if schedule.output[i]:
            ((_, terms),) = outputs[i]
            steps.append(ReuseOutput(tuple((kept[value], weight) for value, weight in terms)))
            continue
        gaps = [
            Gap(tuple(Term(slots[value], weight, value[0]) for value, weight in terms), norm=entry)
            for entry, terms in drafted
        ]
        body = tuple((gap, Compute(gap.norm, slots[gap.norm, i])) for gap in gaps[:-1])
        steps.append(Step(body, gaps[-1], keep=kept.get((0, i))))
    return Program(tuple(steps), entries, count, kept_count)


def _draft(schedule: Schedule) -> Draft:
    steps, entries = schedule.steps, schedule.layers * len(schedule.branches)
    computed = schedule.compute.reshape(steps, entries).tolist()
    weights = schedule.weights.reshape(steps, entries, -1).tolist()
    cached: list[list[Value]] = [[] for _ in range(entries)]  # newest first
    draft: Draft = []
    for i in range(steps):
        drafted, terms = [], []
        if schedule.output[i]:
            draft.append(drafted)
            continue
        for entry in range(entries):
            if computed[i][entry]:
                drafted.append((entry, terms))
                cached[entry] = [(entry, i), *cached[entry][: schedule.order]]
                terms = [((entry, i), 1.0)]
            else:
                terms += [(value, w) for value, w in zip(cached[entry], weights[i][entry]) if w != 0.0]
        drafted.append((entries, terms))
        draft.append(drafted)
    return draft


def _draft_outputs(schedule: Schedule) -> Draft:
    """The model's outputs, drafted as values of one entry, 0."""
    cached: list[Value] = []
    draft: Draft = []
    for i, weights in enumerate(schedule.output_weights.tolist()):
        draft.append([(0, [(value, w) for value, w in zip(cached, weights) if w != 0.0])])
        if not schedule.output[i]:
            cached = [(0, i), *cached[: schedule.order]]
    return draft


def _allocate(draft: Draft) -> tuple[dict[Value, int], int]:
    order = [(i, entry, terms) for i, drafted in enumerate(draft) for entry, terms in drafted]
    last_read = {value: at for at, (_, _, terms) in enumerate(order) for value, _ in terms}
    slots: dict[Value, int] = {}
    alive: list[tuple[int, Value]] = []  # heap by the Gap of the last read
    free: list[int] = []
    latest: dict[int, list[int]] = {}  # entry -> its slots, the one used longest ago first
    count = 0
    for at, (i, entry, _) in enumerate(order):
        value = (entry, i)
        if value not in last_read:  # the head, or an output that nothing reuses
            continue
        while alive and alive[0][0] <= at:  # the Gap before this Compute was its last reader
            free.append(slots[heapq.heappop(alive)[1]])
        own = [slot for slot in latest.get(entry, []) if slot in free]
        if own or free:
            slot = own[0] if own else min(free)
            free.remove(slot)
        else:
            slot, count = count, count + 1
        slots[value] = slot
        latest[entry] = [s for s in latest.get(entry, []) if s != slot] + [slot]
        heapq.heappush(alive, (last_read[value], value))
    return slots, count
