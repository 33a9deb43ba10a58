"""Which level for whom: uniform schedules at every level, on the three trained models, at rising guidance.

    python bench/run_which_level.py              # PSNR to the same sampler's full run; any machine, however busy
    python bench/run_which_level.py --time       # speed-up, interleaved with diffusers' own full run; a quiet machine
    python bench/run_which_level.py --table      # what is there so far

A point is a line of JSON in ``--out`` as soon as it is known; the same command again goes on with those that are
missing. Points of other weights than the model's are not taken for its own.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import harmonica_rt as hrt
from bench.arguments import positive
from bench.compare import level_tables
from bench.compare.level_tables import LEVELS
from bench.compare.store import Store
from bench.measure import costs
from bench.measure.timing import interleave
from bench.models.reference import REFERENCES, TRAINED, noise, weights_digest
from bench.models.sampling import Sampling, accelerated
from bench.models.schedule_specs import parse_schedule
from harmonica_rt.measuring import psnr, ratio
from harmonica_rt.models import ADAPTERS
from harmonica_rt.report import Report

GUIDANCE = (1.0, 1.5, 3.0, 4.5, 7.5)
EVERY, ORDERS = (2, 3), (0, 1, 2)
CONTEXTS = ("all", "cond", "uncond")  # which reuse; the others compute at every step
HELD_OUT = 500_000  # seed of the noises; training's are elsewhere
COST = {"dit-fashion": 1.0, "pixart-emoji": 1.25, "flux-emoji": 1.45}  # of guided full runs, for the time left
TIMED = 4  # images of a timed call


@dataclass(frozen=True)
class Job:
    """What a results file is about.

    Attributes:
        count: images a point, a multiple of `batch`, so that one plan serves all.
    """

    steps: int = 20
    count: int = 64
    batch: int = 16
    seed: int = HELD_OUT

    def __post_init__(self) -> None:
        if self.count % self.batch:
            raise ValueError(f"--count: expected a multiple of --batch, {self.batch}, got {self.count}")


@dataclass(frozen=True)
class Point:
    """A line of the file.

    Attributes:
        kind: "quality" or "time".
        weights: the model's, as `weights_digest` tells them.
        guidance: of a time 1 or the model's own: its value costs nothing.
        contexts: of `CONTEXTS`.
        level: of `level_tables.LEVELS`.
        backend: of a time.
    """

    kind: str
    model: str
    weights: str
    guidance: float
    contexts: str
    every: int
    order: int
    level: str
    backend: str = "eager"

    @property
    def share(self) -> float:
        """What it costs, of a guided full run of dit-fashion."""
        return _full_share(self.model, self.guidance) / self.every


def _full_share(model: str, guidance: float) -> float:
    return COST[model] * (1.0 if guidance > 1 else 0.5)


@cache
def sampling_of(model: str, guidance: float) -> Sampling:
    return Sampling.of(model, guidance=guidance)


@cache
def digest_of(model: str) -> str:
    return weights_digest(sampling_of(model, 1.0).pipeline.transformer)


def schedules(point: Point, steps: int) -> hrt.Schedule | dict[str, hrt.Schedule]:
    """What the point's pipeline is compiled for."""
    pipeline = sampling_of(point.model, point.guidance).pipeline
    schedule = parse_schedule(LEVELS[point.level].format(every=point.every, order=point.order), pipeline, steps)
    if point.contexts == "all":
        return schedule
    full = schedule.replace(compute=schedule.compute | True, output=schedule.output & False)
    return {name: schedule if name == point.contexts else full for name in CONTEXTS[1:]}


class Qualities:
    """Full runs, each made once, and the points measured against them."""

    def __init__(self, job: Job) -> None:
        self.job, self.fulls = job, {}

    def full(self, model: str, guidance: float) -> tuple[Tensor, Tensor]:
        """Noises and the full run's images."""
        if (model, guidance) not in self.fulls:
            sampling = sampling_of(model, guidance)
            start = noise(sampling.pipeline, self.job.count, self.job.seed)
            self.fulls[model, guidance] = start, sampling(start, self.job.steps, self.job.batch)
        return self.fulls[model, guidance]

    def __call__(self, point: Point) -> dict[str, Any]:
        sampling, (start, full) = sampling_of(point.model, point.guidance), self.full(point.model, point.guidance)
        with accelerated(sampling.pipeline, schedules(point, self.job.steps), backend="eager"):
            values = psnr(sampling(start, self.job.steps, self.job.batch), full)
            report = sampling.pipeline.transformer.report()
        return {"mean": values.mean().item(), "worst": values.min().item()} | _costs(report, self.job.batch)


def _costs(report: Report, batch: int) -> dict[str, float]:
    """Columns of both kinds of point."""
    return {
        "theoretical": costs.theoretical(report),
        "slots": sum(plan.slots for plan in report.plans),
        "slot_bytes": costs.slot_bytes(report) // batch,  # an image's
    }


