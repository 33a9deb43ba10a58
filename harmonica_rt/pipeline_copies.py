"""Pipelines of the same parts as a person's own, one of which runs at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def another(pipe: Any) -> Any:
    """A pipeline of the same parts, quiet, with a scheduler of its own."""
    own = copy.copy(pipe)
    object.__setattr__(own, "scheduler", copy.deepcopy(pipe.scheduler))
    own._progress_bar_config = {"disable": True}
    return own


@contextmanager
def without_model_offload(pipe: Any) -> Iterator[Any]:
    """`enable_model_cpu_offload` taken back within; gives the device it brings parts to, or None where it is off.

    Its hooks sit on the parts, which other pipelines have too: only the one that runs may have them there.
    """
    device = pipe._offload_device if getattr(pipe, "_all_hooks", None) else None
    if device is not None:
        pipe.remove_all_hooks()
    try:
        yield device
    finally:
        if device is not None:
            pipe.enable_model_cpu_offload(device=device)


@contextmanager
def model_offload(pipe: Any, device: Any) -> Iterator[None]:
    """Within, parts of `pipe` are brought to `device` as they are called; as they are where that is None."""
    if device is not None:
        pipe.enable_model_cpu_offload(device=device)
    try:
        yield
    finally:
        if device is not None:
            pipe.remove_all_hooks()
