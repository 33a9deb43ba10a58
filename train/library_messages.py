"""What diffusers and transformers say while a command runs: no bars beside its own, each warning once."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

LIBRARIES = ("diffusers", "transformers")


class _EachOnce(logging.Filter):
    """Lets a message pass the first time that a line of code says it, whatever its words are then."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[tuple[str, int]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        place = (record.pathname, record.lineno)
        new = place not in self.said
        self.said.add(place)
        return new


@contextmanager
def each_once() -> Iterator[None]:
    """Within: a pipeline is called a thousand times, and would say as often that a prompt is too long.

    Bars of downloads stay.
    """
    with ExitStack() as stack:
        for library in LIBRARIES:
            try:
                said = importlib.import_module(f"{library}.utils.logging")
            except ImportError:  # no pipeline that needs it can be there
                continue
            for handler in logging.getLogger(library).handlers:
                once = _EachOnce()
                handler.addFilter(once)
                stack.callback(handler.removeFilter, once)
            if said.is_progress_bar_enabled():
                _without_bars(said)
                stack.callback(said.enable_progress_bar)
        yield


def _without_bars(said: Any) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    before = are_progress_bars_disabled()
    said.disable_progress_bar()  # transformers' takes the hub's with it
    if not before:
        enable_progress_bars()
