"""Latency of a schedule on this runtime against diffusers eager, torch.compile and module-level reuse, in one run.

    python bench/run_latency.py --model dit-s-2 --steps 10 --schedule uniform:2

Every candidate samples the same noise through the same pipeline; rounds are interleaved; outputs are checked first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import harmonica_rt as hrt
from bench.arguments import positive
from bench.by_hand.block_reuse import by_hand
from bench.by_hand.wrapper import Wrapper
from bench.measure import breakdown, costs
from bench.measure.environment import environment
from bench.measure.launches import CountLaunches, count_generated
from bench.measure.timing import interleave
from bench.models.pipelines import PixelPipeline
from bench.models.reference import REFERENCES, load_pipeline, noise
from bench.models.schedule_specs import SPECS, parse_schedule
from harmonica_rt.cuda_graphs import CaptureFailed
from harmonica_rt.kernels.inductor import CompilerMissing
from harmonica_rt.measuring import Timing, psnr, ratio
from harmonica_rt.models.blocks import block_lists
from harmonica_rt.report import Report
from harmonica_rt.train import models

EAGER, COMPILED, NAIVE = "diffusers eager", "torch.compile, full", "module-level reuse"
# Relative error to module-level reuse that every candidate of ours must stay below to be timed
GATE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class WrongResult(RuntimeError):
    """A candidate does not compute what it should: nothing is timed."""


def measure(
    model: str,
    schedule: str | hrt.Schedule,
    *,
    backends: list[str],
    steps: int,
    batch: int,
    rounds: int,
    layers: int | None = None,
    size: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    compiled: bool = True,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Run the benchmark; the result is what ``--json`` writes."""
    on = torch.device(device)
    pipeline = load_pipeline(model, layers, size).to(on)
    if dtype != torch.float32:
        pipeline.to(dtype)
    guidance = REFERENCES[model].guidance if guidance is None else guidance
    if sampler is not None:
        pipeline.scheduler = models.scheduler(sampler, pipeline.scheduler.config)
    transformer = pipeline.transformer
    plan = parse_schedule(schedule, pipeline, steps) if isinstance(schedule, str) else schedule
    if plan.steps != steps:
        raise ValueError(f"--steps: the schedule has {plan.steps} steps, got {steps}")
    start, wanted = noise(pipeline, batch).to(on, dtype), pipeline.examples(batch)

    def sample(own: PixelPipeline) -> Tensor:
        images = own(wanted, guidance, num_inference_steps=steps, latents=start, output_type="latent").images
        _synchronize(on)
        return images

    def naive() -> Tensor:
        reuse = by_hand(transformer, plan)
        try:
            return sample(pipeline.around(reuse))
        finally:
            reuse.remove()

    progress(f"{model}: reference runs")
    full = sample(pipeline.around(counted := _Counted(transformer)))
    launches = {EAGER: counted.launches / steps}
    reuse = by_hand(transformer, plan)
    expected = sample(pipeline.around(counted := _Counted(reuse)))
    reuse.remove()
    launches[NAIVE] = counted.launches / steps
    candidates: dict[str, Callable[[], Tensor]] = {EAGER: lambda: sample(pipeline)}
    outputs, seconds = {EAGER: full, NAIVE: expected}, {EAGER: 0.0, NAIVE: 0.0}
    if compiled:
        progress(f"{model}: torch.compile of the whole model")
        from torch._inductor.utils import run_and_get_code

        whole = pipeline.around(torch.compile(transformer))
        started = time.perf_counter()
        outputs[COMPILED], sources = run_and_get_code(sample, whole)
        seconds[COMPILED] = time.perf_counter() - started - _seconds(lambda: sample(whole))
        launches[COMPILED] = float(count_generated(sources))
        candidates[COMPILED] = lambda: sample(whole)
        _gate(COMPILED, outputs[COMPILED], full, 10 * GATE[dtype])
    candidates[NAIVE] = naive
    reports = {}
    around = _around_steps(pipeline, plan, sample) if plan.level == "branches" else 0
    for backend in backends:
        name = f"harmonica_rt, {backend}"
        progress(f"{model}: {name}")
        fast = hrt.compile(pipeline.around(transformer), plan, backend=backend)
        outputs[name] = sample(fast)
        _gate(name, outputs[name], expected, GATE[dtype])
        report = reports[name] = fast.transformer.report()
        if report.level != "branches":  # the model's own forward: its ops are dispatched, but within compiled blocks
            launches[name] = None
            if report.plans[0].backend == "eager":
                sample(counting := _counted(pipeline, plan, backend))
                launches[name] = counting.transformer.launches / steps
        else:
            launches[name] = (sum(sum(each.launches) for each in report.plans) + around) / steps
        seconds[name] = sum(each.seconds for each in report.plans)
        candidates[name] = lambda fast=fast: sample(fast)
    progress(f"{model}: {rounds} rounds of {len(candidates)} candidates")
    timings = interleave(candidates, rounds)
    theoretical = costs.theoretical(next(iter(reports.values())))
    return {
        "model": model,
        "schedule": Path(schedule).stem if isinstance(schedule, str) else schedule.note,
        "cur": plan.cur,
        "order": plan.order,
        "steps": steps,
        "batch": batch,
        "sampler": type(pipeline.scheduler).__name__.removesuffix("Scheduler"),
        "guidance": guidance,
        "layers": sum(map(len, block_lists(transformer).values())),
        "size": pipeline.shape[-1],
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(on) if on.type == "cpu" else torch.cuda.get_device_name(on),
        "rounds": rounds,
        "theoretical": theoretical,
        "environment": environment(),
        "rows": [
            _row(name, timings, theoretical, steps, batch)
            | {
                "launches_per_step": launches[name],
                "compile_seconds": seconds[name],
                "slot_bytes": costs.slot_bytes(reports[name]) if name in reports else None,
                "slot_share": _slot_share(reports[name]) if name in reports else None,
                "psnr": _mean_psnr(outputs[name], full) if REFERENCES[model].trained else None,
            }
            for name in candidates
        ],
    }


