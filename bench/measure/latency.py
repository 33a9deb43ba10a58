"""Whole runs of diffusers, torch.compile, module-level reuse and ours, from one noise, in turns, checked first."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import harmonica_rt as hrt
from bench.by_hand.block_reuse import by_hand
from bench.by_hand.wrapper import Wrapper
from bench.models.pipelines import PixelPipeline
from bench.models.reference import REFERENCES, load_pipeline, noise
from bench.models.schedule_specs import parse_schedule
from harmonica_rt.measuring import Timing, psnr, ratio
from harmonica_rt.models.blocks import block_lists
from harmonica_rt.report import Report
from harmonica_rt.train import models

from . import costs
from .environment import environment
from .launches import CountLaunches, count_generated
from .timing import interleave

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
