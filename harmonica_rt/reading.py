"""Reading files that others wrote: of bounded size, nothing in them run, and an error that names file and fault."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20  # a schedule of 250 steps x 100 layers x 3 branches with order 2 weights is about 5 MB


def read_json(path: str | os.PathLike[str], what: str, text: str | None = None) -> Any:
    """What the JSON file `path` holds, or `text` from it; ValueError says that it is no `what`, or too large."""
    try:
        if text is None:
            check_size(path, what, MAX_BYTES)
            text = Path(path).read_text(encoding="utf-8")
        elif len(text) > MAX_BYTES:
            raise ValueError(f"{path}: expected a {what}'s text of at most {MAX_BYTES} bytes, got {len(text)}")
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise ValueError(f"{path}: not a {what}: JSON nested too deeply") from None
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError are ValueErrors
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: not a {what}: {error}") from None


def check_size(path: str | os.PathLike[str], what: str, most: int) -> None:
    """A regular file of at most `most` bytes, or ValueError; FileNotFoundError if there is none."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such {what}")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: expected a {what}, got something that is not a regular file")
    if (size := os.path.getsize(path)) > most:
        raise ValueError(f"{path}: expected a {what} of at most {most} bytes, got {size}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number a schedule can hold")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields := dict(pairs)) != len(pairs):
        raise ValueError("a field is given twice")
    return fields


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