def times(points: list[Point], steps: int, rounds: int) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Speed-ups over diffusers' own full run, all timed in turn in each round; of one model and guidance."""
    sampling = sampling_of(points[0].model, points[0].guidance)
    start, own = noise(sampling.pipeline, TIMED), {}

    def run(pipeline: Any) -> Callable[[], Tensor]:
        return lambda: Sampling(pipeline, sampling.guidance)(start, steps, TIMED)

    for point in points:
        pipeline = sampling.pipeline.around(sampling.pipeline.transformer)
        own[point] = hrt.compile(pipeline, schedules(point, steps), backend=point.backend, strict=True)
    timings = interleave({"full": run(sampling.pipeline)} | {p: run(own[p]) for p in points}, rounds)
    for point in points:
        timing = timings[point]
        yield (
            point,
            {
                "timed": point.backend,
                "speedup": ratio(timings["full"], timing),
                "ms_per_image": 1e3 * timing.median / TIMED,
                "ms_per_image_full": 1e3 * timings["full"].median / TIMED,
                "rounds": rounds,
            }
            | _costs(own[point].transformer.report(), TIMED),
        )


def points(arguments: argparse.Namespace) -> list[Point]:
    """Everything asked for: a model's guidances one after another, cheap ones first."""
    found = []
    for model in arguments.model:
        pipeline = sampling_of(model, 1.0).pipeline
        branches = type(pipeline.transformer).__name__ in ADAPTERS
        if arguments.contexts != "all" and pipeline.batched_guidance:
            raise ValueError(f"--contexts: expected all for {model}, guided in one call, got {arguments.contexts}")
        guidances = (1.0, REFERENCES[model].guidance) if arguments.time else arguments.guidance
        for guidance, every, order in itertools.product(guidances, arguments.every, arguments.order):
            for level in LEVELS if branches else [level for level in LEVELS if level != "branches"]:
                kind, backend = ("time", arguments.backend) if arguments.time else ("quality", "eager")
                where = (model, digest_of(model), guidance, arguments.contexts)
                found.append(Point(kind, *where, every, order, level, backend))
    return found


def measure(wanted: list[Point], job: Job, store: Store, rounds: int, progress: Progress) -> None:
    """Measure what `store` lacks of `wanted`, and put it there."""
    missing = [point for point in wanted if tuple(asdict(point).values()) not in store]
    qualities, total = Qualities(job), sum(point.share for point in missing)
    groups = [list(group) for _, group in itertools.groupby(missing, lambda p: (p.model, p.guidance, p.every, p.order))]
    fulls = {(p.model, p.guidance) for p in missing} if missing and missing[0].kind == "quality" else set()
    total += sum(_full_share(*each) for each in fulls)
    if missing and missing[0].kind == "time":
        total += sum(_full_share(group[0].model, group[0].guidance) for group in groups)
    task = progress.add_task("", total=total)
    for group in groups:
        first = group[0]
        name = f"{first.model}, guidance {first.guidance:g}, every {first.every}, order {first.order}"
        progress.update(task, description=name)
        if first.kind == "time":
            for point, row in times(group, job.steps, rounds):
                store.add(asdict(point) | row)
            spent = sum(point.share for point in group) + _full_share(first.model, first.guidance)
            progress.advance(task, spent)
            continue
        if (first.model, first.guidance) not in qualities.fulls:
            qualities.full(first.model, first.guidance)
            progress.advance(task, _full_share(first.model, first.guidance))
        for point in group:
            store.add(asdict(point) | qualities(point))
            progress.advance(task, point.share)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=TRAINED, default=TRAINED)
    parser.add_argument("--guidance", nargs="+", type=float, default=GUIDANCE)
    parser.add_argument("--every", nargs="+", type=positive, default=EVERY)
    parser.add_argument("--order", nargs="+", type=int, choices=ORDERS, default=ORDERS)
    parser.add_argument("--contexts", choices=CONTEXTS, default="all", help="which reuse, of a model with two")
    parser.add_argument("--count", type=positive, default=Job.count, help="images a point")
    parser.add_argument("--batch", type=positive, default=Job.batch, help="images a call")
    parser.add_argument("--steps", type=positive, default=Job.steps)
    parser.add_argument("--time", action="store_true", help="time instead: --guidance is then 1 and the model's own")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--backend", choices=("eager", "inductor"), default="eager", help="of what is timed")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=Path("out/which-level.jsonl"))
    arguments, console = parser.parse_args(argv), Console(width=200)
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    try:
        job = Job(arguments.steps, arguments.count, arguments.batch)
        command = f"python bench/run_which_level.py {shlex.join(sys.argv[1:] if argv is None else argv)}"
        store = Store(arguments.out, job, command, tuple(field.name for field in fields(Point)))
        if not arguments.table:
            with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
                measure(points(arguments), job, store, arguments.rounds, progress)
    except (ValueError, OSError) as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print(f"stopped; every point so far is in {arguments.out}, the same command goes on", soft_wrap=True)
        return 130
    console.print(level_tables.page(store.rows), highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
