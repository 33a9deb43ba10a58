"""COUNTED launches, bytes, MACs and slots of large models at their real sizes, and PREDICTED times on an H100.

    python bench/counts.py [--model flux.1-dev ...]

Models are on the meta device: shapes are followed, nothing is computed, no weights are needed. Counted are dispatched
ops that are neither views nor allocations. The roofline has the ceilings measured on an H100 (bench/gpu/h100/GPU.md):
a launch takes the longer of its bytes at 2951 GB/s and its FLOPs at 759 TFLOP/s; in a CUDA graph 1.28 us more, and
launched by itself at least 11.7 us.

`torch.compile` is given the best that a compiler of pointwise code could do: products and attention as they are, all
between two of them one kernel that reads each tensor once and writes what is read later, in one CUDA graph. Real code
is slower, so that a ratio to it is a bound. Backend inductor compiles blocks in the same way, and launches them.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from torch import Tensor, nn

import harmonica_rt as hrt
from bench.measure.gpu_time import Assumptions, Gpu, Launch
from bench.measure.record import Record, attention, storage_of, touched
from bench.models.real_sizes import CASES
from harmonica_rt.executor import Plan
from harmonica_rt.inspection import shape_of
from harmonica_rt.lowering import lower
from harmonica_rt.models import adapt_at_branches

H100 = Gpu("H100, its measured ceilings", flops=759e12, bandwidth=2951e9)
MEASURED = Assumptions(launch_us=11.7, node_us=1.28, flops_fraction=1.0, bandwidth_fraction=1.0)


@dataclass(frozen=True)
class Counts:
    """What a model's own forward launches, a step that computes everything, and one that reuses everything."""

    own: Record
    computed: Record
    reused: Record
    slot_bytes: int


