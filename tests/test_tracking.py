"""Which step a call is: whole runs, runs cut short, runs entered midway, and calls that fit nowhere."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt.tracking import RunTracker

TIMES = (990, 700, 400, 10)
HEUN = (990, 700, 700, 400, 400)
Located = list[tuple[int, int]]


def follow(tracker: RunTracker, calls: list[float | None] | tuple[float | None, ...]) -> Located:
    """Locate and commit each call."""
    located = []
    for timestep in calls:
        place = tracker.locate(timestep)
        tracker.commit(place, timestep)
        located.append(place[:2])
    return located


def run(start: int, stop: int) -> Located:
    return [(step, start) for step in range(start, stop)]


KINDS = {  # a tracker of four steps, and the timesteps its calls come with
    "known": (lambda: RunTracker(4, TIMES), TIMES),
    "unknown": (lambda: RunTracker(4), TIMES),
    "counted": (lambda: RunTracker(4), (None,) * 4),
    "counted, known": (lambda: RunTracker(4, TIMES), (None,) * 4),
}
kinds = pytest.mark.parametrize("kind", KINDS)
told = pytest.mark.parametrize("kind", ["known", "unknown"])


@kinds
def test_a_run_goes_from_first_to_last_step(kind: str) -> None:
    make, times = KINDS[kind]
    tracker = make()
    assert follow(tracker, times) == run(0, 4)
    assert (tracker.start, tracker.next) == (0, 4)


@told
def test_runs_follow_each_other_by_their_first_timestep(kind: str) -> None:
    make, times = KINDS[kind]
    assert follow(make(), times * 3) == run(0, 4) * 3


@told
@pytest.mark.parametrize("short", [1, 2, 3])
def test_a_run_cut_short_is_followed_by_a_new_one(kind: str, short: int) -> None:
    make, times = KINDS[kind]
    assert follow(make(), times[:short] + times) == run(0, short) + run(0, 4)


@kinds
def test_a_step_beyond_the_last_is_refused_until_reset(kind: str) -> None:
    make, times = KINDS[kind]
    tracker = make()
    follow(tracker, times)
    got = "another call" if times[0] is None else "timestep 5"
    with pytest.raises(RuntimeError, match=f"beyond the last step: expected 4 steps, got {got} after them"):
        tracker.locate(None if times[0] is None else 5)
    tracker.reset()
    assert follow(tracker, times) == run(0, 4)


@pytest.mark.parametrize("kind", ["unknown", "counted"])
@pytest.mark.parametrize("times_abandoned", [1, 2])
def test_a_run_abandoned_cannot_go_on(kind: str, times_abandoned: int) -> None:
    make, times = KINDS[kind]
    tracker = make()
    follow(tracker, times[:2])
    for _ in range(times_abandoned):
        tracker.abandon()
    with pytest.raises(RuntimeError, match="cut short by an error"):
        tracker.locate(times[2])
    tracker.reset()
    assert follow(tracker, times) == run(0, 4)


@kinds
def test_reset_starts_over_at_any_time(kind: str) -> None:
    make, times = KINDS[kind]
    tracker = make()
    for short in range(4):
        follow(tracker, times[:short])
        tracker.reset()
        assert (tracker.start, tracker.next) == (None, 0)
        assert follow(tracker, times) == run(0, 4)
        tracker.reset()


@kinds
@pytest.mark.parametrize("entry", [1, 2, 3])
def test_reset_to_a_step_enters_there(kind: str, entry: int) -> None:
    make, times = KINDS[kind]
    tracker = make()
    follow(tracker, times)
    tracker.reset(entry)
    assert follow(tracker, times[entry:]) == run(entry, 4)


@pytest.mark.parametrize("entry", [1, 2, 3])
def test_a_known_timestep_tells_where_a_run_enters(entry: int) -> None:
    tracker = RunTracker(4, TIMES)
    assert follow(tracker, TIMES[entry:] + TIMES) == run(entry, 4) + run(0, 4)
    tracker.reset(1)
    assert follow(tracker, TIMES[entry:]) == run(entry, 4), "over the step that reset named"


def test_a_timestep_out_of_turn_is_named() -> None:
    tracker = RunTracker(4, TIMES)
    follow(tracker, TIMES[:2])
    for wrong in (700, 10, 399, 1000, float("nan")):
        message = rf"expected timestep 400 \(step 2\) or 990 \(a new run\), got {wrong:g}; call reset\(\)"
        with pytest.raises(RuntimeError, match=message):
            tracker.locate(wrong)
    assert follow(tracker, TIMES[2:]) == [(2, 0), (3, 0)]


def test_a_run_midway_is_not_taken_for_the_next_one() -> None:
    tracker = RunTracker(4, TIMES)
    follow(tracker, TIMES)
    with pytest.raises(RuntimeError, match="got timestep 700 after them"):
        tracker.locate(700)


def test_a_first_timestep_that_is_not_in_the_run() -> None:
    with pytest.raises(
        RuntimeError, match=r"timestep 500 is not in the run: expected one of the 4 timesteps 990 \.\.\. 10"
    ):
        RunTracker(4, TIMES).locate(500)


def test_known_timesteps_match_within_rounding() -> None:
    tracker = RunTracker(3, (999.0, 0.1, 0.0))
    assert follow(tracker, [999.0 * (1 + 5e-6), 0.1 + 5e-7, 5e-7]) == run(0, 3)
    tracker.reset()
    with pytest.raises(RuntimeError, match=r"999\.1 is not in the run"):
        tracker.locate(999.1)


def test_unknown_timesteps_count_while_they_fall() -> None:
    tracker = RunTracker(4)
    assert follow(tracker, [800, 500]) == run(0, 2)
    assert follow(tracker, [600, 500]) == run(0, 2), "a rise starts a run"
    assert follow(tracker, [600, 600, 500]) == [(0, 0), *run(0, 2)], "so does the first one of this run again"


def test_known_timesteps_may_come_twice() -> None:
    tracker = RunTracker(5, HEUN)
    assert follow(tracker, HEUN * 2) == run(0, 5) * 2
    assert follow(tracker, HEUN[:3] + HEUN) == run(0, 3) + run(0, 5)


@pytest.mark.parametrize("entry", [1, 2, 3, 4])
def test_among_equal_timesteps_reset_tells_where_a_run_enters(entry: int) -> None:
    tracker = RunTracker(5, HEUN)
    tracker.reset(entry)
    assert follow(tracker, HEUN[entry:]) == run(entry, 5)


def test_a_first_timestep_that_comes_twice_is_one_run_if_known() -> None:
    tracker = RunTracker(3, (990, 990, 10))
    assert follow(tracker, (990, 990, 10) * 2) == run(0, 3) * 2


def test_a_run_may_go_on_by_count() -> None:
    """The first calls on a CPU, the others on a device."""
    for tracker in (RunTracker(4, TIMES), RunTracker(4)):
        assert follow(tracker, [990, 700, None, None]) == run(0, 4)
        with pytest.raises(RuntimeError, match="got another call after them"):
            tracker.locate(None)


def test_timesteps_are_copied() -> None:
    times = list(TIMES)
    tracker = RunTracker(4, times)
    times.clear()
    assert follow(tracker, TIMES) == run(0, 4)


@given(
    st.sampled_from([None, TIMES, (990, 700, 700, 10)]),
    st.lists(st.sampled_from([*TIMES, 500, 1000, None, "reset"]), max_size=12),
)
def test_locating_changes_nothing_whether_it_fails_or_not(
    timesteps: tuple[int, ...] | None, calls: list[float | str | None]
) -> None:
    tracker = RunTracker(4, timesteps)
    for call in calls:
        if call == "reset":
            tracker.reset()
            continue
        before = copy.copy(vars(tracker))
        try:
            first = tracker.locate(call)
        except RuntimeError:
            assert vars(tracker) == before
            continue
        assert vars(tracker) == before
        assert tracker.locate(call) == first
        step, start, again = first
        assert 0 <= start <= step < 4
        assert not again
        assert step == start or (step, start) == (before["next"], before["start"]), "the next step, or a new run"
        tracker.commit(first, call)
    tracker.reset()
    assert follow(tracker, TIMES if timesteps is None else timesteps) == run(0, 4)


def test_an_unknown_timestep_that_comes_twice_is_refused() -> None:
    """Unless it may be another context's call, on the same sample."""
    tracker = RunTracker(4)
    follow(tracker, [800, 500])
    with pytest.raises(RuntimeError, match=r"timestep 500 came twice, on another sample: expected the same sample"):
        tracker.locate(500)
    assert tracker.locate(500, again=True) == (1, 0, True)
    assert follow(tracker, [300]) == [(2, 0)]


