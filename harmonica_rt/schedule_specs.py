"""Schedules by short names, as commands and `compare` take them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from .schedule import Schedule

SPECS = (
    "full, uniform:N[:ORDER], branches:N[:ORDER], trunk:N[:ORDER][:carry=C], blocks:N[:ORDER][:groups=G][:carry=C], "
    "output:N[:ORDER], NofT in place of N"
)  # every Nth step computed; or N of T, as in blocks:10of60
LEVELS: dict[str, tuple[str, dict[str, type]]] = {
    "uniform": ("", {}),
    "branches": ("branches", {}),
    "trunk": ("branches", {"carry": float}),
    "blocks": ("blocks", {"groups": int, "carry": float}),
    "output": ("output", {}),
}  # of a spec, and its options
COUNTED = re.compile(rf"(?:{'|'.join(LEVELS)}):\d+of(\d+)(?::|$)")


def named_files(text: str) -> dict[str, Path]:
    """The files that ``FILE`` or ``cond=FILE,uncond=FILE`` names, by context or denoiser, one alone by ""; else none.

    Raises:
        ValueError: one of several is not a file, or names come twice.
    """
    if Path(text).is_file():
        return {"": Path(text)}
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name.isidentifier() and file for name, _, file in parts):
        return {}
    files = {name: Path(file) for name, _, file in parts}
    if len(files) < len(parts):
        raise ValueError(f"schedule: expected each name once, got {text!r}")
    for name, file in files.items():
        if not file.is_file():
            raise ValueError(f"schedule: expected a schedule file for {name}, got {str(file)!r}")
    return files


def steps_of(text: str) -> int | None:
    """Those of the runs that a name is for, T of ``blocks:NofT``; None of any other."""
    found = COUNTED.match(text)
    return int(found[1]) if found else None


def parse_schedule(
    text: str, model: nn.Module, steps: int, specs: str = SPECS, uniform: str = "auto", **fields: Any
) -> Schedule:
    """A schedule file, or one of `SPECS` for `model`.

    ``trunk`` is of level branches, with the trunk reused as one entry beside them.

    Args:
        specs: what may be named, for the error.
        uniform: level of ``uniform``; by default the one that the model gets unless told.
        fields: further arguments of a named schedule (sampler, timesteps, guidance_scale).

    Raises:
        ValueError: neither a file nor such a name, or one that the model cannot have, or for another number of steps.
    """
    name, *parts = text.split(":")
    which: dict[str, int] = {}
    if (count := steps_of(text)) is not None:
        if count != steps:
            raise ValueError(f"schedule: expected a run of {count} steps for {text!r}, got one of {steps}")
        which["computed"] = int(parts.pop(0).split("of")[0])
    elif parts and parts[0].isdecimal():
        which["every"] = int(parts.pop(0))
    orders = [int(part) for part in parts if part.isdecimal()]
    options = [part.split("=", 1) for part in parts if not part.isdecimal()]
    if all(len(option) == 2 for option in options):
        if text == "full":
            return Schedule.full(model, steps, **fields)
        if name in LEVELS and which and len(orders) <= 1:
            level, kinds = LEVELS[name]
            taken = _options(text, dict(options), kinds, specs) | ({"trunk": True} if name == "trunk" else {})
            taken |= which | dict(zip(("order",), orders))
            return Schedule.uniform(model, steps, level=level or uniform, **taken, **fields)
    if not Path(text).is_file():
        raise _unknown(text, specs)
    return Schedule.load(text)


def _options(text: str, options: dict[str, str], kinds: dict[str, type], specs: str) -> dict[str, Any]:
    try:
        return {name: kinds[name](value) for name, value in options.items()}
    except (KeyError, ValueError):
        raise _unknown(text, specs) from None


def _unknown(text: str, specs: str) -> ValueError:
    return ValueError(f"schedule: expected {specs} or a schedule file, got {text!r}")
