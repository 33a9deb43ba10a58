"""How commands end on bad input."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape


class one_line_errors:
    """Bad input ends with its message and exit code 2; anything else with its traceback.

    Args:
        more: further kinds of errors whose message says all.
    """

    def __init__(self, *more: type[BaseException]) -> None:
        self.kinds: tuple[type[BaseException], ...] = (ValueError, TypeError, OSError, FloatingPointError, *more)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, self.kinds):
            line = " ".join(str(error).split("\n"))
            Console(stderr=True).print(f"[red]error:[/red] {escape(line)}", soft_wrap=True, highlight=False)
            raise typer.Exit(2)


def check_file(path: Path) -> None:
    """Raise unless `path` can be written as a file, before anything runs."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, got a folder")


def check_folder(out: Path) -> None:
    """Raise unless `out` is a folder or can be made one, before anything runs."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out: expected a folder, got the file {out}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out: expected a folder to make {out.name} in, got {out.parent}, which is none")