def _slot_share(report: Report) -> float:
    """Of the model's weights."""
    return costs.slot_bytes(report) / report.plans[0].model_bytes


def _row(name: str, timings: dict[str, Timing], theoretical: float, steps: int, batch: int) -> dict[str, Any]:
    timing, reuses = timings[name], name not in (EAGER, COMPILED)
    speedup = ratio(timings[EAGER], timing)
    over_compiled = ratio(timings[COMPILED], timing) if COMPILED in timings else None
    return {
        "name": name,
        "ms_per_image": 1e3 * timing.median / batch,
        "ms_per_image_p20": 1e3 * timing.percentile(20) / batch,
        "ms_per_image_p80": 1e3 * timing.percentile(80) / batch,
        "ms_per_step": 1e3 * timing.median / steps,
        "speedup": speedup,
        "speedup_over_compile": over_compiled,
        "realised": speedup / theoretical if reuses else None,
        "realised_over_compile": over_compiled / theoretical if reuses and over_compiled else None,
        "seconds": list(timing.seconds),
    }


class _Counted(Wrapper):
    """`model`, its launches counted: those of the sampler around it are the same for all."""

    launches = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with CountLaunches() as counter:
            output = self.model(*args, **kwargs)
        self.launches += counter.count
        return output


def _counted(pipeline: PixelPipeline, plan: hrt.Schedule, backend: str) -> PixelPipeline:
    """A pipeline of its own compiled for `plan`, launches counted."""
    own = hrt.compile(pipeline.around(pipeline.transformer), plan, backend=backend)
    object.__setattr__(own, "transformer", _Counted(own.transformer))
    return own