def test_a_call_beyond_names_the_first_timestep_of_a_new_run() -> None:
    tracker = RunTracker(4, TIMES)
    follow(tracker, TIMES)
    with pytest.raises(RuntimeError, match=r"starts with its first timestep, 990, or anywhere after reset\(\)"):
        tracker.locate(999)


# ---- several calls a step


@told
def test_calls_on_the_same_sample_are_of_the_step_under_way(kind: str) -> None:
    make, times = KINDS[kind]
    tracker = make()
    for step, t in enumerate(times):
        for number in range(3):
            place = tracker.locate(t, again=number > 0)
            assert place == (step, 0, number > 0)
            tracker.commit(place, t, number, "sample")
        assert tracker.called == [0, 1, 2]


def test_counted_calls_of_contexts_not_called_yet_are_of_the_step_under_way() -> None:
    tracker = RunTracker(4)
    located = []
    for name in ("cond", "cond", "uncond", "cond", "uncond", "cond"):  # guidance is on at steps 1 and 2
        place = tracker.locate(None, again=tracker.start is not None and name not in tracker.called)
        tracker.commit(place, None, name)
        located.append(place[:2])
    assert located == [(0, 0), (1, 0), (1, 0), (2, 0), (2, 0), (3, 0)]


def test_a_told_step_goes_before_a_timestep_in_other_units() -> None:
    tracker = RunTracker(4, TIMES)
    for told, t in enumerate(TIMES):
        for number in range(2):
            place = tracker.locate(t / 1000, told=told)
            assert place == (told, 0, number > 0)
            tracker.commit(place, t / 1000)
    with pytest.raises(RuntimeError, match="got another call after them"):
        tracker.locate(0.0, told=4)
    assert tracker.locate(0.99, told=0) == (0, 0, False), "a new run"


