"""Measuring: interleaved timings, launches, signal-to-noise, and what machine a figure was taken on."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Timing:
    """Seconds of a candidate's rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.seconds, q))


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


def ratio(baseline: Timing, other: Timing) -> float:
    """Speed-up of `other` over `baseline`: the median over rounds of the ratio within a round."""
    return float(np.median(np.array(baseline.seconds) / np.array(other.seconds)))


def psnr(images: Tensor, reference: Tensor, span: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB; `span` is the range of values ([-1, 1]: 2)."""
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(span**2 / error.clamp_min(1e-20))


def pooled_psnr(images: Tensor, reference: Tensor, span: float = 2.0) -> float:
    """PSNR of the mean squared error over all images, in dB: the worst ones decide."""
    return 10 * math.log10(span**2 / max((images.double() - reference.double()).square().mean().item(), 1e-20))


def ssim(images: Tensor, reference: Tensor, span: float = 2.0) -> Tensor:
    """Structural similarity of each image, 1 for equal ones (Wang et al. 2004: Gaussian window of 11, sigma 1.5)."""
    window = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).outer(window / window.sum())
    channels = images.shape[1]
    kernel = window.expand(channels, 1, 11, 11)

    def mean(t: Tensor) -> Tensor:
        return F.conv2d(t, kernel, groups=channels)

    x, y = images.double(), reference.double()
    mx, my, c1, c2 = mean(x), mean(y), (0.01 * span) ** 2, (0.03 * span) ** 2
    vx, vy, covariance = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    similar = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similar.flatten(1).mean(1)


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

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = names[0] if names else cpu
    root = Path(__file__).parent
    packed = root / "COMMIT"  # where bench/ was packed up without its repository
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit.stdout.strip() or (packed.read_text().strip() if packed.exists() else "unknown"),
    }
