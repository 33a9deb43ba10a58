"""Schedule -> Program: which values every step adds up, and which slot each of them lives in. No torch."""

from __future__ import annotations

import heapq
from typing import Any, NamedTuple

import numpy as np

from .forecast import forecast
from .layout import count_entries, trunk_beside
from .program import (
    Addend,
    Combine,
    Compute,
    ForwardProgram,
    ForwardStep,
    Gap,
    Keep,
    Program,
    ReuseOutput,
    Step,
    Term,
)
from .schedule import Schedule

Value = tuple[int, int]  # (entry, step that computed it)
BEFORE = -1  # in place of an entry: the stream before the first branch
# Before slots are known: [(entry to compute, [(value, what of it), ...] to add first), ...]; the head is entry L B, and
# its value the stream that it reads
Terms = list[tuple[Value, Any]]  # values, and what of them is added
Draft = list[list[tuple[int, Terms]]]


class _Weight(NamedTuple):
    """A reuse weight; `row` is the whole of it where it is per channel."""

    number: float
    row: np.ndarray | None = None


class _Rows:
    """Rows of weights per channel as they come up."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []

    def add(self, row: np.ndarray | None) -> int | None:
        if row is None:
            return None
        self.rows.append(row)
        return len(self.rows) - 1

    @property
    def table(self) -> np.ndarray | None:
        return np.stack(self.rows).astype(np.float32) if self.rows else None


def lower(schedule: Schedule) -> Program:
    """Lower `schedule` of level branches to a static program.

    Every value gets a slot from its Compute to the last Gap that reads it. Slots are given out first come first served
    along the run, which for intervals on a line needs no more slots than values alive at once. Of the free slots a
    value takes the one its own branch used last, so that addresses repeat from step to step.
    """
    draft = _draft(schedule)
    slots, count = _allocate(draft)
    outputs, kept, kept_count, output_channels = _lower_outputs(schedule)
    entries, reused = _branches(schedule), schedule.trunk.tolist()
    steps: list[Step | ReuseOutput] = []
    channels: list[_Rows] = []
    for i, drafted in enumerate(draft):
        channels.append(rows := _Rows())
        if schedule.output[i]:
            steps.append(ReuseOutput(outputs[i]))
            continue
        gaps: list[Gap] = []
        elsewhere = reused[i] or drafted[0][0] == BEFORE  # the sample is embedded into a slot, if at all
        for entry, addends in drafted:
            if entry != BEFORE:
                terms = [
                    _term(slots[value], value[0] if value[0] < entries else BEFORE, w, rows) for value, w in addends
                ]
                gaps.append(_fresh(terms, entry) if elsewhere and not gaps else Gap(tuple(terms), entry))
        body = tuple((gap, Compute(gap.norm, slots[gap.norm, i])) for gap in gaps[:-1])
        kinds = {"keep": kept.get((0, i)), "before": slots.get((BEFORE, i)), "after": slots.get((entries, i))}
        steps.append(Step(body, gaps[-1], **kinds))
    trunks = frozenset(np.flatnonzero(reused).tolist()) if trunk_beside(schedule.groups) else None
    return Program(tuple(steps), entries, count, kept_count, _stack(channels), output_channels, trunks)


def _branches(schedule: Schedule) -> int:
    """How many of the entries are branches."""
    return count_entries(schedule.groups) - trunk_beside(schedule.groups)


def lower_forward(schedule: Schedule) -> ForwardProgram:
    """Lower a `schedule` of level blocks or output to what steers the model's own forward.

    Values of an entry have slots of their own, since streams differ in shape; given out as in `lower`.
    """
    steps, order = schedule.steps, schedule.order
    computed = schedule.compute.reshape(steps, -1)
    weights = schedule.weights.reshape(steps, -1, order + 1)
    unlearned = forecast(schedule.compute, order, schedule.positions).reshape(weights.shape)
    carry = schedule.carry.reshape(steps, -1)
    channels = None if schedule.channels is None else schedule.channels.reshape(*carry.shape, order + 2, -1)
    rows = _Rows()
    columns, counts, carries = [], [], []
    for entry in range(computed.shape[1]):
        own = None if channels is None else channels[:, entry]
        drafted = _draft_carried(computed[:, entry], weights[:, entry], unlearned[:, entry], carry[:, entry], own)
        column, count = _lower_entry(computed[:, entry], *drafted, rows)
        columns.append(column)
        counts.append(count)
        carries.append(any(isinstance(what, Combine) and what.carries for what in column))
    outputs, kept, kept_count, output_channels = _lower_outputs(schedule)
    lowered = tuple(
        ReuseOutput(outputs[i])
        if schedule.output[i]
        else ForwardStep(tuple(column[i] for column in columns), keep=kept.get((0, i)))
        for i in range(steps)
    )
    return ForwardProgram(lowered, tuple(counts), tuple(carries), kept_count, rows.table, output_channels)


def _draft_carried(
    computed: np.ndarray, weights: np.ndarray, unlearned: np.ndarray, carry: np.ndarray, channels: np.ndarray | None
) -> tuple[Draft, list[_Weight]]:
    """One entry's values of each step, as (weight of the value, weight of the stream before it), and its carries."""
    draft: Draft = []
    cached: list[Value] = []
    carries = [_weight(c, None if channels is None else channels[i, -1]) for i, c in enumerate(carry.tolist())]
    for i in range(len(computed)):
        terms = []
        for k, value in enumerate([] if computed[i] else cached):
            a = _weight(weights[i, k], None if channels is None else channels[i, k])
            w = float(unlearned[i, k])
            row = carries[i].row
            theirs = _Weight(-w * carries[i].number, None if row is None else -w * row)
            if _counts(a) or _counts(theirs):
                terms.append((value, (a, theirs)))
        draft.append([(0, terms)])
        if computed[i]:
            cached = [(0, i), *cached[: weights.shape[1] - 1]]
    return draft, carries


