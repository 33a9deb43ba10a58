"""Moves of what is computed: they cost nothing and can be undone; a search takes those that help, and no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt.schedule import Schedule
from harmonica_rt.train.search import Move, Search, SearchProgress, whole_steps
from harmonica_rt.train.weights import WeightSettings, WeightTrainer

from .conftest import LAYERS, STEPS, make_task

SHORT = {"iterations": 3, "batch": 2, "pool": 4, "validation": 4, "every": 3}


def plan(computed: list[int], steps: int = STEPS, output: list[int] = (), **fields: Any) -> Schedule:
    compute = np.zeros((steps, LAYERS, 2), bool)
    compute[computed] = True
    marked = np.isin(np.arange(steps), list(output))
    named = {"model": "DiTTransformer2DModel", "branches": ("attn", "mlp")}
    return Schedule(compute, output=marked, **named, **fields)


def trained(computed: list[int] = (0, 4, 5), output: list[int] = (), steps: int = STEPS) -> WeightTrainer:
    """A trainer from steps that are badly placed, not yet run."""
    task = make_task(steps=steps)
    return WeightTrainer(task, plan(list(computed), steps, list(output)), WeightSettings(**SHORT))


def computed_steps(compute: np.ndarray) -> list[int]:
    return np.flatnonzero(compute.any((1, 2))).tolist()


# ---- moves


@given(st.integers(0, 2**32 - 1), st.sampled_from([-2, -1, 1, 2]), st.sampled_from([None, 0, 1]))
def test_moves_cost_nothing_and_can_be_undone(seed: int, shift: int, branch: int | None) -> None:
    rng = np.random.default_rng(seed)
    compute = rng.random((8, LAYERS, 2)) < 0.5
    steps = tuple(sorted(rng.choice(np.arange(1, 8), int(rng.integers(2, 6)), replace=False).tolist()))
    low, high = sorted(rng.choice(LAYERS + 1, 2, replace=False).tolist())
    before = compute.copy()
    moved = Move(steps, shift, low, high, branch)(compute)
    assert np.array_equal(compute, before), "its argument stays"
    assert np.array_equal(moved.sum(0), compute.sum(0))
    assert np.array_equal(Move(steps, -shift, low, high, branch)(moved), compute)
    touched = np.zeros_like(compute)
    touched[list(steps), low:high, slice(None) if branch is None else branch] = True
    assert np.array_equal(moved[~touched], compute[~touched])


@pytest.mark.parametrize(
    ("move", "expected"),
    [
        (Move((2, 3), 1, 0, LAYERS), [0, 3, 4]),
        (Move((1, 2), -1, 0, LAYERS), [0, 1, 4]),
        (Move((2, 3, 4, 5), 1, 0, LAYERS), [0, 3, 5]),
        (Move((1, 2, 3, 4), -1, 0, LAYERS), [0, 1, 3]),
    ],
    ids=str,
)
def test_moves_by_hand(move: Move, expected: list[int]) -> None:
    assert computed_steps(move(plan([0, 2, 4]).compute)) == expected


def test_a_moves_text_says_what_it_does() -> None:
    assert str(Move((2, 3), 1, 0, 3)) == "steps 2 to 3 by +1, layers 0 to 2"
    assert str(Move((2, 3), -1, 1, 2, 0)) == "steps 2 to 3 by -1, layers 1 to 1, branch 0"


def test_whole_steps_are_all_runs_both_ways() -> None:
    schedule = plan([0, 2, 4])
    found = [computed_steps(move(schedule.compute)) for move in whole_steps(schedule) if move.steps[0] > 0]
    assert sorted(found) == sorted([[0, 1, 4], [0, 3, 4], [0, 1, 3], [0, 3, 5], [0, 2, 3], [0, 2, 5]])


def test_whole_steps_leave_step_0_and_outputs_alone() -> None:
    schedule = plan([0, 3, 5], 7, output=[2, 4])
    moves = list(whole_steps(schedule))
    assert moves and not {0, 2, 4} & {step for move in moves for step in move.steps}
    found = sorted(computed_steps(move(schedule.compute)) for move in moves)
    assert found == sorted([[0, 1, 5], [0, 3, 5], [0, 1, 3], [0, 3, 5], [0, 5, 6], [0, 3, 6]])


# ---- the search


def judged_by(search: Search, monkeypatch: pytest.MonkeyPatch) -> list[Schedule]:
    """Every schedule the search makes a trainer of."""
    made: list[Schedule] = []
    succeeded_by = WeightTrainer.succeeded_by

    def record(trainer: WeightTrainer, schedule: Schedule, settings: WeightSettings) -> WeightTrainer:
        made.append(schedule)
        return succeeded_by(trainer, schedule, settings)

    monkeypatch.setattr(WeightTrainer, "succeeded_by", record)
    return made


@pytest.mark.parametrize("output", [(), (3,)])
def test_a_search_keeps_cost_step_0_and_outputs(monkeypatch: pytest.MonkeyPatch, output: tuple[int, ...]) -> None:
    trainer = trained(output=list(output))
    search = Search(trainer, moves=10, drawn=5, followed=1, iterations=1)
    made, start = judged_by(search, monkeypatch), trainer.schedule()
    found = search.run().schedule()
    assert len(made) == search.judged == 10
    for schedule in (*made, found):
        assert np.array_equal(schedule.compute.sum(0), start.compute.sum(0))
        assert schedule.compute[0].all() and np.array_equal(schedule.output, start.output)
    plans = [start.compute.tobytes(), *(schedule.compute.tobytes() for schedule in made)]
    assert len(set(plans)) == len(plans), "nothing is judged twice"


def test_a_search_takes_what_is_better_and_nothing_else() -> None:
    trainer, seen = trained(), []
    start = trainer.best.errors.mean().item()
    search = Search(trainer, moves=24, drawn=8, followed=2, iterations=2)
    found = search.run(seen.append)
    errors, taken = [p.error for p in seen], [p.taken for p in seen]
    assert search.taken == taken[-1] >= 1 and search.judged == seen[-1].judged
    assert found is search.trainer and found.best.errors.mean().item() == errors[-1] < start
    for (before, error), (was, now), progress in zip(zip([start, *errors], errors), zip([0, *taken], taken), seen):
        if now > was:
            assert error == pytest.approx(before + progress.change, abs=1e-4) and progress.change < 0
        else:
            assert error == before
    assert [p.share for p in seen] == sorted(p.share for p in seen) and seen[-1].share <= 1


def test_a_search_that_finds_nothing_better_leaves_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained([0, 2, 4])
    errors = trainer.validation.errors
    judged: list[int] = []
    monkeypatch.setattr(trainer.validation, "errors", lambda *a: judged.append(1) or errors(*a) + 100)
    search = Search(trainer, moves=6, drawn=6, followed=2, iterations=1)
    assert search.run() is trainer and (search.taken, search.judged) == (0, 6) and judged


@pytest.mark.parametrize("moves", [1, 3, 7])
def test_a_search_stops_at_its_moves(moves: int) -> None:
    search, seen = Search(trained(), moves=moves, drawn=5, followed=1, iterations=1), []
    search.run(seen.append)
    assert search.judged == moves and seen[-1].share == 1
    assert {p.judged for p in seen} == set(range(1, moves + 1))


def test_a_search_stops_when_nothing_is_left_to_try() -> None:
    trainer = trained([0, 2], steps=3)
    search = Search(trainer, followed=1, iterations=1)
    search.run()
    entries = 2 ** (2 * LAYERS)  # each of step 2's, at step 1 or step 2
    assert 1 < search.judged < entries and not search._draw()


def test_a_search_stops_when_asked_to() -> None:
    seen: list[SearchProgress] = []
    search = Search(trained(), drawn=5, followed=1, iterations=1)
    search.run(seen.append, lambda: len(seen) >= 2)
    assert search.judged == 2 and len(seen) <= 3, "one move may still be followed"
    unmoved = Search(trained(), moves=9)
    assert unmoved.run(stopped=lambda: True).schedule() == trained().schedule() and unmoved.judged == 0


def test_minutes_end_a_search() -> None:
    search, seen = Search(trained(), minutes=0.1 / 60, drawn=4, followed=1, iterations=1), []
    search.run(seen.append)
    assert 0.1 <= search.seconds < 10 and seen[-1].share == 1


def test_the_same_seed_finds_the_same() -> None:
    found = []
    for seed in (0, 0, 1):
        seen: list[SearchProgress] = []
        schedule = Search(trained(), moves=6, drawn=6, followed=1, iterations=1, seed=seed).run(seen.append).schedule()
        found.append((schedule, [p.move for p in seen]))
    assert found[0] == found[1]
    assert found[0][1] != found[2][1]


def test_weights_are_carried_over_to_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained()
    trainer.run()
    learned = trainer.schedule()
    search = Search(trainer, moves=3, drawn=3, followed=1, iterations=1)
    made = judged_by(search, monkeypatch)
    search.run()
    assert learned.learned and made[0] == learned.with_compute(made[0].compute) and made[0].learned


def test_a_move_that_diverges_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained()
    errors = trainer.starts.errors
    monkeypatch.setattr(trainer.starts, "errors", lambda *arguments: errors(*arguments) * np.nan)
    search = Search(trainer, moves=4, drawn=4, followed=2, iterations=2)
    found = search.run()  # each is judged as it was carried over
    assert found.best.errors.isfinite().all() and np.isfinite(found.schedule().weights).all()
    assert found.best.errors.mean() <= trainer.best.errors.mean()


@pytest.mark.parametrize(("change", "taken"), [(-0.1, 0), (-0.3, 4)])
def test_a_move_is_taken_if_it_is_better_than_by_chance(
    change: float, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standard error of 0.2 dB; one move a round, each followed."""
    monkeypatch.setattr("harmonica_rt.train.search._difference", lambda trainer, other: (change, 0.2))
    search = Search(trained(), moves=4, drawn=1, followed=1, iterations=1)
    search.run()
    assert (search.judged, search.taken) == (4, taken)
