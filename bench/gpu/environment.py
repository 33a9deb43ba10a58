"""What the card is, what is installed, and the card's own limits: bandwidth, FLOP/s, the price of a launch."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.measure.environment import environment
from bench.measure.timing import interleave

from .machine import Machine
from .record import Case, Log

STAGE = "environment"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy")
QUERIES = (
    "driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit,temperature.gpu"
)
BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
HEADS = {"DiT-XL/2, PixArt": (16, 72), "DiT-S/2": (6, 64)}


def cases(machine: Machine) -> list[Case]:
    return [
        Case(STAGE, "versions", 2, lambda log: versions(machine, log)),
        Case(STAGE, "limits", 8, lambda log: limits(machine, log)),
        Case(STAGE, "attention", 15, lambda log: attention(machine, log)),
    ]


def versions(machine: Machine, log: Log) -> None:
    log.figure(
        **environment(),
        packages={name: _version(name) for name in PACKAGES},
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        tf32={
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "cudnn": torch.backends.cudnn.allow_tf32,
            "precision": torch.get_float32_matmul_precision(),
        },
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        reduced_precision_reduction=str(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction),
        variables={
            k: v for k, v in os.environ.items() if k.startswith(("CUDA_", "PYTORCH_", "TORCHINDUCTOR_", "OMP_"))
        },
    )
    if machine.dry:
        return
    properties = torch.cuda.get_device_properties(machine.device)
    log.figure(
        card=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        processors=properties.multi_processor_count,
        bytes=properties.total_memory,
        l2_bytes=getattr(properties, "L2_cache_size", None),
        devices=torch.cuda.device_count(),
    )
    log.attempt("nvidia-smi", lambda: log.figure(**_clocks()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _clocks() -> dict[str, str]:
    ask = ["nvidia-smi", f"--query-gpu={QUERIES}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
    return dict(zip(QUERIES.split(","), map(str.strip, answer.split(","))))


def attention(machine: Machine, log: Log) -> None:
    """Which kernels of scaled_dot_product_attention take the shapes of these models."""
    tokens, context = (16, 12) if machine.dry else (1024, 300)
    for name, (heads, width) in HEADS.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            on = {"dtype": dtype, "device": machine.device}
            q = torch.randn(2, heads, tokens, width, **on)
            text = torch.randn(2, heads, context, width, **on)
            mask = torch.zeros(2, 1, 1, context, **on)
            takes: dict[str, Any] = {}
            for backend in BACKENDS:
                for kind, operands in {"self": (q, q, q), "cross, masked": (q, text, text, mask)}.items():
                    takes[f"{kind}, {backend}"] = _takes(backend, operands)
            log.figure(heads=name, dtype=str(dtype).removeprefix("torch."), takes=takes)


def _takes(backend: str, operands: tuple[torch.Tensor, ...]) -> bool:
    try:
        with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, backend)):
            warnings.simplefilter("ignore")  # the reasons why not
            F.scaled_dot_product_attention(*operands)
    except RuntimeError:
        return False
    return True


def limits(machine: Machine, log: Log) -> None:
    """Measured: copy bandwidth, bf16 FLOP/s, what a launch costs the host, what a node of a graph costs the card."""
    mib, side, rounds = (1, 64, 2) if machine.dry else (1024, 8192, 10)
    source = torch.empty(mib * 2**20, dtype=torch.uint8, device=machine.device).fill_(1)
    target = torch.empty_like(source)
    seconds = _device_seconds(machine, lambda: target.copy_(source), rounds)
    log.figure(copy_gbps=2 * source.numel() / seconds / 1e9, copy_mib=mib)
    a, b = torch.randn(2, side, side, dtype=torch.bfloat16, device=machine.device)
    out = torch.empty_like(a)
    log.figure(
        bf16_tflops=2 * side**3 / _device_seconds(machine, lambda: torch.mm(a, b, out=out), rounds) / 1e12, side=side
    )
    small, times = torch.zeros(256, device=machine.device), 20 if machine.dry else 500

    def launches() -> None:
        for _ in range(times):
            small.add_(1)

    timing = interleave({"host": lambda: (launches(), machine.synchronize())}, rounds)["host"]
    log.figure(launch_us=1e6 * timing.median / times)
    log.figure(
        node_us=1e6 * _device_seconds(machine, machine.repeated(lambda: small.add_(1), times), rounds) / times,
        what="a graph's node that does nothing to speak of",
    )


def _device_seconds(machine: Machine, run: Callable[[], Any], rounds: int) -> float:
    seconds: list[float] = []
    interleave({"": machine.clocked(run, seconds)}, rounds)
    return sorted(seconds[1:])[rounds // 2]