def _lower_entry(
    computed: np.ndarray, draft: Draft, carries: list[_Weight], rows: _Rows
) -> tuple[list[Keep | Combine], int]:
    """The instructions of one entry, a step each, and how many slots its values need."""
    slots, count = _allocate(draft)
    column: list[Keep | Combine] = []
    for i, ((_, terms),) in enumerate(draft):
        if computed[i]:
            column.append(Keep(slots.get((0, i))))
            continue
        addends = [Addend(slots[v], a.number, "value", rows.add(a.row)) for v, (a, _) in terms if _counts(a)]
        if _counts(carries[i]):
            addends.append(Addend(-1, carries[i].number, "now", rows.add(carries[i].row)))
            addends += [Addend(slots[v], w.number, "before", rows.add(w.row)) for v, (_, w) in terms if _counts(w)]
        column.append(Combine(tuple(addends)))
    return column, count


def _lower_outputs(
    schedule: Schedule,
) -> tuple[list[tuple[Addend, ...]], dict[Value, int], int, np.ndarray | None]:
    """What each step that reuses the output adds up, the slots of computed ones, how many, weights per channel."""
    draft = _draft_outputs(schedule)
    slots, count = _allocate(draft)
    rows = _Rows()
    lowered = [tuple(Addend(slots[v], w.number, "value", rows.add(w.row)) for v, w in terms) for ((_, terms),) in draft]
    return lowered, slots, count, rows.table


def _weight(number: float, channels: np.ndarray | None) -> _Weight:
    if channels is None or not channels.any():
        return _Weight(float(number), None)
    return _Weight(float(number), float(number) + channels.astype(np.float64))


def _counts(weight: _Weight) -> bool:
    return weight.number != 0.0 or weight.row is not None


