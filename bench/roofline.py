"""PREDICTED time per step on NVIDIA GPUs, from counted bytes, FLOPs and launches. Nothing here was measured.

    python bench/roofline.py

Every launch takes the longer of its FLOPs and its bytes over the achieved fraction of the GPU's peak. Launched from
Python it takes at least `--launch-us`, what the host needs to issue a torch op; in a CUDA graph it takes `--node-us` on
top. The defaults are assumptions to be replaced by measurements: 5 us an op is what PyTorch's dispatcher and the driver
are usually found to need, 1 us is the order of a graph node's own latency, 0.6 and 0.8 of peak are what large bf16
GEMMs and streaming kernels commonly reach. Peaks are dense bf16 with fp32 accumulation, and memory bandwidth, from
NVIDIA's data sheets.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from diffusers import DiTTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import harmonica_rt as hrt
from bench.arguments import positive
from bench.by_hand.module_reuse import ModuleReuse
from bench.models.reference import REFERENCES
from harmonica_rt.backends import fused
from harmonica_rt.lowering import lower
from harmonica_rt.models import Adapter, adapt
from harmonica_rt.models.stages import walk

SIZE = 2  # bytes of a bf16 number
DITS = [name for name, reference in REFERENCES.items() if reference.kind == "dit" and not reference.trained]


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


class Record(TorchDispatchMode):
    """What a model's forward launches: FLOPs and bytes of every op that is neither a view nor an allocation.

    Attributes:
        launches: in order.
        tensors: of each launch, those it reads and those it writes.
        given: storages that were there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.tensors: list[tuple[list[Tensor], list[Tensor]]] = []
        self.given: set[int] = set()
        self._made: dict[int, Tensor] = {}  # which also keeps a storage's number from being another's later

    def __enter__(self) -> Record:
        Record.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Record.active = None
        super().__exit__(*error)

    def add(self, flops: float, reads: list[Tensor], writes: list[Tensor]) -> None:
        self.launches.append(Launch(flops, sum(map(touched, (*reads, *writes)))))
        self.tensors.append((reads, writes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        taken, results = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        self.given.update(storage_of(t) for t in taken if storage_of(t) not in self._made)
        self._made |= {storage_of(t): t for t in results if storage_of(t) not in self.given}
        if func.is_view or name.startswith("empty") or name in ("_unsafe_view", "detach"):
            return out
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        if name == "harmonica_rt::gap":  # of slots and rows it reads a few
            x, y, arena, rows, _, table = args[:6]
            reads = [x, arena.narrow(0, 0, len(table)), rows.select(0, 0).narrow(1, 0, len(table) + 2)]
            self.add(0, reads, [x, y] if len(table) else [y])
            return out
        given = [(i, t) for i, a in enumerate(args) for t in tree_leaves(a) if isinstance(t, Tensor)]
        reads = [t for i, t in given if i or name not in OVERWRITES]
        reads += [t for key, t in kwargs.items() if isinstance(t, Tensor) and key != "out"]
        self.add(flops, reads, results)
        return out


OVERWRITES = ("copy_", "fill_", "zero_")  # their first argument without reading it


def touched(t: Tensor) -> int:
    """Bytes of `t` in memory; what is expanded lies there once."""
    return t.element_size() * math.prod(size for size, stride in zip(t.shape, t.stride()) if stride)


def storage_of(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Flash attention as one op with its FLOPs and bytes: on the meta device torch would take the unfused form."""
    batch, heads, tokens, width = query.shape
    out = torch.empty(batch, tokens, heads, width, dtype=query.dtype, device=query.device).transpose(1, 2)
    if (record := Record.active) is not None:
        record.add(4 * batch * heads * tokens * key.shape[2] * width, [query, key, value], [out])
    return out


def diffusers_launches(model: nn.Module, schedule: hrt.Schedule, samples: int, reuse: bool) -> list[list[Launch]]:
    """Launches of each step of the diffusers model in eager mode, with module-level reuse if `reuse`."""
    size, steps = model.config.sample_size, []
    x = torch.empty(samples, model.config.in_channels, size, size, dtype=torch.bfloat16, device="meta")
    numbers = torch.empty(samples, dtype=torch.int64, device="meta")
    wrapped = ModuleReuse(model, schedule) if reuse else model
    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = attention
    try:
        for _ in range(schedule.steps if reuse else 1):
            with torch.no_grad(), Record() as record:
                wrapped(x, timestep=numbers, class_labels=numbers)
            steps.append(record.launches)
    finally:
        nn.functional.scaled_dot_product_attention = original
        if reuse:
            wrapped.remove()
    return steps if reuse else steps * schedule.steps


Record.active = None


def program_launches(adapter: Adapter, schedule: hrt.Schedule, samples: int, shared: int) -> list[list[Launch]]:
    """Launches of each step of the cudagraph backend, from the program's instructions."""
    config = adapter.model.config
    tokens, width = adapter.tokens(config.sample_size, config.sample_size), adapter.width
    rows = samples * tokens
    stream, row = SIZE * rows * width, SIZE * samples * width
    branches, _ = adapter.bind()

    def branch(entry: int) -> list[Launch]:
        launches = []
        for stage, columns in walk(fused(branches[entry].stages), width):
            numbers = rows * (columns + stage.columns(columns)) + stage.weights
            launches.append(Launch(2 * stage.macs(samples, tokens, columns, 0), SIZE * numbers))
        return launches

    steps = []
    for step in lower(schedule).steps:
        launches = around_launches(adapter, samples, shared)
        for gap in step.gaps:
            gates = len({term.entry for term in gap.terms})
            launches.append(Launch(0, stream * (2 + len(gap.terms) + bool(gap.terms)) + row * (2 + gates)))
            if gap.norm < len(branches):
                launches += branch(gap.norm)
        steps.append(launches)
    return steps


def around_launches(adapter: Adapter, samples: int, shared: int) -> list[Launch]:
    """A step's launches outside the blocks; `shared`: how many steps' modulation one call computes."""
    config, width = adapter.model.config, adapter.width
    rows = samples * adapter.tokens(config.sample_size, config.sample_size)
    inputs, outputs = (config.patch_size**2 * n for n in (config.in_channels, adapter.model.out_channels))
    macs = adapter.macs(None, None, samples)
    return [
        _gemm(rows, inputs, width),
        Launch(0, 3 * SIZE * rows * width),  # positions
        Launch(0, 2 * SIZE * rows * inputs),  # the sample's copy in
        Launch(0, 4),  # the step's number
        Launch(2 * macs.fixed, SIZE * samples * adapter.rows * width + SIZE * macs.fixed / samples / shared),
        _gemm(rows, width, outputs),
        *[Launch(0, 2 * SIZE * rows * outputs)] * 2,  # unpatchify, the output's copy out
    ]


def _gemm(rows: int, k: int, n: int) -> Launch:
    return Launch(2 * rows * k * n, SIZE * (rows * k + k * n + rows * n))


@dataclass(frozen=True)
class Counts:
    """Launches of a step: of a computed block, of a reused one (ours: of any run of them), around the blocks."""

    computed: float
    reused: float
    around: float


def diffusers_counts(name: str, samples: int) -> Counts:
    """Counted on the model with all its blocks and with one: the difference is the blocks'."""
    counts = []
    for layers in (None, 1):
        model = build(name, layers=layers)
        counts.append([len(s) for s in diffusers_launches(model, hrt.Schedule.uniform(model, 2, 2), samples, True)])
    more = REFERENCES[name].config["num_layers"] - 1
    computed, reused = ((many - one) / more for many, one in zip(*counts))
    return Counts(computed, reused, counts[1][0] - computed)


def program_counts(adapter: Adapter, samples: int) -> Counts:
    """Counted on the program: any run of reused blocks is part of one Gap."""
    schedule = hrt.Schedule.uniform(adapter.model, 2, 2)
    computed, reused = map(len, program_launches(adapter, schedule, samples, shared=2))
    around = len(around_launches(adapter, samples, shared=2))
    return Counts((computed - reused) / adapter.layers, reused - around, around)


def build(name: str, size: int | None = None, layers: int | None = None) -> nn.Module:
    reference = REFERENCES[name]
    with torch.device("meta"):
        config = {**reference.config, "sample_size": size or reference.size}
        config["num_layers"] = layers or config["num_layers"]
        model = DiTTransformer2DModel(**config)
    return model.to(torch.bfloat16).eval()


def predict(name: str, size: int | None, every: int, order: int, steps: int, images: int, assume: Assumptions) -> dict:
    """Predicted seconds a step, by GPU and candidate; the launches they come from."""
    model = build(name, size)
    schedule = hrt.Schedule.uniform(model, steps, every, order)
    adapter, samples = adapt(model), 2 * images
    full = hrt.Schedule.full(model, steps)
    launches = {
        "diffusers eager": diffusers_launches(model, full, samples, reuse=False),
        "torch.compile, full": program_launches(adapter, full, samples, shared=1),  # at best: fused as far as ours
        "module-level reuse": diffusers_launches(model, schedule, samples, reuse=True),
        "harmonica_rt, cudagraph": program_launches(adapter, schedule, samples, shared=steps),
    }
    seconds, around = {}, {}
    for gpu in GPUS:
        around[gpu.name] = assume.replayed(around_launches(adapter, samples, shared=steps), gpu)
        for candidate, run in launches.items():
            time = assume.replayed if candidate.endswith("cudagraph") else assume.launched
            seconds[gpu.name, candidate] = sum(time(step, gpu) for step in run) / steps
    return {
        "theoretical": schedule.speedup(model),
        "launches": {candidate: sum(map(len, run)) / steps for candidate, run in launches.items()},
        "seconds": seconds,
        "around": around,
    }


def count_table(name: str, samples: int) -> Table:
    """Counted, not predicted: launches do not depend on the GPU."""
    out = Table(title=f"COUNTED: launches a step, {name} (order 1)")
    for column in ("", "a computed block", "a reused block", "any run of reused blocks", "around the blocks"):
        out.add_column(column, justify="right" if column else "left")
    theirs, ours = diffusers_counts(name, samples), program_counts(adapt(build(name)), samples)
    out.add_row(
        "diffusers eager, module-level reuse", *_cells(theirs.computed, theirs.reused), "", *_cells(theirs.around)
    )
    out.add_row("harmonica_rt, cudagraph", *_cells(ours.computed), "", *_cells(ours.reused, ours.around))
    return out


def _cells(*counts: float) -> list[str]:
    return [f"{count:.0f}" for count in counts]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=DITS, default="dit-xl-2")
    parser.add_argument("--every", type=positive, default=2)
    parser.add_argument("--order", type=int, default=1)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--batch", type=positive, default=1, help="images; guidance doubles the samples")
    parser.add_argument("--launch-us", type=float, default=5.0)
    parser.add_argument("--node-us", type=float, default=1.0)
    parser.add_argument("--flops-fraction", type=float, default=0.6)
    parser.add_argument("--bandwidth-fraction", type=float, default=0.8)
    arguments = parser.parse_args(argv)
    assume = Assumptions(arguments.launch_us, arguments.node_us, arguments.flops_fraction, arguments.bandwidth_fraction)
    diffusers_logging.set_verbosity_error()
    console = Console(width=130)
    console.print(count_table(arguments.model, 2 * arguments.batch))
    for pixels, size in ((256, 32), (512, 64)):
        result = predict(
            arguments.model, size, arguments.every, arguments.order, arguments.steps, arguments.batch, assume
        )
        theoretical, seconds = result["theoretical"], result["seconds"]
        out = Table(
            title=f"PREDICTION: {arguments.model} {pixels}, batch {arguments.batch} with guidance, uniform, every "
            f"{arguments.every}, order {arguments.order}: ms a step (speed-up; of theory, {theoretical:.2f}x)",
            caption=f"not measured; {assume}",
        )
        out.add_column("launches a step")
        for candidate, count in result["launches"].items():
            out.add_column(f"{candidate}\n{count:.0f}", justify="right")
        out.add_column("of which\naround blocks", justify="right")
        for gpu in GPUS:
            eager, cells = seconds[gpu.name, "diffusers eager"], []
            for candidate in result["launches"]:
                now = seconds[gpu.name, candidate]
                reuses = candidate in ("module-level reuse", "harmonica_rt, cudagraph")
                realised = f"; {eager / now / theoretical:.2f}" if reuses else ""
                cells.append(f"{1e3 * now:.2f} ({eager / now:.2f}x{realised})")
            ours = seconds[gpu.name, "harmonica_rt, cudagraph"]
            out.add_row(gpu.name, *cells, f"{100 * result['around'][gpu.name] / ours:.1f} %")
        console.print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
