"""The main job on the reference model: the same noise sampled in full and accelerated, as pictures and numbers.

make demo
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

import harmonica_rt as hrt
from bench.arguments import positive
from bench.measure import latency, latency_shown
from bench.models.reference import CLASSES, noise
from bench.models.sampling import Sampling
from bench.models.schedule_specs import parse_schedule
from harmonica_rt.measuring import psnr

MODEL, STEPS = "dit-fashion", 20
SCHEDULES = Path(__file__).parent / "schedules"
SCHEDULE = str(SCHEDULES / "dit-fashion-ddim20-2x.json")
CONVERGED = SCHEDULES / "dit-fashion-ddim20-2.9x-converged.json"
CONVERGED_COUNT = 16  # noises; each takes 100 steps
TEXTS = {  # models that read prompts, and a schedule of each: a name and what it is
    "pixart-emoji": ("2x, learned", str(SCHEDULES / "pixart-emoji-dpmsolver++20-2x-trunk.safetensors")),
    "flux-emoji": ("every 2nd step,\nits output forecast", "output:2"),
}
PROMPTS = 12
AMPLIFIED = 8


def grid(rows: list[tuple[str, Tensor]], names: list[str], path: Path) -> None:
    """One row a set of images in [0, 1], one column a noise."""
    figure = Figure(figsize=(1.05 * len(names) + 1.5, 1.1 * len(rows) + 0.5), layout="constrained")
    for row, axes_row in zip(rows, figure.subplots(len(rows), len(names), squeeze=False)):
        title, images = row
        for column, axes in enumerate(axes_row):
            pixels = images[column].permute(1, 2, 0).numpy()  # one channel or three
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if row is rows[0]:
                axes.set_title("\n".join(textwrap.wrap(names[column], 12)), fontsize=8)
            if column == 0:
                axes.set_ylabel(title, fontsize=8)
    figure.savefig(path, dpi=150)


def visible(images: Tensor) -> Tensor:
    return (images / 2 + 0.5).clamp(0, 1)


def difference(images: Tensor, reference: Tensor) -> Tensor:
    return (AMPLIFIED * (images - reference).abs() / 2).clamp(0, 1)


def closer(sampling: Sampling, start: Tensor, full: Tensor, backend: str, path: Path) -> tuple[float, float]:
    """Draw the converged solution, the full run and CONVERGED's from the same noises.

    Returns:
        Mean PSNR to the converged solution of the full run and of the accelerated one, dB.
    """
    truth = sampling.converged(start)
    hrt.compile(sampling.pipeline, hrt.Schedule.load(CONVERGED), backend=backend)
    fast = sampling(start, STEPS)
    hrt.uncompile(sampling.pipeline)
    values = [psnr(images, truth).mean().item() for images in (full, fast)]
    shown = min(10, len(start))
    rows = [("converged", visible(truth))]
    for (name, images), value in zip((("full, 20 steps", full), ("2.9x, learned", fast)), values):
        rows += [(f"{name}\n{value:.1f} dB", visible(images)), (f"difference\nx{AMPLIFIED}", difference(images, truth))]
    grid([(name, images[:shown]) for name, images in rows], _names(shown), path)
    return values[0], values[1]


def prompted(backend: str, path: Path) -> dict[str, float]:
    """Draw prompts with each of TEXTS in full, and below with its schedule from the same noises.

    Returns:
        Mean PSNR between the two, dB, by model.
    """
    rows, values = [], {}
    for model, (name, text) in TEXTS.items():
        sampling = Sampling.of(model)
        start = noise(sampling.pipeline, PROMPTS)
        full = sampling(start, STEPS)
        schedule = parse_schedule(text, sampling.pipeline, STEPS)
        hrt.compile(sampling.pipeline, schedule, backend=backend)
        fast = sampling(start, STEPS)
        values[model] = psnr(fast, full).mean().item()
        rows += [(f"{model},\nfull", visible(full)), (f"{name}\n{values[model]:.1f} dB", visible(fast))]
    grid(rows, sampling.labels(PROMPTS), path)
    return values


def _names(count: int) -> list[str]:
    return [CLASSES[i % len(CLASSES)] for i in range(count)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--schedule", default=SCHEDULE, help="uniform:N[:ORDER] or a schedule file")
    parser.add_argument("--count", type=positive, default=64, help="noises that PSNR is taken on")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--backend", choices=("auto", "eager"), default="auto", help="eager compiles nothing")
    parser.add_argument("--threads", type=positive, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console, out = Console(width=160), arguments.out
    out.mkdir(parents=True, exist_ok=True)

    sampling = Sampling.of(MODEL)
    pipeline = sampling.pipeline
    try:
        schedule = parse_schedule(arguments.schedule, pipeline, STEPS)
    except ValueError as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True)
        return 2
    schedule.plot(out / "schedule.png")
    console.print(str(schedule), highlight=False)
    start = noise(pipeline, arguments.count)
    with console.status(f"sampling {arguments.count} images in full"):
        began = time.perf_counter()
        full = sampling(start, STEPS)
        seconds_full = time.perf_counter() - began
    with console.status(f"compiling, then sampling {arguments.count} images with the schedule"):
        hrt.compile(pipeline, schedule, backend=arguments.backend)
        sampling(start[:16], STEPS)
        began = time.perf_counter()
        fast = sampling(start, STEPS)
        seconds_fast = time.perf_counter() - began
        report = pipeline.transformer.report()
        hrt.uncompile(pipeline)
    console.print(str(report), highlight=False)
    shown = min(10, arguments.count)
    rows = [
        ("full", visible(full)),
        ("accelerated", visible(fast)),
        (f"difference\nx{AMPLIFIED}", difference(fast, full)),
    ]
    grid([(name, images[:shown]) for name, images in rows], _names(shown), out / "images.png")
    with console.status("sampling the converged solution, and the schedule that aims at it"):
        some = start[:CONVERGED_COUNT]
        uncached, aimed = closer(sampling, some, full[:CONVERGED_COUNT], arguments.backend, out / "converged.png")
    with console.status("sampling prompts in full and accelerated"):
        text = prompted(arguments.backend, out / "text.png")

    compiles = report.plans[0].backend == "inductor"
    with console.status("") as status:
        result = latency.measure(
            MODEL,
            arguments.schedule,
            backends=["eager", "inductor"] if compiles else ["eager"],
            steps=STEPS,
            batch=4,
            rounds=arguments.rounds,
            compiled=compiles,
            progress=status.update,
        )
    console.print(latency_shown.table(result))
    latency_shown.plot(result, str(out / "latency.png"))
    values = psnr(fast, full)
    best = result["rows"][-1]
    result["demo"] = {
        "psnr_mean": values.mean().item(),
        "psnr_worst": values.min().item(),
        "count": arguments.count,
        "converged": {"full": uncached, "learned": aimed},
        "text": text,
    }
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {out}/: images.png, converged.png, text.png, schedule.png, latency.png, demo.json")
    console.print(
        f"Seen: with {100 * schedule.cur:.0f} % of its branches reused, {MODEL} samples {best['speedup']:.2f}x as "
        f"fast as diffusers (theory: {result['theoretical']:.2f}x), {values.mean():.1f} dB PSNR from the full run's "
        f"images on average (worst {values.min():.1f}) over {arguments.count} noises; "
        f"{arguments.count} images took {seconds_fast:.1f} s, not {seconds_full:.1f} s. To the converged solution a "
        f"schedule that aims at it has {aimed:.1f} dB with a third of the work, the full run {uncached:.1f} "
        f"({len(some)} noises). Prompts drawn with half the work: "
        f"{', '.join(f'{value:.1f} dB from the full run by {model}' for model, value in text.items())} "
        f"({PROMPTS} prompts).",
        soft_wrap=True,
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
