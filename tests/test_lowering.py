"""Lowering against an oracle that knows nothing of slots, over every schedule of a tiny model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt.lowering import lower
from harmonica_rt.program import Program
from harmonica_rt.schedule import Schedule

Sum = dict[tuple[int, int], float]  # (entry, step computed) -> weight


def oracle(schedule: Schedule) -> list[list[Sum]]:
    """What every entry contributes at every step, straight from the definition."""
    steps, entries = schedule.steps, schedule.layers * len(schedule.branches)
    compute, weights = schedule.compute.reshape(steps, entries), schedule.weights.reshape(steps, entries, -1)
    contributions = []
    for i in range(steps):
        row = []
        for e in range(entries):
            if compute[i, e]:
                row.append({(e, i): 1.0})
            else:
                newest_first = [j for j in reversed(range(i)) if compute[j, e]]
                pairs = zip(newest_first, weights[i, e])
                row.append({(e, j): w for j, w in pairs if w != 0})
        contributions.append(row)
    return contributions


def interpret(program: Program) -> list[list[Sum]]:
    """Run the program on slots that hold the names of values."""
    slots: dict[int, tuple[int, int]] = {}
    contributions = []
    for i, step in enumerate(program.steps):
        row: list[Sum] = [{} for _ in range(program.entries)]
        position = -1
        for gap, compute in [*step.body, (step.last, None)]:
            for term in gap.terms:
                value = slots[term.slot]
                assert value[0] == term.entry, "a slot was overwritten before its last read"
                assert value not in row[term.entry]
                assert term.entry < gap.norm, "a branch may only feed what comes after it"
                assert position <= term.entry, "the stream must have moved past the branch computed before"
                row[term.entry][value] = term.weight
            if compute is not None:
                assert gap.norm == compute.entry > position
                assert 0 <= compute.slot < program.slots
                slots[compute.slot] = (compute.entry, i)
                position = compute.entry
        assert step.last.norm == program.entries
        contributions.append(row)
    return contributions


def most_alive(schedule: Schedule) -> int:
    """The least slots any allocation needs: the most values alive at once, counted at every Compute of the run."""
    entries = schedule.layers * len(schedule.branches)
    sums, computed = oracle(schedule), schedule.compute.reshape(schedule.steps, entries)
    last_read: dict[tuple[int, int], tuple[int, int]] = {}
    for i, row in enumerate(sums):
        for e, terms in enumerate(row):
            gap = next((k for k in range(e + 1, entries) if computed[i, k]), entries)  # where e's terms are added
            for value in terms:
                last_read[value] = (i, gap)
    births = [(i, e) for i in range(schedule.steps) for e in range(entries) if computed[i, e]]
    return max(sum((b[0], b[1]) <= now < last_read[b[1], b[0]] for b in births) for now in births)


def check(schedule: Schedule) -> None:
    program = lower(schedule)
    assert interpret(program) == oracle(schedule)
    assert program.slots == most_alive(schedule)
    assert program.computed == schedule.compute.sum()
    assert program.terms == np.count_nonzero(schedule.weights) + schedule.compute.sum()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_schedule_of_a_tiny_model(order: int) -> None:
    """1 layer, 2 branches, 5 steps: 256 schedules, forecast weights."""
    for bits in itertools.product([False, True], repeat=8):
        compute = np.concatenate([np.ones((1, 1, 2), bool), np.array(bits).reshape(4, 1, 2)])
        check(Schedule(compute, model="Tiny", branches=("a", "b"), order=order))


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2),
    st.sampled_from([0.0, 0.3, 0.6, 0.9]),
)  # fmt: skip
def test_random_schedules_with_random_weights(
    seed: int, steps: int, layers: int, branches: int, order: int, reuse: float
) -> None:
    rng = np.random.default_rng(seed)
    compute = rng.random((steps, layers, branches)) >= reuse
    compute[0] = True
    plain = Schedule(compute, model="Tiny", branches=[f"b{k}" for k in range(branches)], order=order)
    keep = rng.random(plain.weights.shape) < 0.7  # some weights are zero: such values need no slot
    check(plain.replace(weights=plain.weights * keep * rng.normal(size=plain.weights.shape)))


def test_zero_weights_drop_out() -> None:
    compute = np.array([[[True]], [[False]]])
    schedule = Schedule(compute, model="Tiny", branches=("a",), order=0, weights=np.zeros((2, 1, 1, 1)))
    program = lower(schedule)
    assert program.steps[1].last.terms == ()
    assert program.slots == 1


@pytest.mark.parametrize(("order", "slots"), [(0, 1), (1, 2), (2, 3)])
def test_a_history_alternates_between_fixed_slots(order: int, slots: int) -> None:
    compute = np.zeros((16, 3, 2), bool)
    compute[::2] = True
    program = lower(Schedule(compute, model="Tiny", branches=("a", "b"), order=order))
    used = {}
    for step in program.steps:
        for _, instruction in step.body:
            used.setdefault(instruction.entry, []).append(instruction.slot)
    assert program.slots == 6 * slots
    for sequence in used.values():
        assert len(set(sequence)) == slots
        assert sequence[slots:] == sequence[:-slots], "addresses repeat with the depth of the history"


def test_steps_alike_are_equal() -> None:
    """As many graphs as distinct steps: order 0 every 2 has the same computed step throughout."""
    compute = np.zeros((10, 2, 2), bool)
    compute[::2] = True
    assert lower(Schedule(compute, model="Tiny", branches=("a", "b"), order=0)).distinct_steps == 2
    # order 1: the first two steps have no history; after them computed steps alternate between two sets of slots,
    # and so do the reused ones
    assert lower(Schedule(compute, model="Tiny", branches=("a", "b"), order=1)).distinct_steps == 5


def test_branches_of_different_periods_keep_their_slots() -> None:
    """As many kinds of step as there are sets of branches computed: both, one, the other, none."""
    compute = np.zeros((12, 1, 2), bool)
    compute[::2, 0, 0] = compute[::3, 0, 1] = True
    assert lower(Schedule(compute, model="Tiny", branches=("a", "b"), order=0)).distinct_steps == 4