def test_a_timestep_of_the_run_goes_before_a_told_step() -> None:
    tracker = RunTracker(4, TIMES)
    assert tracker.locate(400, told=0) == (2, 2, False)


def test_equal_timesteps_of_a_list_are_steps_unless_the_sample_is_the_same() -> None:
    tracker = RunTracker(5, HEUN)
    located = []
    for t in HEUN:
        for number in range(2):
            place = tracker.locate(t, again=number == 1)
            tracker.commit(place, t)
            located.append(place[0])
    assert located == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_timesteps_that_rise_are_refused_once_it_is_plain_that_they_do() -> None:
    tracker = RunTracker(4)
    assert follow(tracker, [0.0, 0.3]) == [(0, 0)] * 2
    with pytest.raises(RuntimeError, match=r"timesteps rise, 0 to 0.3, then 0.6: expected .* give the schedule"):
        tracker.locate(0.6)
    with pytest.raises(RuntimeError, match=r"timesteps rise, 0 to 0.3, then 0: expected"):
        tracker.locate(0.0)
    tracker = RunTracker(2)
    follow(tracker, [0.0, 0.5])
    with pytest.raises(RuntimeError, match=r"timesteps rise, 0 to 0.5, then 0: expected"):
        tracker.locate(0.0)  # the next image
    assert follow(RunTracker(4, (0.0, 0.3, 0.6, 0.9)), [0.0, 0.3, 0.6, 0.9]) == run(0, 4)
