"""Ending a training early without losing it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator


class EndedEarly(RuntimeError):
    """It was asked to stop before anything better than the forecast was found."""


@contextmanager
def stopping(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came to any of the processes; the second one ends the program as usual."""
    asked: list[int] = []
    before: dict[int, Any] = {}
    try:
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: Any) -> None:
            asked.append(number)
            signal.signal(number, before[number])

        for s in before:
            signal.signal(s, ask)
    except ValueError:  # not the main thread: signals go elsewhere
        before = {}

    def stopped() -> bool:
        if accelerator.num_processes == 1:
            return bool(asked)
        return bool(accelerator.reduce(torch.tensor(float(bool(asked)), device=accelerator.device), "sum").item())

    try:
        yield stopped
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def never() -> bool:
    return False
