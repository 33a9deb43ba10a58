"""Time that launches would take on a GPU, from their bytes and FLOPs: nothing is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    name: str
    flops: float  # dense bf16 with fp32 accumulation, per second
    bandwidth: float  # bytes per second


GPUS = (
    Gpu("A100 80GB SXM", 312e12, 2.039e12),
    Gpu("H100 SXM", 989e12, 3.35e12),
    Gpu("H200 SXM", 989e12, 4.8e12),
    Gpu("B200", 2250e12, 8.0e12),
    Gpu("RTX 4090", 165e12, 1.008e12),
    Gpu("L40S", 362e12, 0.864e12),
)


@dataclass(frozen=True)
class Launch:
    flops: float
    bytes: float


@dataclass(frozen=True)
class Assumptions:
    launch_us: float
    node_us: float
    flops_fraction: float
    bandwidth_fraction: float

    def busy(self, launch: Launch, gpu: Gpu) -> float:
        """Seconds the GPU works on `launch`."""
        compute = launch.flops / (self.flops_fraction * gpu.flops)
        return max(compute, launch.bytes / (self.bandwidth_fraction * gpu.bandwidth))

    def launched(self, launches: Iterable[Launch], gpu: Gpu) -> float:
        """Seconds for launches issued one by one: the host, or the GPU, is the slower."""
        return sum(max(self.busy(launch, gpu), 1e-6 * self.launch_us) for launch in launches)

    def replayed(self, launches: Iterable[Launch], gpu: Gpu) -> float:
        """Seconds for the same launches as nodes of a graph."""
        return sum(self.busy(launch, gpu) + 1e-6 * self.node_us for launch in launches)
