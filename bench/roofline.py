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
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.table import Table

import harmonica_rt as hrt
from bench.arguments import positive
from bench.measure.dit_launches import (
    around_launches,
    build,
    diffusers_counts,
    diffusers_launches,
    program_counts,
    program_launches,
)
from bench.measure.gpu_time import GPUS, Assumptions
from bench.models.reference import REFERENCES
from harmonica_rt.models import adapt

DITS = [name for name, reference in REFERENCES.items() if reference.kind == "dit" and not reference.trained]


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
