"""Schedule -> Program: which values every step adds up, and which slot each of them lives in. No torch."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from .forecast import forecast
from .program import Combine, Compute, ForwardProgram, ForwardStep, Gap, Keep, Program, ReuseOutput, Step, Term
from .schedule import Schedule

Value = tuple[int, int]  # (entry, step that computed it)
# Before slots are known: [(entry to compute, [(value, weight), ...] to add first), ...]; the head is entry L B
Draft = list[list[tuple[int, list[tuple[Value, Any]]]]]


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


def lower_forward(schedule: Schedule) -> ForwardProgram:
    """Lower a `schedule` of level blocks or output to what steers the model's own forward.

    Values of an entry have slots of their own, since streams differ in shape; given out as in `lower`.
    """
    steps, order = schedule.steps, schedule.order
    flat = schedule.compute.reshape(steps, -1)
    weights = schedule.weights.reshape(steps, -1, order + 1)
    unlearned = forecast(schedule.compute, order, schedule.positions).reshape(weights.shape)
    carry = schedule.carry.reshape(steps, -1)
    columns, counts = [], []
    for entry in range(flat.shape[1]):
        column, count = _lower_entry(flat[:, entry], weights[:, entry], unlearned[:, entry], carry[:, entry], order)
        columns.append(column)
        counts.append(count)
    outputs = _draft_outputs(schedule)
    kept, kept_count = _allocate(outputs)
    lowered: list[ForwardStep | ReuseOutput] = []
    for i in range(steps):
        if schedule.output[i]:
            ((_, terms),) = outputs[i]
            lowered.append(ReuseOutput(tuple((kept[value], weight) for value, weight in terms)))
        else:
            lowered.append(ForwardStep(tuple(column[i] for column in columns), keep=kept.get((0, i))))
    return ForwardProgram(tuple(lowered), tuple(counts), tuple(map(bool, carry.any(0))), kept_count)


def _lower_entry(
    computed: np.ndarray, weights: np.ndarray, unlearned: np.ndarray, carry: np.ndarray, order: int
) -> tuple[list[Keep | Combine], int]:
    """The instructions of one entry, a step each, and how many slots its values need."""
    draft: Draft = []
    cached: list[Value] = []
    for i in range(len(computed)):
        terms = zip(cached, weights[i].tolist(), unlearned[i].tolist())
        read = [(value, a, w) for value, a, w in terms if a != 0.0 or carry[i] * w != 0.0]
        draft.append([(0, [] if computed[i] else [(value, (a, w)) for value, a, w in read])])
        if computed[i]:
            cached = [(0, i), *cached[:order]]
    slots, count = _allocate(draft)
    column: list[Keep | Combine] = []
    for i, ((_, terms),) in enumerate(draft):
        if computed[i]:
            column.append(Keep(slots.get((0, i))))
            continue
        kept = tuple((slots[value], a) for value, (a, _) in terms if a != 0.0)
        inputs = tuple((slots[value], w) for value, (_, w) in terms if w != 0.0) if carry[i] else ()
        column.append(Combine(kept, float(carry[i]), inputs))
    return column, count


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
