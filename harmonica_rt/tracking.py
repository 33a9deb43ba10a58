"""Which step of its run a denoiser call is. Host state only: reading a device would stall it."""

from __future__ import annotations

import math
from collections.abc import Sequence


class RunTracker:
    """Follows a sampler through its run, call by call.

    `locate` decides without changing anything; `commit` moves on once the call has succeeded, so that a call that
    failed can be made again.

    Args:
        steps: denoiser calls of a run, T.
        timesteps: the run's T timesteps if they are known beforehand.
    """

    def __init__(self, steps: int, timesteps: Sequence[float] | None = None) -> None:
        self.steps = steps
        self.timesteps = None if timesteps is None else tuple(timesteps)
        self.reset()

    def reset(self, entry: int = 0) -> None:
        """The next call starts a run; at step `entry` if its timestep does not tell."""
        self.start: int | None = None  # step at which the run under way entered
        self.next = entry
        self._first = self._latest = None  # timesteps of the run under way
        self._abandoned: tuple[float | None, float | None] | None = None

    def abandon(self) -> None:
        """The run under way cannot go on: the next call must start one."""
        broken = None if self.start is None else (self._first, self._latest)
        self.reset()
        self._abandoned = broken

    def locate(self, timestep: float | None) -> tuple[int, int]:
        """Step of this call, and the step at which its run entered (the same two: a new run starts here).

        Args:
            timestep: its timestep, or None where reading it would mean waiting for a device.

        Raises:
            RuntimeError: this call does not follow from the ones before.
        """
        fresh = self.start is None
        if timestep is None:
            return self._by_count(fresh)
        return self._by_list(timestep, fresh) if self.timesteps is not None else self._by_order(timestep, fresh)

    def commit(self, step: int, start: int, timestep: float | None) -> None:
        self._first = timestep if step == start else self._first
        self._latest = timestep
        self.start, self.next, self._abandoned = start, step + 1, None

    def _by_count(self, fresh: bool) -> tuple[int, int]:
        if self._abandoned is not None:
            raise RuntimeError("the run was cut short by an error: call reset() to start a new one")
        if fresh:
            return self.next, self.next
        if self.next >= self.steps:
            raise self._beyond("another call")
        return self.next, self.start

    def _by_list(self, timestep: float, fresh: bool) -> tuple[int, int]:
        expected = self.timesteps
        if self.next < self.steps and _close(timestep, expected[self.next]):
            return self.next, self.next if fresh else self.start
        if _close(timestep, expected[0]):
            return 0, 0
        if fresh:
            for step, t in enumerate(expected):
                if _close(timestep, t):
                    return step, step
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

    def _by_order(self, timestep: float, fresh: bool) -> tuple[int, int]:
        """Timesteps fall: one that rises, or the first one again, starts a new run."""
        if self._abandoned is not None:
            first, latest = self._abandoned
            if timestep != first and timestep <= latest:
                raise RuntimeError(
                    f"the run was cut short by an error: expected its first timestep, {first:g}, for a new one, got "
                    f"{timestep:g}; call reset() to take that as the first"
                )
        if fresh:
            return self.next, self.next
        if self._latest is None or timestep > self._latest or timestep == self._first:
            return 0, 0
        if timestep == self._latest:
            raise RuntimeError(
                f"timestep {timestep:g} came twice: expected one call a step, with guidance in one batch; for a "
                "sampler that repeats timesteps give the schedule its timesteps"
            )
        if self.next >= self.steps:
            raise self._beyond(f"timestep {timestep:g}")
        return self.next, self.start

    def _beyond(self, what: str) -> RuntimeError:
        first = "" if self.timesteps is None else f", {self.timesteps[0]:g}"
        return RuntimeError(
            f"forward beyond the last step: expected {self.steps} steps, got {what} after them; "
            f"a new run starts with its first timestep{first}, or anywhere after reset()"
        )


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)
