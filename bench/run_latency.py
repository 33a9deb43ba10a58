"""Latency of a schedule on this runtime against diffusers eager, torch.compile and module-level reuse, in one run.

    python bench/run_latency.py --model dit-s-2 --steps 10 --schedule uniform:2

Every candidate samples the same noise through the same pipeline; rounds are interleaved; outputs are checked first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.arguments import positive
from bench.measure import breakdown
from bench.measure.latency import EAGER, WrongResult, measure
from bench.measure.latency_shown import plot, table
from bench.measure.timing import interleave
from bench.models.pipelines import PixelPipeline
from bench.models.reference import REFERENCES, load_pipeline, noise
from bench.models.schedule_specs import SPECS, parse_schedule
from harmonica_rt.cuda_graphs import CaptureFailed
from harmonica_rt.kernels.inductor import CompilerMissing
from harmonica_rt.train import models


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
