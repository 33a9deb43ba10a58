"""Which step of its run a denoiser call is. Host state only: reading a device would stall it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a call is.

    Attributes:
        step: of the run.
        start: step at which the run entered.
        again: another call of the step under way, for another context.
    """

    step: int
    start: int
    again: bool = False


class RunTracker:
    """Follows a sampler through its run, call by call; several denoisers of one sampler share one.

    `locate` decides without changing anything; `commit` moves on once the call has succeeded, so that a call that
    failed can be made again.

    Args:
        steps: steps of a run, T.
        timesteps: the run's T timesteps if they are known beforehand.

    Attributes:
        called: contexts called in the step under way, in turn.
        sample: what the first of them was called with.
    """

    def __init__(self, steps: int, timesteps: Sequence[float] | None = None) -> None:
        self.steps = steps
        self.timesteps = None if timesteps is None else tuple(timesteps)
        self.reset()

    def reset(self, entry: int = 0) -> None:
        """The next call starts a run; at step `entry` if its timestep does not tell."""
        self.start: int | None = None  # step at which the run under way entered
        self.next = entry
        self.called: list[Any] = []
        self.sample: Any = None
        self._most = 0  # calls of an earlier step of the run
        self._first: float | None = None  # timesteps of the run under way
        self._latest: float | None = None
        self._listed = True  # whether its timesteps are those of `timesteps`
        self._short = 0  # runs in a row that a risen timestep ended at their first step
        self._begun_at: float | None = None  # the first timestep of the last of them
        self._abandoned: tuple[float | None, float | None] | None = None

    def abandon(self) -> None:
        """The run under way cannot go on: the next call must start one."""
        broken = self._abandoned if self.start is None else (self._first, self._latest)
        self.reset()
        self._abandoned = broken

    def locate(self, timestep: float | None, *, again: bool = False, told: int | None = None) -> Place:
        """Where this call is; where `step` is `start` and it is not `again`, a run starts.

        Args:
            timestep: its timestep, or None where reading it would mean waiting for a device.
            again: it may be another call of the step under way: of a context not called there yet, on the same sample.
            told: its step, as the pipeline's scheduler counts it; a timestep that is one of `timesteps` goes before it.

        Raises:
            RuntimeError: this call does not follow from the ones before.
        """
        if timestep is not None and self.timesteps is not None and (self.start is None or self._listed):
            at = min(self.next, self.steps - 1)  # nearly always the one
            if told is None or any(_close(timestep, t) for t in (self.timesteps[at], *self.timesteps)):
                return self._by_list(timestep, self.timesteps, again)
        if told is not None:
            return self._as_told(told)
        if timestep is None:
            return self._by_count(again)
        return self._by_order(timestep, again)

    def may_repeat(self, timestep: float) -> bool:
        """Whether a call at the same timestep, and on the same sample, may be of the next step.

        Samplers that repeat timesteps do so on the same sample where the step between was reused. It is, once the step
        under way has had as many calls as one before.
        """
        if self.timesteps is None or self.next >= self.steps:
            return False
        return _close(timestep, self.timesteps[self.next]) and 0 < self._most <= len(self.called)

    def commit(self, place: Place, timestep: float | None, context: Any = None, sample: Any = None) -> None:
        step, start, again = place
        if not again:
            self._most = 0 if step == start else max(self._most, len(self.called))
            self.called, self.sample = [], sample
            rose = self.start is not None and step == start and self.next == 1
            rose = rose and timestep is not None and self._latest is not None and timestep > self._latest
            if rose:
                self._begun_at = self._first
            self._short = self._short + 1 if rose else self._short if step == start else 0
        self.called.append(context)
        if step == start and not again:
            self._first = timestep
            self._listed = timestep is None or any(_close(timestep, t) for t in self.timesteps or ())
        if not again or not self._listed:
            self._latest = timestep
        self.start, self.next, self._abandoned = start, step + 1, None

    def _as_told(self, told: int) -> Place:
        if told >= self.steps:
            raise self._beyond("another call")
        if self.start is None or told < self.next - 1:
            return Place(told, told)
        return Place(told, self.start, told == self.next - 1)

    def _by_count(self, again: bool) -> Place:
        if self._abandoned is not None:
            raise RuntimeError("the run was cut short by an error: call reset() to start a new one")
        if self.start is None:
            return Place(self.next, self.next)
        if again:
            return Place(self.next - 1, self.start, True)
        if self.next >= self.steps:
            raise self._beyond("another call")
        return Place(self.next, self.start)

    def _by_list(self, timestep: float, expected: tuple[float, ...], again: bool) -> Place:
        if again and self.start is not None and _close(timestep, expected[self.next - 1]):
            return Place(self.next - 1, self.start, True)
        if self.next < self.steps and _close(timestep, expected[self.next]):
            return Place(self.next, self.next if self.start is None else self.start)
        if _close(timestep, expected[0]):
            return Place(0, 0)
        if self.start is None:
            for step, t in enumerate(expected):
                if _close(timestep, t):
                    return Place(step, step)
            raise RuntimeError(
                f"timestep {timestep:g} is not in the run: expected one of the {self.steps} timesteps "
                f"{expected[0]:g} ... {expected[-1]:g}"
            )
        if self.next >= self.steps:
            raise self._beyond(f"timestep {timestep:g}")
        raise RuntimeError(
            f"expected timestep {expected[self.next]:g} (step {self.next}) or {expected[0]:g} (a new run), got "
            f"{timestep:g}; call reset() to start a run midway"
        )

    def _by_order(self, timestep: float, again: bool) -> Place:
        """Timesteps fall: one that rises, or the first one again, starts a new run."""
        if self._abandoned is not None:
            first, latest = self._abandoned
            if first is not None and latest is not None and timestep != first and timestep <= latest:
                raise RuntimeError(
                    f"the run was cut short by an error: expected its first timestep, {first:g}, for a new one, got "
                    f"{timestep:g}; call reset() to take that as the first"
                )
        if self.start is None:
            return Place(self.next, self.next)
        if again and timestep == self._latest:
            return Place(self.next - 1, self.start, True)
        if self._latest is None or timestep > self._latest or timestep == self._first:
            if self._short and self.next == 1 and self._latest is not None and timestep > self._latest:
                raise self._rising(timestep)
            return Place(0, 0)
        if self._short and timestep == self._begun_at:  # it fell to where a run began that then rose
            raise self._rising(timestep)
        if timestep == self._latest:
            raise RuntimeError(
                f"timestep {timestep:g} came twice, on another sample: expected the same sample for all calls of a "
                "step; for a sampler that repeats timesteps give the schedule its timesteps"
            )
        if self.next >= self.steps:
            raise self._beyond(f"timestep {timestep:g}")
        return Place(self.next, self.start)

    def _rising(self, timestep: float) -> RuntimeError:
        return RuntimeError(
            f"timesteps rise, {self._begun_at:g} to {self._first:g}, then {timestep:g}: expected them to fall from "
            "step to step; for a sampler whose timesteps rise give the schedule its timesteps"
        )

    def _beyond(self, what: str) -> RuntimeError:
        first = "" if self.timesteps is None else f", {self.timesteps[0]:g}"
        return RuntimeError(
            f"forward beyond the last step: expected {self.steps} steps, got {what} after them; "
            f"a new run starts with its first timestep{first}, or anywhere after reset()"
        )


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)
