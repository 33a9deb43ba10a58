"""How close a schedule's images are to the full run's, from the same noise: PSNR on the trained reference model.

    python bench/run_quality.py --count 64

Fewer steps of the same sampler is the baseline to beat. CUR counts what is skipped of the full run's branches.
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
from bench.measure import environment, pooled_psnr, psnr
from bench.reference import GUIDANCE, PixelDiTPipeline, labels, load_pipeline, noise

MODEL = "dit-fashion"
SCHEDULES = ("uniform:2:0", "uniform:2:1", "uniform:3:0", "uniform:3:1", "uniform:4:0", "uniform:4:1")
FEWER = (14, 10, 7, 5)


def sample(pipeline: PixelDiTPipeline, start: Tensor, steps: int, batch: int = 16) -> Tensor:
    """Images as sampled, [count, channels, height, width]."""
    classes = labels(MODEL, len(start))
    parts = [
        pipeline(classes[i : i + batch], GUIDANCE, num_inference_steps=steps, latents=part, output_type="latent").images
        for i, part in zip(range(0, len(start), batch), start.split(batch))
    ]
    return torch.cat(parts)


def measure(
    schedules: tuple[str, ...],
    *,
    steps: int,
    count: int,
    seed: int,
    fewer: tuple[int, ...] = FEWER,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Run the comparison; the result is what ``--json`` writes."""
    pipeline = load_pipeline(MODEL)
    start = noise(pipeline, count, seed)
    progress(f"full run, {steps} steps")
    full = sample(pipeline, start, steps)
    rows = []
    for text in schedules:
        progress(text)
        schedule = run_latency.parse_schedule(text, pipeline, steps)
        hrt.compile(pipeline, schedule)
        try:
            rows.append(
                _row(text, schedule.cur, schedule.speedup(pipeline.transformer), sample(pipeline, start, steps), full)
            )
        finally:
            hrt.uncompile(pipeline)
    for less in (n for n in fewer if n < steps):
        progress(f"{less} steps")
        rows.append(_row(f"{less} steps", 1 - less / steps, steps / less, sample(pipeline, start, less), full))
    return {"model": MODEL, "steps": steps, "count": count, "seed": seed, "environment": environment(), "rows": rows}


def _row(name: str, cur: float, theoretical: float, images: Tensor, full: Tensor) -> dict[str, Any]:
    values = psnr(images, full)
    return {
        "name": name,
        "cur": cur,
        "theoretical": theoretical,
        "mean": values.mean().item(),
        "pooled": pooled_psnr(images, full),
        "worst": values.min().item(),
    }


def table(result: dict[str, Any]) -> Table:
    out = Table(
        title=f"{result['model']}, DDIM {result['steps']}, guidance {GUIDANCE}: PSNR to the full run, dB "
        f"({result['count']} noises, seed {result['seed']})",
        caption="mean: over images; pooled: of the error over all images; uniform:N:ORDER",
    )
    out.add_column("")
    for column in ("CUR %", "theoretical", "mean", "pooled", "worst"):
        out.add_column(column, justify="right")
    for row in result["rows"]:
        numbers = (f"{row[key]:.1f}" for key in ("mean", "pooled", "worst"))
        out.add_row(row["name"], f"{100 * row['cur']:.0f}", f"{row['theoretical']:.2f}x", *numbers)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schedule", action="append", help="uniform:N[:ORDER] or a file; may be repeated")
    parser.add_argument("--steps", type=run_latency.positive, default=20)
    parser.add_argument("--count", type=run_latency.positive, default=64, help="noises")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=run_latency.positive, default=1)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    with console.status("") as status:
        try:
            result = measure(
                tuple(arguments.schedule or SCHEDULES),
                steps=arguments.steps,
                count=arguments.count,
                seed=arguments.seed,
                progress=status.update,
            )
        except (ValueError, TypeError) as error:
            console.print(f"[red]error:[/red] {error}", soft_wrap=True)
            return 2
    console.print(table(result))
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
