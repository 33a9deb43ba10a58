"""The best that can be had of a reference model at equal time, on every axis: samplers, peers, and ours.

    python bench/run_frontier.py --model dit-fashion --tune 600 --sets 2000 --out bench/results --page bench/FRONTIER.md

Candidates are screened on a few noises, the best of each family and budget measured on others, and with ``--sets``
these judged as sets, the most telling first. Every row is on disk when it is known: the same command goes on, and
``--minutes`` ends it early. More schedules, by ``--schedule``, join what is there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from rich.console import Console

from bench.arguments import positive
from bench.compare import candidates, frontier_page
from bench.compare.candidates import FULL, OURS, PEER
from bench.compare.frontier import SCREEN, Frontier
from bench.compare.frontier_runs import Job
from bench.compare.store import Store
from bench.models.reference import TRAINED

ELSEWHERE = 1  # samplers beside the model's own for all kinds of schedules and peers: without reuse the best, and with
QUICK = 6  # candidates of each kind


def screen(frontier: Frontier, files: list[Path], tune: float, few: int | None = None) -> list[str]:
    """All candidates; why files of schedules are none."""
    model, steps = frontier.job.model, frontier.job.steps
    runs = [candidates.own(model, steps), *list(candidates.plain(model))[: few or None]]
    frontier.screen(runs)
    frontier.screen(c for run in runs for c in (candidates.compiled(run), run.on(OURS, FULL)))
    learned, refused = candidates.learned(model, frontier.sampling.pipeline, files)
    frontier.screen(learned[: few or None])
    own = (runs[0].sampler, runs[0].spacing)
    bases = list(dict.fromkeys([own, *frontier.bases(99)]))
    some = list(dict.fromkeys([own, *frontier.bases(ELSEWHERE)]))
    frontier.screen(list(candidates.unlearned(bases, steps, candidates.FIRST_SPECS))[: few or None])
    some = list(dict.fromkeys([*some, *frontier.bases(ELSEWHERE, reusing=True)]))
    for length in candidates.REUSED_STEPS if few is None else ():
        kinds = candidates.specs(model) if length == steps else candidates.FIRST_SPECS
        frontier.screen(candidates.unlearned(some, length, kinds))
    left = tune - sum(row["cpu_seconds"] for row in frontier.rows(SCREEN) if row["family"] == PEER)
    until = time.process_time() + left  # the same work whatever else the machine does
    frontier.screen(takewhile(lambda peer: time.process_time() < until, candidates.tuned(some, steps)))
    return refused


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=TRAINED, default="dit-fashion")
    parser.add_argument("--schedule", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--sets", type=int, default=0, metavar="N", help="images a set; 0: no sets")
    parser.add_argument(
        "--tune", type=float, default=0, metavar="SECONDS", help="search in peers' own settings, of a CPU"
    )
    parser.add_argument("--count", type=positive, default=64, help="noises that the best are measured on")
    parser.add_argument("--screen", type=positive, default=8, help="noises that all are screened on")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--quick", action="store_true", help="a few candidates of each kind")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of results and plots; a run goes on")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the page to write; OUT/FRONTIER.md unless given")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console, out = Console(width=160), arguments.out
    until = time.perf_counter() + 60 * arguments.minutes
    command = f"python bench/run_frontier.py {shlex.join(_lasting(sys.argv[1:] if argv is None else argv))}"
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"frontier-{arguments.model}.jsonl"
    try:
        if missing := [path for path in arguments.schedule if not path.is_file()]:
            raise ValueError(f"--schedule: expected a file, got {missing[0]}")
        if 0 < arguments.sets <= 64 or arguments.sets < 0:
            raise ValueError(f"--sets: expected 0, or more images than the 64 features, got {arguments.sets}")
        job = Job(
            arguments.model,
            count=arguments.count,
            screen=arguments.screen,
            rounds=arguments.rounds,
            threads=arguments.threads,
        )
        frontier = Frontier(
            job,
            Store(file, job, command, key=("stage", "name")),
            lambda message: console.print(time.strftime("%H:%M:%S"), message, highlight=False),
            lambda: time.perf_counter() > until,
        )
        refused = screen(frontier, arguments.schedule, arguments.tune, QUICK if arguments.quick else None)
        if not frontier.expired():
            frontier.measure(frontier.finalists())
        if arguments.sets and not frontier.expired():
            frontier.judge(arguments.sets)
    except (ValueError, OSError) as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print(f"stopped; every finished row is in {file}, and the same command goes on", soft_wrap=True)
        return 130
    for words in refused:
        console.print(f"left out: {words}", soft_wrap=True, highlight=False)
    page = out / "FRONTIER.md" if arguments.page is None else arguments.page
    frontier_page.write(sorted(out.glob("frontier-*.jsonl")), page)
    console.print(f"written: {file}, plots beside it, and {page}", soft_wrap=True)
    return 0


def _lasting(argv: list[str]) -> list[str]:
    """Arguments but for when to stop: rows do not depend on it."""
    kept, rest = [], iter(argv)
    for argument in rest:
        if argument == "--minutes":
            next(rest)
        elif not argument.startswith("--minutes="):
            kept.append(argument)
    return kept


if __name__ == "__main__":
    sys.exit(main())