def _around_steps(pipeline: PixelPipeline, plan: hrt.Schedule, sample: Callable[[PixelPipeline], Tensor]) -> int:
    """Launches of a run of ours outside its programs' steps: modulation, once a run, and looking at the labels.

    Counted on the eager backend, where every launch is dispatched; it is the same code on all backends.
    """
    sample(own := _counted(pipeline, plan, "eager"))
    return own.transformer.launches - sum(sum(plan.launches) for plan in own.transformer.model.report().plans)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _mean_psnr(images: Tensor, full: Tensor) -> float | None:
    return None if torch.equal(images, full) else psnr(images, full).mean().item()


def _gate(name: str, output: Tensor, expected: Tensor, tolerance: float) -> None:
    error = ((output - expected).abs().max() / expected.abs().max()).float().item()
    if not error <= tolerance:  # NaN fails too
        raise WrongResult(f"{name}: relative error {error:.1e}, expected at most {tolerance:.0e}; nothing was timed")


def table(result: dict[str, Any]) -> Table:
    """The result as people read it."""
    env = result["environment"]
    title = (
        f"{result['model']}, {result['layers']} layers, {result['sampler']} {result['steps']}, batch {result['batch']}"
        f"{' with guidance' if result['guidance'] > 1 else ''}, {result['schedule']}: "
        f"CUR {100 * result['cur']:.0f} %, theoretical {result['theoretical']:.2f}x"
    )
    where = f"{env['cpu']}, {env['threads']} thread(s)" if result["device"] == "cpu" else result["device"]
    caption = f"{where}, {result['dtype']}, torch {env['torch']}, {result['rounds']} rounds, median"
    out = Table(title=title, caption=f"{caption}; commit {env['commit']}")
    out.add_column("")
    for column in (
        "ms/image",
        "p20-p80",
        "ms/step, batch",
        "speed-up",
        "realised",
        "vs compile",
        "launches",
        "slots",
        "compile s",
        "PSNR",
    ):
        out.add_column(column, justify="right", no_wrap=True)
    for row in result["rows"]:
        slots = (
            "" if row["slot_bytes"] is None else f"{row['slot_bytes'] / 2**20:.1f} MiB, {100 * row['slot_share']:.0f} %"
        )
        out.add_row(
            row["name"],
            f"{row['ms_per_image']:.1f}",
            f"{row['ms_per_image_p20']:.1f}-{row['ms_per_image_p80']:.1f}",
            f"{row['ms_per_step']:.1f}",
            f"{row['speedup']:.2f}x",
            _or_blank(row["realised"]),
            _or_blank(row["realised_over_compile"]),
            _or_blank(row["launches_per_step"], ".0f"),
            slots,
            f"{row['compile_seconds']:.1f}",
            _or_blank(row["psnr"], ".1f"),
        )
    return out


