"""From `compile()` to the end of the first step: in a new process, and in one that has compiled the shape before.

``nothing``: a process's first plan, with TorchInductor's cache empty (one round, it takes long). ``cache``: the same,
with its kernels in that cache. Each round is a process of its own that takes its own time: what TorchInductor imports
counts, torch and this project do not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from bench.models.reference import load_pipeline

from .conftest import inductor, needs_compiler

ROOT = Path(__file__).parents[2]
TINY = {"layers": 2, "size": 8}  # of dit-s-2
STEPS = 10
CHILD = f"""
import time, torch
import harmonica_rt as hrt
from bench.models.reference import load_pipeline
torch.set_num_threads(1)
model = load_pipeline("dit-s-2", layers={TINY["layers"]}, size={TINY["size"]}).transformer
schedule = hrt.Schedule.uniform(model, {STEPS}, every=2)
sample = torch.randn(2, 4, {TINY["size"]}, {TINY["size"]})
timestep, labels = torch.tensor([900, 900]), torch.tensor([1, 1000])
began = time.perf_counter()
hrt.compile(model, schedule, backend="inductor")(sample, timestep, labels)
print(time.perf_counter() - began)
"""


def model(size: str) -> nn.Module:
    return load_pipeline("dit-s-2", **(TINY if size == "tiny" else {})).transformer


def first_step(model: nn.Module, backend: str) -> None:
    """An image with guidance."""
    side, labels = model.config.sample_size, torch.tensor([1, 1000])
    fast = hrt.compile(model, hrt.Schedule.uniform(model, STEPS, every=2), backend=backend)
    fast(torch.randn(2, 4, side, side), torch.tensor([900, 900]), labels)


class Reported:
    """A timer that goes on by the seconds that processes report."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, cache: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-c", CHILD],
            cwd=ROOT,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
            capture_output=True,
            text=True,
            check=True,
        )
        self.now += float(done.stdout)


TIMER = Reported()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TorchInductor's, empty at first."""
    return tmp_path_factory.mktemp("cache")


@needs_compiler
@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("there", ["nothing", "cache"])
def test_new_process(benchmark: Any, there: str, cache: Path) -> None:
    benchmark.group = "compile() and first step, tiny"
    empty = not any(cache.iterdir())
    assert empty or there == "cache"
    rounds = 1 if there == "nothing" else 2
    benchmark.pedantic(TIMER.run, args=(cache,), rounds=rounds, warmup_rounds=int(empty and there == "cache"))


@pytest.mark.parametrize(("size", "backend"), [("tiny", "eager"), inductor("tiny"), ("dit-s-2", "eager")])
def test_same_process(benchmark: Any, size: str, backend: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark.group = f"compile() and first step, {size}"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    benchmark.pedantic(first_step, args=(model(size), backend), rounds=6, warmup_rounds=1)
