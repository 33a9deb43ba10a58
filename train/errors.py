"""How commands end on bad input."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.markup import escape


class one_line_errors:
    """Bad input ends with its message and exit code 2; anything else with its traceback.

    Args:
        more: further kinds of errors whose message says all.
    """

    def __init__(self, *more: type[BaseException]) -> None:
        self.kinds = (ValueError, TypeError, OSError, FloatingPointError, *more)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, self.kinds):
            line = " ".join(str(error).split("\n"))
            Console(stderr=True).print(f"[red]error:[/red] {escape(line)}", soft_wrap=True, highlight=False)
            raise typer.Exit(2)
