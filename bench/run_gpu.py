"""Everything this project wants to know from a CUDA machine, in one run: make bench-gpu.

The Gap kernel against the same ops in eager mode and under torch.compile (GB/s against the GPU's peak), run_latency
over schedules and models in bf16, capture time and memory. One JSON, one plot a run. Without CUDA it says so and exits
with 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import harmonica_rt as hrt
from bench import run_latency
from bench.measure import environment, interleave
from bench.pipelines import PixelDiTPipeline
from bench.reference import load_pipeline, noise

BACKENDS = ["eager", "inductor", "cudagraph"]
RUNS = (
    {"model": "dit-xl-2", "size": 32, "steps": 20},
    {"model": "dit-xl-2", "size": 64, "steps": 20},
    {"model": "dit-s-2", "size": 32, "steps": 20},
)
SCHEDULES = ("full", "uniform:2", "uniform:3")


def gap_candidates(
    batch: int, tokens: int, width: int, terms: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """Callables that do one Gap with layer norm each way and return y, and the bytes it moves."""
    from harmonica_rt.kernels.gap import bytes_moved, gap

    arena = torch.randn(max(terms, 1), batch, tokens, width, dtype=dtype, device=device)
    rows = torch.randn(1, batch, terms + 2, width, dtype=dtype, device=device)
    x, y = torch.randn(2, batch, tokens, width, dtype=dtype, device=device)
    pairs = [[k, 2 + k] for k in range(terms)]
    table = torch.tensor(pairs, dtype=torch.int32, device=device).view(-1, 2)
    weights = torch.full((terms,), 1e-3, device=device)
    step = torch.zeros(1, dtype=torch.int32, device=device)
    gates = [rows[0][:, 2 + k, None] for k in range(terms)]
    values = list(arena)[:terms]
    shift, scale = rows[0][:, 0, None], rows[0][:, 1, None]

    def ours() -> Tensor:
        gap(x, y, arena, rows, step, table, weights, "layer", 0, 1, 1e-6)
        return y

    def plain(x: Tensor, values: list[Tensor], gates: list[Tensor], shift: Tensor, scale: Tensor) -> list[Tensor]:
        for value, gate in zip(values, gates):
            x = x + 1e-3 * gate * value
        return [x, torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * scale + shift]

    compiled = torch.compile(plain, dynamic=False)
    candidates: dict[str, Callable[[], Tensor]] = {
        "harmonica_rt gap": ours,
        "torch, eager": lambda: plain(x, values, gates, shift, scale)[1],
        "torch.compile": lambda: compiled(x, values, gates, shift, scale)[1],
    }
    return candidates, bytes_moved(x, rows, table, "layer", 0, 1, None)


def measure_gap(device: str, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for batch, tokens, width in ((2, 256, 1152), (16, 256, 1152), (2, 1024, 1152)):
        for terms in (0, 1, 3, 8, 56):
            candidates, moved = gap_candidates(batch, tokens, width, terms, torch.bfloat16, device)

            def synced(run: Callable[[], Any]) -> Callable[[], None]:
                def timed() -> None:
                    for _ in range(20):
                        run()
                    torch.cuda.synchronize()

                return timed

            timings = interleave({name: synced(run) for name, run in candidates.items()}, rounds, warmup=3)
            for name, timing in timings.items():
                seconds = timing.median / 20
                shape = f"{batch}x{tokens}x{width}"
                rows.append(
                    {"name": name, "shape": shape, "terms": terms, "us": 1e6 * seconds, "gbps": moved / seconds / 1e9}
                )
    return rows


def measure_capture(model: str, size: int, steps: int) -> dict[str, Any]:
    """Time and memory that planning and capturing take."""
    pipeline = load_pipeline(model, size=size).to("cuda", torch.bfloat16)
    plan = run_latency.parse_schedule("uniform:2", pipeline, steps)
    start = noise(pipeline, 1).to("cuda", torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fast: PixelDiTPipeline = hrt.compile(pipeline, plan, backend="auto")
    fast(pipeline.examples(1), num_inference_steps=steps, latents=start, output_type="latent")
    torch.cuda.synchronize()
    (report,) = fast.transformer.report().plans
    return {
        "model": model,
        "size": size,
        "report": str(report),
        "bytes": torch.cuda.memory_allocated() - before,
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "graphs": report.graphs,
        "graph_seconds": report.graph_seconds,
        "launch_seconds": report.launch_seconds,
        "plan_seconds": report.seconds,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--rounds", type=run_latency.positive, default=7)
    arguments = parser.parse_args(argv)
    console = Console(width=160)
    if not torch.cuda.is_available():
        console.print("bench-gpu: expected a CUDA device, found none; nothing was measured")
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "environment": environment(),
        "gap": measure_gap("cuda", arguments.rounds),
        "capture": [measure_capture(**run) for run in RUNS],
        "latency": [],
    }
    out = Table(title=f"Gap on {result['gpu']}, bf16")
    for column in ("shape", "terms", "", "us", "GB/s"):
        out.add_column(column)
    for row in result["gap"]:
        out.add_row(row["shape"], str(row["terms"]), row["name"], f"{row['us']:.1f}", f"{row['gbps']:.0f}")
    console.print(out)
    for run in RUNS:
        for schedule in SCHEDULES:
            latency = run_latency.measure(
                schedule=schedule,
                backends=BACKENDS,
                batch=1,
                rounds=arguments.rounds,
                device="cuda",
                dtype=torch.bfloat16,
                **run,
            )
            console.print(run_latency.table(latency))
            run_latency.plot(
                latency, str(arguments.out / f"{run['model']}-{run['size']}-{schedule.replace(':', '-')}.png")
            )
            result["latency"].append(latency)
    (arguments.out / "gpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {arguments.out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
