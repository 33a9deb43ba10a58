"""How time and memory grow with batch, tokens, layers and steps, with fitted exponents.

python bench/run_scale.py --json out/scale.json --plot out/scale.png
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import harmonica_rt as hrt
from bench.arguments import positive
from bench.measure.environment import environment
from bench.measure.timing import interleave
from bench.models.reference import REFERENCES
from harmonica_rt.lowering import lower

BASE = {"batch": 2, "tokens": 256, "layers": 4, "steps": 20}
AXES = {
    "batch": (1, 2, 4, 8, 16),
    "tokens": (64, 256, 1024, 4096),
    "layers": (2, 4, 8, 16),
    "steps": (10, 20, 50, 100),
}
# What is measured, its unit, and what makes a number of a point
COLUMNS = ("diffusers ms", "full ms", "reused ms", "reuse us/entry", "slots MiB", "plan s", "lowering ms")


def model(layers: int, tokens: int) -> DiTTransformer2DModel:
    """DiT-S/2's width and heads."""
    torch.manual_seed(0)
    size = 2 * round(tokens**0.5)
    config = {**REFERENCES["dit-s-2"].config, "num_layers": layers, "sample_size": size}
    return DiTTransformer2DModel(**config).eval()


@torch.no_grad()
def point(backend: str, rounds: int, batch: int, tokens: int, layers: int, steps: int) -> dict[str, float]:
    """One measurement: medians of a step of diffusers, of ours computing all, of ours reusing all."""
    transformer = model(layers, tokens)
    size = transformer.config.sample_size
    sample, labels = torch.randn(batch, 4, size, size), torch.zeros(batch, dtype=torch.long)
    timesteps = np.linspace(990, 10, steps).round().tolist()
    schedule = hrt.Schedule.uniform(transformer, steps, every=2, order=1, timesteps=timesteps)
    began = time.perf_counter()
    lower(schedule)
    lowering = time.perf_counter() - began
    fast = hrt.compile(transformer, schedule, backend=backend)

    def call(step: int) -> Callable[[], Any]:
        t = torch.full((batch,), timesteps[step])
        return lambda: fast(sample, timestep=t, class_labels=labels)

    for step in range(3):  # makes the plan; slots have two values each
        call(step)()
    t = torch.full((batch,), timesteps[0])
    (plan,) = fast._plans.values()
    timings = interleave(
        {
            "diffusers": lambda: transformer(sample, timestep=t, class_labels=labels),
            "full": lambda: plan.run_plainly(2, sample),
            "reused": lambda: plan.run_plainly(3, sample),
        },
        rounds,
    )
    diffusers, full, reused = (1e3 * timings[name].median for name in ("diffusers", "full", "reused"))
    report = fast.report().plans[0]
    values = (
        diffusers,
        full,
        reused,
        1e3 * reused / (2 * layers),
        report.slot_bytes / 2**20,
        report.seconds,
        1e3 * lowering,
    )
    return dict(zip(COLUMNS, values))


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of log y over log x, by least squares; NaN for a single point."""
    if len(x) < 2:
        return float("nan")
    return float(np.polyfit(np.log(x), np.log(np.maximum(y, 1e-9)), 1)[0])


def measure(
    backend: str, rounds: int, largest: dict[str, int], progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    rows = []
    for axis, values in AXES.items():
        for value in (v for v in values if v <= largest[axis]):
            progress(f"{axis} {value}")
            rows.append({"axis": axis, "value": value, **point(backend, rounds, **{**BASE, axis: value})})
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    out = Table(title=title, caption="exponents: least squares of log over log; reused: everything but the head")
    for column in ("", *COLUMNS):
        out.add_column(column, justify="right" if column else "left")
    for axis in dict.fromkeys(row["axis"] for row in rows):
        own = [row for row in rows if row["axis"] == axis]
        for row in own:
            out.add_row(f"{axis} {row['value']}", *(f"{row[column]:.3g}" for column in COLUMNS))
        x = [row["value"] for row in own]
        slopes = (f"^{exponent(x, [row[column] for row in own]):.2f}" for column in COLUMNS)
        out.add_row(f"[bold]{axis}, exponent[/bold]", *slopes, end_section=True)
    return out


def plot(rows: list[dict[str, Any]], path: str) -> None:
    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(4 * len(axes_names), 3.6), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(axes_names), squeeze=False)[0], axes_names):
        own = [row for row in rows if row["axis"] == axis]
        for column in COLUMNS[:3]:
            axes.loglog([row["value"] for row in own], [row[column] for row in own], marker="o", label=column)
        axes.set_xlabel(axis)
        axes.set_ylabel("ms a step")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=1)
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", type=positive, default=values[-1], help=f"largest, of {values}")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="PNG")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console(width=140)
    with console.status("") as status:
        largest = {axis: getattr(arguments, axis) for axis in AXES}
        rows = measure(arguments.backend, arguments.rounds, largest, status.update)
    base = ", ".join(f"{name} {value}" for name, value in BASE.items())
    console.print(table(rows, f"DiT-S/2's width, else {base}; {arguments.backend}, {arguments.threads} thread(s)"))
    for path in filter(None, (arguments.json, arguments.plot)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    if arguments.json:
        result = {"base": BASE, "environment": environment(), "rows": rows}
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
