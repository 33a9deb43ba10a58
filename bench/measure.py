"""Measuring: interleaved timings, launches, and what machine a figure was taken on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harmonica_rt.measuring import Timing, processor


def interleave(
    candidates: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every candidate once a round, in turn, so that all see the same noise of the machine."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


class CountLaunches(TorchDispatchMode):
    """Counts dispatched ops that compute: neither views nor bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not (func.is_view or name.startswith("empty") or name in ("_unsafe_view", "_reshape_alias")):
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_generated(sources: list[str]) -> int:
    """Kernels and library calls in the wrapper code TorchInductor generated."""
    call = r"^\s+(?:\w+(?:, \w+)* = )?(?:cpp_fused\w*|triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.\w+\.\w+[\w.]*)\("
    bodies = [source.split("def call(", 1)[-1].split("def benchmark", 1)[0] for source in sources]
    return sum(len(re.findall(call, body, re.MULTILINE)) for body in bodies)


def environment() -> dict[str, Any]:
    """Machine, versions and commit: a figure means nothing without them."""
    import diffusers

    root = Path(__file__).parent
    packed = root / "COMMIT"  # where bench/ was packed up without its repository
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit.stdout.strip() or (packed.read_text().strip() if packed.exists() else "unknown"),
    }
