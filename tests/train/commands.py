"""The command line as tests run it, on a small model in a folder."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from harmonica_rt.train.cli import app

ROUTER = ("--objective", "sdt", "--steps", "6", "--iterations", "2", "--batch", "2", "--refresh", "1")
TARGET = ("--target-cur", "0.4")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result: Result, *texts: str) -> None:
    """Exit code 2, one line that says why, no traceback."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0], "more than one line"
    for text in texts:
        assert text in errors[0], errors[0]


def route(model: object, out: object, *more: object, target: tuple[str, ...] = TARGET) -> Result:
    """A router."""
    return run("router", "--model", model, "--out", out, *ROUTER, *target, *more)
