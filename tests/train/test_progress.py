"""What a learning shows: nothing but on one process, lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
import logging
import time

import diffusers.utils.logging as diffusers_logging
import pytest
import transformers.utils.logging as transformers_logging
from huggingface_hub.utils import are_progress_bars_disabled
from rich.console import Console

from harmonica_rt.train.progress import Display


def shown(terminal: bool, speaks: bool = True) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(speaks, Console(file=out, force_terminal=terminal, width=100)), out


def test_a_phase_is_one_line() -> None:
    display, out = shown(terminal=False)
    with display:
        display.show("targets", "0 of 2", left=75)
        display.show("targets", "1 of 2", left=70)
        display.show("weights", "[iteration] 0", 0.5, left=3600.4)
        display.show("verdict")
    assert out.getvalue().splitlines() == [
        "targets: 0 of 2, 1:15 left",
        "weights: [iteration] 0, 60:00 left",
        "verdict, time left not known yet",
    ]


def test_other_processes_show_nothing() -> None:
    for terminal in (False, True):
        display, out = shown(terminal, speaks=False)
        with display:
            display.show("targets", "0 of 2", left=75)
        assert out.getvalue() == ""


def test_a_terminal_shows_it_at_once_and_the_time_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    display, out = shown(terminal=True)
    with display:
        display.show("targets", "0 of 2", 0.25, left=75)
        display._bar.refresh()
        first = out.getvalue()
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 10)
        assert display.line() == "targets: 0 of 2, 1:05 left"
        monkeypatch.setattr(time, "monotonic", lambda: now + 100)
        assert display.line() == "targets: 0 of 2, 0:00 left"
        monkeypatch.undo()
    assert "targets: 0 of 2, 1:15 left" in first and "25%" in first


def test_libraries_say_each_thing_once_and_show_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = {"diffusers": diffusers_logging, "transformers": transformers_logging}
    display, _ = shown(terminal=False)
    for library, settings in libraries.items():
        said = io.StringIO()
        (handler,) = [h for h in logging.getLogger(library).handlers if type(h) is logging.StreamHandler]
        monkeypatch.setattr(handler, "stream", said)
        logger = settings.get_logger(f"{library}.pipelines")
        with display:
            for words in ("a cat", "a dog"):
                logger.warning(f"too long: {words}")
            logger.warning("something else")
            assert not settings.is_progress_bar_enabled()
        assert [line.split("] ")[-1] for line in said.getvalue().splitlines()] == ["too long: a cat", "something else"]
        logger.warning("after")
        assert said.getvalue().endswith("after\n") and settings.is_progress_bar_enabled()
    assert not are_progress_bars_disabled()
