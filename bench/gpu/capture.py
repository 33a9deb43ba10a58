"""What plans and their graphs take: seconds, bytes held, and what `uncompile` gives back."""

from __future__ import annotations

from functools import partial

import torch

import harmonica_rt as hrt

from .machine import Machine
from .record import Case, Log
from .workload import Size, Workload

STAGE = "capture"
SCHEDULES = ("uniform:2", "random:50:1")  # few distinct steps, and all of them
FULL = (
    (Size("DiT-S/2 256", "dit-s-2"), 20, 3),
    (Size("DiT-XL/2 256", "dit-xl-2"), 20, 5),
    (Size("PixArt-Sigma 1024", "pixart-sigma-1024"), 20, 12),
    (Size("DiT-XL/2 512", "dit-xl-2", side=64), 20, 5),
)
DRY = ((Size("DiT, 1 layer", "dit-s-2", layers=1, side=4), 4, 5),)


def cases(machine: Machine) -> list[Case]:
    return [
        Case(STAGE, size.name, seconds, partial(plans, machine, size, steps))
        for size, steps, seconds in (DRY if machine.dry else FULL)
    ]


def plans(machine: Machine, size: Size, steps: int, log: Log) -> None:
    work = Workload(machine, size, 1, torch.bfloat16, steps)
    with machine.graphs():
        for text in SCHEDULES:
            log.attempt(text, partial(_plan, machine, work, text, log))


def _plan(machine: Machine, work: Workload, text: str, log: Log) -> None:
    machine.forget()
    before = machine.memory()
    fast = work.compiled(work.schedule(text), "cudagraph")
    work.sample(fast)
    machine.synchronize()
    (plan,) = fast.transformer._plans.values()
    made, report = machine.memory(), fast.transformer.report().plans[0]
    with torch.no_grad():
        plan.measure()
    work.trajectory(fast)()
    machine.synchronize()
    (loop,), with_loop = plan.loops.graphs.values(), machine.memory()
    log.figure(
        name=text,
        graphs=report.graphs,
        plan_seconds=report.seconds,
        capture_seconds=plan.graphs.seconds,
        loop_seconds=loop.seconds,
        replayed_ms=1e3 * plan.measured[0],
        launched_ms=1e3 * plan.measured[1],
        slot_bytes=report.slot_bytes,
        modulation_bytes=report.modulation_bytes,
        model_bytes=report.model_bytes,
        plan_allocated=made["allocated"] - before["allocated"],
        plan_reserved=made["reserved"] - before["reserved"],
        loop_allocated=with_loop["allocated"] - made["allocated"],
        loop_reserved=with_loop["reserved"] - made["reserved"],
    )
    del plan, loop
    hrt.uncompile(fast)
    machine.forget()
    after = machine.memory()
    log.figure(
        name=f"{text}, uncompiled",
        left_allocated=after["allocated"] - before["allocated"],
        left_reserved=after["reserved"] - before["reserved"],
    )
