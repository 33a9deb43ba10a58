"""More sampler steps than computed ones: how close runs come to the converged solution, and in what time.

    python bench/run_more_steps.py --model flux-emoji --guidance 1 --order 1

A run of 60 steps of which 10 are computed takes little longer than one of 10, and is nearer to what its sampler
converges to. Plain runs of samplers stand beside it, all are timed in turns. Prints a table for `MORE_STEPS.md`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch

import harmonica_rt as hrt
from bench.arguments import positive
from bench.measure.timing import interleave
from bench.models.reference import TRAINED, noise
from bench.models.sampling import Sampling
from bench.models.schedule_specs import parse_schedule
from harmonica_rt.measuring import psnr

BATCH = 4  # images a call
HELD_OUT = 500_000  # seed of the noises; training's are elsewhere


def prepared(sampling: Sampling, schedule: hrt.Schedule, backend: str) -> Sampling:
    """`sampling` with a pipeline of its own, compiled."""
    own = sampling.pipeline.around(sampling.pipeline.transformer)
    return Sampling(hrt.compile(own, schedule, backend=backend, strict=True), sampling.guidance, sampling.classes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=TRAINED, default="dit-fashion")
    parser.add_argument("--sampler", help="of the schedules; the model's own unless given")
    parser.add_argument("--guidance", type=float, help="the model's own unless given")
    parser.add_argument("--steps", nargs="+", type=positive, default=[20, 40, 60])
    parser.add_argument("--computed", nargs="+", type=positive, default=[5, 6, 8, 10])
    parser.add_argument("--order", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--level", nargs="+", default=["blocks"], help="blocks, blocks:carry=0.5, output, ...")
    parser.add_argument("--file", nargs="*", type=Path, default=[], help="learned schedules")
    parser.add_argument("--plain", nargs="*", default=[], metavar="SAMPLER:STEPS", help="runs to stand beside them")
    parser.add_argument("--count", type=positive, default=32, help="noises, of which mean and worst are told")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--backend", default="inductor")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*guidance.*")

    def of(sampler: str | None) -> Sampling:
        own = Sampling.of(arguments.model, sampler, arguments.guidance)
        return Sampling(own.pipeline, own.guidance, tuple(own.pipeline.examples(arguments.count)))

    sampling = of(arguments.sampler)
    start = noise(sampling.pipeline, arguments.count, HELD_OUT)
    converged = of(None).converged(start)
    runs: dict[tuple[str, ...], tuple[Sampling, int]] = {}

    def add(name: str, column: str, wanted: Sampling, schedule: hrt.Schedule) -> None:
        runs[name, column] = prepared(wanted, schedule, arguments.backend), schedule.steps

    for plain in arguments.plain:
        sampler, count = plain.split(":")
        other, steps = of(sampler), int(count)
        known = {"level": "blocks", "timesteps": other.pipeline.timesteps(steps)}
        schedule = hrt.Schedule.full(other.pipeline.transformer, steps, **known)
        add(f"{sampler}, {steps} steps", "plain", other, schedule)
    for steps, count in itertools.product(arguments.steps, arguments.computed):
        for level, order in itertools.product(arguments.level, arguments.order):
            kind, *options = level.split(":")
            spec = ":".join([kind, f"{count}of{steps}", str(order), *options])
            schedule = parse_schedule(spec, sampling.pipeline, steps)
            add(f"{steps} steps, {count} computed", f"{level}, order {order}", sampling, schedule)
    for file in arguments.file:
        add(file.stem, "learned", sampling, hrt.Schedule.load(file))

    quality = {key: psnr(own(start, steps, BATCH), converged) for key, (own, steps) in runs.items()}
    some = start[:BATCH]
    timings = interleave(
        {key: lambda own=own, steps=steps: own(some, steps, BATCH) for key, (own, steps) in runs.items()},
        arguments.rounds,
    )
    print(table({key: (1e3 * timings[key].median / BATCH, quality[key]) for key in runs}))
    return 0


def table(results: dict[tuple[str, str], tuple[float, Any]]) -> str:
    """A row a run, in the order of their times, a column a level and order.

    Args:
        results: by name and column, ms an image and each image's PSNR.
    """
    names, columns = (list(dict.fromkeys(key[i] for key in results)) for i in (0, 1))
    ms = {name: min(value[0] for key, value in results.items() if key[0] == name) for name in names}
    out = [f"| | ms/image | {' | '.join(columns)} |", "| --- " * (len(columns) + 2) + "|"]
    for name in sorted(names, key=lambda name: ms[name]):
        cells = []
        for column in columns:
            values = results[name, column][1] if (name, column) in results else None
            cells.append("" if values is None else f"{values.mean():.1f} / {values.min():.1f}")
        out.append(f"| {name} | {ms[name]:.1f} | {' | '.join(cells)} |")
    return "\n".join(out)


if __name__ == "__main__":
    sys.exit(main())