def _or_blank(value: float | None, form: str = ".2f") -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def plot(result: dict[str, Any], path: str) -> None:
    """Bars: ms an image of every candidate, and the time the theory allows."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(8, 0.7 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    values = [row["ms_per_image"] for row in rows]
    errors = [
        [v - r["ms_per_image_p20"] for v, r in zip(values, rows)],
        [r["ms_per_image_p80"] - v for v, r in zip(values, rows)],
    ]
    colours = ["#1f4e79" if row["name"].startswith("harmonica_rt") else "#a9b8c6" for row in rows]
    bars = axes.barh([row["name"] for row in rows], values, xerr=errors, color=colours, ecolor="#333333", capsize=3)
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none"}
    axes.bar_label(bars, [f"{row['speedup']:.2f}x" for row in rows], label_type="center", bbox=box)
    axes.axvline(values[0] / result["theoretical"], color="#c0392b", linestyle="--", linewidth=1)
    axes.annotate(
        f"theoretical {result['theoretical']:.2f}x",
        (values[0] / result["theoretical"], len(rows) - 0.55),
        xytext=(4, 0),
        textcoords="offset points",
        color="#c0392b",
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(values))
    axes.set_xlabel("ms an image (median; whiskers p20 to p80)")
    axes.set_title(
        f"{result['model']}, {result['layers']} layers, {result['sampler']} {result['steps']}, "
        f"batch {result['batch']}, {result['schedule']}: CUR {100 * result['cur']:.0f} %",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=REFERENCES, default="dit-fashion")
    parser.add_argument("--schedule", default="uniform:2", help=f"{SPECS} or a schedule file")
    parser.add_argument("--backend", default="eager,inductor", help="one of ours, or several with commas")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--batch", type=positive, default=1, help="images a call; guidance doubles the samples")
    parser.add_argument("--sampler", choices=models.SAMPLERS, help="unless given, the model's own")
    parser.add_argument("--guidance", type=float, help="1 turns guidance off; unless given, the model's own")
    parser.add_argument("--layers", type=positive, help="shrink a published architecture")
    parser.add_argument("--size", type=positive, help="side of a published architecture's latent")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the whole model")
    parser.add_argument(
        "--keep-cache", action="store_true", help="use TorchInductor's cache: compile times are not cold"
    )
    parser.add_argument("--profile", metavar="PNG", help="where ours spends its time instead: a table, and a plot")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="PNG")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as cache, console.status("") as status:
        if not arguments.keep_cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        try:
            if arguments.profile is not None:
                for printed in _profile(arguments, status.update):
                    console.print(printed)
                return 0
            result = measure(
                arguments.model,
                arguments.schedule,
                backends=arguments.backend.split(","),
                steps=arguments.steps,
                batch=arguments.batch,
                rounds=arguments.rounds,
                layers=arguments.layers,
                size=arguments.size,
                guidance=arguments.guidance,
                sampler=arguments.sampler,
                compiled=not arguments.no_compile,
                device=arguments.device,
                dtype=getattr(torch, arguments.dtype),
                progress=status.update,
            )
        except (ValueError, TypeError, WrongResult, CompilerMissing, CaptureFailed) as error:
            console.print(f"[red]error:[/red] {error}", soft_wrap=True)
            return 2
    console.print(table(result))
    for path, write in [(arguments.json, _write_json), (arguments.plot, plot)]:
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write(result, path)
    return 0


def _profile(arguments: argparse.Namespace, progress: Callable[[str], None]) -> list[Table]:
    """A table for each backend; the plot is of the last one."""
    if arguments.device != "cpu":
        raise ValueError(f"--profile: expected --device cpu, where a call's time is its work, got {arguments.device}")
    pipeline = load_pipeline(arguments.model, arguments.layers, arguments.size)
    guidance = REFERENCES[arguments.model].guidance if arguments.guidance is None else arguments.guidance
    if arguments.sampler is not None:
        pipeline.scheduler = models.scheduler(arguments.sampler, pipeline.scheduler.config)
    schedule = parse_schedule(arguments.schedule, pipeline, arguments.steps)
    if schedule.level != "branches":
        raise ValueError(f"--profile: expected a schedule of level branches, got one of level {schedule.level}")
    start, wanted = noise(pipeline, arguments.batch), pipeline.examples(arguments.batch)

    def sample(own: PixelPipeline) -> Tensor:
        return own(wanted, guidance, num_inference_steps=arguments.steps, latents=start, output_type="latent").images

    progress(f"{arguments.model}: diffusers")
    full = interleave({EAGER: lambda: sample(pipeline)}, arguments.rounds)[EAGER].median
    theoretical, tables = schedule.speedup(pipeline.transformer, context=pipeline.context), []
    for backend in arguments.backend.split(","):
        progress(f"{arguments.model}: harmonica_rt, {backend}")
        found = breakdown.profile(pipeline.around(pipeline.transformer), schedule, backend, sample, arguments.rounds)
        title = f"{arguments.model}, {arguments.schedule}, batch {arguments.batch}: harmonica_rt, {backend}"
        tables.append(breakdown.table(found, full, theoretical, title))
        breakdown.plot(found, title, arguments.profile)
    return tables


def _write_json(result: dict[str, Any], path: str) -> None:
    Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