class Unrecorded:
    """Stands in for a recorder of CUDA graphs: runs what it is to capture."""

    def warm_up(self, launch: Callable[[], Any]) -> None:
        launch()

    def capture(self, launch: Callable[[], Any]) -> tuple[Any, Any]:
        return self, launch()

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """The meta device, as CUDA would dispatch: attention and RMS norm are one op each. No values can be compared."""
    replaced = {
        "torch.nn.functional.scaled_dot_product_attention": attention,
        "torch.nn.functional.rms_norm": _rms_norm,
        "torch.is_autocast_enabled": lambda *_: False,
        "harmonica_rt.first_forward._close": lambda *_: True,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in replaced.items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(torch.no_grad())
        yield


def _rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return torch.ops.aten._fused_rms_norm(x, list(shape), weight, eps)[0]


def count(model: nn.Module, arguments: dict[str, Any], **level: Any) -> Counts:
    """Counts of backend cudagraph with every second step computed, order 1, between two steps that are like all later.

    Args:
        arguments: of one call, on the meta device as `model`.
        level: options of `Schedule.uniform`.
    """
    schedule = hrt.Schedule.uniform(model, 4, 2, 1, **level)
    with on_meta():
        model(**arguments)  # tables of positions are made once
        with Record() as own:
            model(**arguments)
        step, plan = (_branches if schedule.level == "branches" else _blocks)(model, arguments, schedule)
        records = []
        for number in (2, 3):
            with Record() as record:
                step(number)
            records.append(record)
    return Counts(own, *records, plan.slot_bytes)


def _blocks(model: nn.Module, arguments: dict[str, Any], schedule: hrt.Schedule) -> tuple[Callable[[int], Any], Any]:
    fast = hrt.compile(model, schedule, backend="cudagraph")
    fast._recorder = lambda device: Unrecorded()
    for _ in range(2):  # learns, and captures a reused step
        fast(**arguments)
    (plan,) = fast._plans.values()
    return lambda number: plan.launch(plan.program.steps[number], ((), arguments)), plan


def _branches(model: nn.Module, arguments: dict[str, Any], schedule: hrt.Schedule) -> tuple[Callable[[int], Any], Any]:
    adapter = adapt_at_branches(model)
    defaults = {name: parameter.default for name, parameter in inspect.signature(model.forward).parameters.items()}
    call = adapter.inputs({**defaults, **arguments})
    plan = Plan(adapter, *adapter.bind(), lower(schedule), shape_of(adapter, call), "cudagraph")

    def step(number: int) -> Tensor:
        plan.select(number)
        return plan.launch(number, call.sample)

    for number in range(4):  # tables of the kernels are made once
        step(number)
    return step, plan


def fused(record: Record) -> list[Launch]:
    """The launches of `record` if all between two products were one: each tensor read once, what is read later written.

    Writes into tensors that were there before the recording count as read later, and what the last launch leaves.
    """
    runs: list[list[int]] = [[]]
    for i, launch in enumerate(record.launches):
        if launch.flops:
            runs += [[i], []]
        else:
            runs[-1].append(i)
    last_read = {storage_of(t): i for i, (reads, _) in enumerate(record.tensors) for t in reads}
    end, launches = len(record.launches) - 1, []
    for run in filter(None, runs):
        if record.launches[run[0]].flops:
            launches.append(record.launches[run[0]])
            continue
        inner: set[int] = set()
        passes = set()
        for i in run:
            reads, writes = record.tensors[i]
            passes |= {("read", *_place(t)) for t in reads if storage_of(t) not in inner}
            inner.update(map(storage_of, writes))
            passes |= {
                ("write", *_place(t))
                for t in writes
                if storage_of(t) in record.given or last_read.get(storage_of(t), -1) > run[-1] or i == end
            }
        launches.append(Launch(0, sum(size for *_, size in passes)))
    return launches


def _place(t: Tensor) -> tuple[Any, ...]:
    return storage_of(t), t.storage_offset(), tuple(t.shape), touched(t)


def predict(counts: Counts) -> dict[str, float]:
    """Seconds on an H100 of each kind of step."""
    return {
        "eager": MEASURED.launched(counts.own.launches, H100),
        "compile": MEASURED.replayed(fused(counts.own), H100),
        "computed": MEASURED.replayed(counts.computed.launches, H100),
        "reused": MEASURED.replayed(counts.reused.launches, H100),
        "computed, inductor": MEASURED.launched(fused(counts.computed), H100),
        "reused, inductor": MEASURED.launched(counts.reused.launches, H100),
    }


HEADS = (
    "a call",
    "launches: own, computed, reused",
    "GB",
    "TMACs",
    "slots, MiB",
    "ms: eager",
    "compile, at best",
    "computed",
    "reused",
    "computed, inductor, at best",
    "reused, inductor",
)


def row(name: str, counts: Counts, blocks: bool) -> str:
    """A line of the table, in Markdown."""
    records = (counts.own, counts.computed, counts.reused)
    times = predict(counts)
    if not blocks:  # the adapter's calls are the model's own modules, which inductor does not compile there
        times |= {"computed, inductor": None, "reused, inductor": None}
    cells = [
        name,
        ", ".join(str(len(r.launches)) for r in records),
        ", ".join(f"{sum(launch.bytes for launch in r.launches) / 1e9:.1f}" for r in records),
        ", ".join(f"{sum(launch.flops for launch in r.launches) / 2e12:.3g}" for r in records),
        f"{counts.slot_bytes / 2**20:.0f}",
        *("" if time is None else f"{1e3 * time:.2f}" for time in times.values()),
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=CASES, nargs="*", default=list(CASES))
    print("| " + " | ".join(HEADS) + " |\n" + "| --- " * len(HEADS) + "|")
    for name in parser.parse_args(argv).model:
        case = CASES[name]
        for level in case.levels:
            title = ", ".join([name, level["level"], *([f"carry {level['carry']:g}"] if "carry" in level else [])])
            counts = count(case.build(), case.arguments(), **level)
            print(row(title, counts, level["level"] == "blocks"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
