"""What bench/run_serve.py compares with, and how it judges answers."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from bench import run_serve

SCHEDULES = {"fast": "output:2", "good": "full"}
MADE = {"batches": [4], "call": {"num_inference_steps": 2, "guidance_scale": 1.5}, "backend": "eager"}


def test_plain_processes_make_the_same_whatever_their_share() -> None:
    work = (run_serve.Load("dit-fashion"), SCHEDULES, MADE)
    (images, began, ended), (some, *_) = (
        run_serve.plainly(*work, numbers, threading.Barrier(1)) for numbers in (list(range(9)), [3, 8])
    )
    assert len(set(images.values())) == 9 and began < ended
    assert some == {number: images[number] for number in (3, 8)}


def test_answers_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    images = {number: f"image {number}" for number in range(50)}
    came, killed = [], []

    def ask(asked: dict[str, Any]) -> tuple[int, str]:
        number = asked["seed"]
        came.append(number)
        if number == 7 and came.count(7) == 1:
            return 503, "{}"
        if "height" in asked:
            return (400, "height, width: expected none, got height 17") if number == 24 else (200, "an image")
        return {3: (500, "died"), 4: (200, "image 5")}.get(number, (200, images[number]))

    monkeypatch.setattr(run_serve, "ask", ask)
    monkeypatch.setattr(run_serve, "kill_a_replica", lambda: killed.append(len(came)))
    judged = run_serve.served(50, 4, list(range(10)), images, kill=True)
    assert len(killed) == 1
    assert (judged["right image"], judged["other image"], judged["failed"]) == (46, 1, [(3, 500, "died")])
    assert (judged["refused, as it must be"], judged["wrongly served"]) == (1, 1)
    assert judged["turned away and come again"] == 1 and came.count(7) == 2