def _draft(schedule: Schedule) -> Draft:
    steps, entries, order = schedule.steps, _branches(schedule), schedule.order
    computed = schedule.compute.reshape(steps, -1).tolist()
    weights = schedule.weights.reshape(steps, -1, order + 1).tolist()
    channels = None
    if schedule.channels is not None:
        channels = schedule.channels.reshape(steps, -1, *schedule.channels.shape[-2:])
    trunk = _draft_trunk(schedule, entries)
    reused = schedule.trunk.tolist()
    befores = {value for drafted in trunk for _, terms in drafted for value, _ in terms if value[0] == BEFORE}
    cached: list[list[Value]] = [[] for _ in range(entries)]  # newest first
    draft: Draft = []
    for i in range(steps):
        drafted: list[tuple[int, Terms]] = []
        terms: Terms = []
        if schedule.output[i] or reused[i]:
            draft.append(trunk[i])
            continue
        if (BEFORE, i) in befores:
            drafted.append((BEFORE, []))
            terms.append(((BEFORE, i), _Weight(1.0)))
        for entry in range(entries):
            if computed[i][entry]:
                drafted.append((entry, terms))
                cached[entry] = [(entry, i), *cached[entry][:order]]
                terms = [((entry, i), _Weight(1.0))]
                continue
            for k, value in enumerate(cached[entry]):
                weight = _weight(weights[i][entry][k], None if channels is None else channels[i, entry, k])
                if _counts(weight):
                    terms.append((value, weight))
        drafted.append((entries, terms))
        draft.append(drafted)
    return draft


def _draft_trunk(schedule: Schedule, head: int) -> Draft:
    """What steps that reuse the trunk add up, nothing for others. Its values are the head's."""
    draft: Draft = [[] for _ in range(schedule.steps)]
    if not schedule.trunk.any():
        return draft
    column = schedule.compute[:, -1]
    unlearned = forecast(column, schedule.order, schedule.positions)
    channels = None if schedule.channels is None else schedule.channels[:, -1]
    carried, carries = _draft_carried(column, schedule.weights[:, -1], unlearned, schedule.carry[:, -1], channels)
    for i in np.flatnonzero(schedule.trunk).tolist():
        ((_, values),) = carried[i]
        terms = [((head, step), a) for (_, step), (a, _) in values if _counts(a)]
        if _counts(carries[i]):
            draft[i].append((BEFORE, []))
            terms.append(((BEFORE, i), carries[i]))
            terms += [((BEFORE, step), w) for (_, step), (_, w) in values if _counts(w)]
        draft[i].append((head, terms))
    return draft


def _term(slot: int, entry: int, weight: _Weight, rows: _Rows) -> Term:
    number = weight.number if weight.row is None else 1.0
    return Term(slot, number, None if entry == BEFORE else entry, rows.add(weight.row))


def _fresh(terms: list[Term], norm: int) -> Gap:
    """A Gap of nothing but `terms`. It starts from one that is a stream as it is, if there is such."""
    plain = next((t for t in terms if t.entry is None and t.channel is None and t.weight == 1.0), None)
    rest = tuple(term for term in terms if term is not plain)
    return Gap(rest, norm, None if plain is None else plain.slot)


def _draft_outputs(schedule: Schedule) -> Draft:
    """The model's outputs, drafted as values of one entry, 0."""
    channels = schedule.output_channels
    cached: list[Value] = []
    draft: Draft = []
    for i, numbers in enumerate(schedule.output_weights.tolist()):
        weights = [_weight(w, None if channels is None else channels[i, k]) for k, w in enumerate(numbers)]
        draft.append([(0, [(value, w) for value, w in zip(cached, weights) if _counts(w)])])
        if not schedule.output[i]:
            cached = [(0, i), *cached[: schedule.order]]
    return draft


def _stack(channels: list[_Rows]) -> np.ndarray | None:
    """[steps, most rows of a step, width], 0 where a step has fewer; None where none has any."""
    most = max(len(each.rows) for each in channels)
    if not most:
        return None
    width = next(len(each.rows[0]) for each in channels if each.rows)
    table = np.zeros((len(channels), most, width), dtype=np.float32)
    for i, each in enumerate(channels):
        if each.rows:
            table[i, : len(each.rows)] = each.table
    return table


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
