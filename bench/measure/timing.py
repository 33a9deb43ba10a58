"""Timings of candidates in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from harmonica_rt.measuring import Timing


def interleave(
    candidates: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every candidate once a round, in turn, so that all see the same noise of the machine."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
