"""What the card does in one computed and one reused step: kernels by name and count, top ten by time, idle share."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

import harmonica_rt as hrt

from .machine import Machine
from .record import Case, Log
from .workload import Size, Workload

STAGE = "profile"
FULL = ((Size("DiT-XL/2 256", "dit-xl-2"), 1), (Size("DiT-XL/2 256", "dit-xl-2"), 8))
FULL += ((Size("PixArt-Sigma 1024", "pixart-sigma-1024"), 1),)
DRY = ((Size("DiT, 1 layer", "dit-s-2", layers=1, side=4), 1),)
BACKENDS = ("cudagraph", "eager", "inductor")
COMPUTED, REUSED = 2, 3  # steps of uniform:2
REPEATS = 5
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # a trace's categories of what runs on a card


def cases(machine: Machine) -> list[Case]:
    return [
        Case(STAGE, f"{size.name}, batch {batch}", 6, partial(steps, machine, size, batch))
        for size, batch in (DRY if machine.dry else FULL)
    ]


def steps(machine: Machine, size: Size, batch: int, log: Log) -> None:
    work = Workload(machine, size, batch, torch.float32 if machine.dry else torch.bfloat16, 4 if machine.dry else 20)
    samples, conditioning = work.calls()
    timestep = work.pipeline.scheduler.timesteps[0].to(machine.device).expand(len(samples[0]))
    log.attempt(
        "diffusers eager",
        lambda: log.figure(
            name="diffusers eager",
            step="full",
            **profiled(machine, lambda: work.model(samples[0], timestep=timestep, **conditioning)),
        ),
    )
    with machine.graphs():
        for backend in BACKENDS[:2] if machine.dry else BACKENDS:
            log.attempt(f"harmonica_rt, {backend}", partial(_ours, machine, work, backend, log))


def _ours(machine: Machine, work: Workload, backend: str, log: Log) -> None:
    fast = work.compiled(work.schedule("uniform:2"), backend)
    try:
        work.sample(fast)
        (plan,) = fast.transformer._plans.values()
        sample = work.calls()[0][0]
        for kind, step in {"computed": COMPUTED, "reused": REUSED}.items():
            found = profiled(machine, partial(plan.run, step, sample))
            log.figure(name=f"harmonica_rt, {backend}", step=kind, **found)
    finally:
        hrt.uncompile(fast)


@torch.no_grad()
def profiled(machine: Machine, run: Callable[[], Any]) -> dict[str, Any]:
    """One `run`, of several in a row."""
    for _ in range(2):
        run()
    machine.synchronize()
    kinds = [ProfilerActivity.CPU] if machine.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(REPEATS):
            run()
        machine.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kept = ("cpu_op",) if machine.dry else ON_DEVICE
    return summary([event for event in events if event.get("cat") in kept and event.get("ph") == "X"])


def summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a trace's events, microseconds in `ts` and `dur`, that `REPEATS` equal runs left."""
    if not events:
        raise RuntimeError("the trace holds no event of the device")
    time, count = Counter(), Counter()
    for event in events:
        time[event["name"]] += event["dur"]
        count[event["name"]] += 1
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
    begin, end, busy = spans[0][0], spans[0][0], 0.0
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return {
        "kernels": len(events) / REPEATS,
        "names": len(count),
        "span_us": (end - begin) / REPEATS,
        "busy_us": busy / REPEATS,
        "idle": 1 - busy / (end - begin) if end > begin else 0.0,
        "top": [
            {"kernel": name[:160], "us": spent / REPEATS, "count": count[name] / REPEATS, "share": spent / busy}
            for name, spent in time.most_common(10)
        ],
        "counts": {name[:160]: n / REPEATS for name, n in count.most_common(40)},
    }
