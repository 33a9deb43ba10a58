"""Two processes of unequal speeds learn through a pipeline as one does. As a module: they do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import harmonica_rt as hrt
from harmonica_rt.schedule import Schedule
from harmonica_rt.train import learn as learning
from harmonica_rt.train.natural_gradient import NaturalGradient
from harmonica_rt.train.pipeline_task import PipelineTask
from harmonica_rt.train.starts import Starts
from harmonica_rt.train.stopping import stopping

from ..pipelines.folders import text_flux

TRIAL, HELD_OUT, SLOWER = 2, 3, 0.2  # seconds a run
ROOT = Path(__file__).parents[2]
CALL = {"num_inference_steps": 5, "height": 16, "width": 16}
SETTINGS = {"target_speedup": 1.5, "batch": 4, "validation": 3, "accumulate": 2}


def learned(**more: Any) -> Schedule:
    return hrt.learn(text_flux(), ["a cat", "red fox", "old house"], **SETTINGS, **CALL, **more)


def shorten() -> None:
    learning.TRIAL, PipelineTask.held_out = TRIAL, HELD_OUT


def distributed(rank: int, folder: Path) -> None:
    """One of two processes, the second one slower; saves what it ended with."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    shorten()
    steps, sizes = [], set()
    direction, result = NaturalGradient.direction, Starts.result

    def slow(starts: Starts, schedule: Schedule, numbers: Any, start: int, end: int, *more: Any) -> Any:
        if numbers is not None:
            sizes.add((end - start, starts.size))
        time.sleep(SLOWER * rank)
        return result(starts, schedule, numbers, start, end, *more)

    def count(gradient: NaturalGradient, *given: torch.Tensor | None) -> torch.Tensor:
        steps.append(1)
        if signalled and len(steps) == 2 * TRIAL + 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)  # to one of them
        return direction(gradient, *given)

    Starts.result, NaturalGradient.direction, signalled = slow, count, False
    learned(iterations=3).save(folder / f"{rank}.safetensors")
    assert sizes == {(1, 1)}, "4 images in 2 parts over 2 processes"
    steps.clear()
    learned(minutes=0.1).save(folder / f"minutes-{rank}.safetensors")
    (folder / f"minutes-{rank}").write_text(str(len(steps)))
    steps.clear()
    signalled, accelerator = True, Accelerator(cpu=True)
    with stopping(accelerator) as stopped:
        kept = {"checkpoint": folder / "c", "accelerator": accelerator, "iterations": 4}
        learned(stopped=stopped, **kept)
    (folder / f"stopped-{rank}").write_text(str(len(steps)))
    learned(**kept, resume=True).save(folder / f"resumed-{rank}.safetensors")
    learned(iterations=4).save(folder / f"whole-{rank}.safetensors")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.train.test_pipeline_processes", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def pair(folder: Path, name: str = "") -> tuple[Schedule, Schedule]:
    first, second = (Schedule.load(folder / f"{name}{rank}.safetensors") for rank in range(2))
    return first, second


def test_two_processes_learn_as_one(two_processes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "TRIAL", TRIAL)
    monkeypatch.setattr(PipelineTask, "held_out", HELD_OUT)
    (first, second), one = pair(two_processes), learned(iterations=3)
    assert first.replace(note="") == second.replace(note="") and np.array_equal(first.compute, one.compute)
    assert abs(one.channels).max() > 1e-3 and one.learned
    for name in ("weights", "carry", "channels"):
        np.testing.assert_allclose(getattr(first, name), getattr(one, name), atol=1e-3, err_msg=name)


def test_they_agree_on_when_time_is_up(two_processes: Path) -> None:
    first, second = pair(two_processes, "minutes-")
    assert first.replace(note="") == second.replace(note="")
    counts = [(two_processes / f"minutes-{rank}").read_text() for rank in range(2)]
    assert counts[0] == counts[1] and int(counts[0]) > 0


def test_a_signal_to_one_ends_both_and_both_go_on(two_processes: Path) -> None:
    counts = [(two_processes / f"stopped-{rank}").read_text() for rank in range(2)]
    assert counts == [str(2 * TRIAL + 2)] * 2
    resumed, whole = (pair(two_processes, name) for name in ("resumed-", "whole-"))
    for schedule in (*resumed, *whole):
        assert schedule.replace(note="") == whole[0].replace(note="")


if __name__ == "__main__":
    torch.multiprocessing.start_processes(distributed, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
