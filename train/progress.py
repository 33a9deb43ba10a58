"""What a learning shows while it goes on: on a terminal a bar that moves, elsewhere a line a phase. On stderr."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TimeElapsedColumn
from rich.text import Text

from .library_messages import each_once


class Display:
    """Where a learning is; a context manager, within which libraries say each thing once and show no bars.

    Args:
        shown: whether this process is the one that speaks.
        console: unless given, stderr.
    """

    def __init__(self, shown: bool, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._shown, self._phase = shown, ""
        self._left: float | None = None
        self._text, self._at = "", time.monotonic()
        columns = (BarColumn(20), TaskProgressColumn(), TimeElapsedColumn(), _Line(self))
        self._bar = Progress(*columns, console=self.console, refresh_per_second=2)
        self._task = self._bar.add_task("", total=1.0)
        self._moves, self._quiet = shown and self.console.is_terminal, ExitStack()

    def __enter__(self) -> Display:
        self._quiet.enter_context(each_once())
        if self._moves:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._moves:
            self._bar.stop()
        self._quiet.close()

    def show(self, phase: str, text: str = "", share: float = 0.0, left: float | None = None) -> None:
        """
        Args:
            phase: what is being done; a new one is a new line where there is no terminal.
            text: how far it is.
            share: of all that is to be done, 0 to 1.
            left: seconds; None where that cannot be told yet.
        """
        self._text = f"{phase}: {text}" if text else phase
        self._left, self._at = left, time.monotonic()
        if self._moves:
            self._bar.update(self._task, completed=share)
        elif self._shown and phase != self._phase:
            self.console.print(self.line(), highlight=False, markup=False, soft_wrap=True)
        self._phase = phase

    def line(self) -> str:
        """The phase, how far it is, and the time left by now."""
        if self._left is None:
            return f"{self._text}, time left not known yet"
        left = max(0, round(self._left - (time.monotonic() - self._at)))
        return f"{self._text}, {left // 60}:{left % 60:02} left"


class _Line(ProgressColumn):
    """Made anew at each refresh, so that the time left goes on while nothing is told."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self.display = display

    def render(self, task: Task) -> Text:
        return Text(self.display.line(), overflow="ellipsis", no_wrap=True)
