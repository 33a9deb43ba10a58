"""Random cases of reuse against an oracle that shares nothing with the runtime; failures are printed as scripts.

    python bench/run_fuzz.py --seconds 600 --seed 7 --out out/fuzz.jsonl
    python bench/run_fuzz.py --page --out out/fuzz.jsonl

A chunk of cases plays on one model and is a line of `--out`; another seed adds to it. `--page` writes `FUZZ.md` of it,
and of what `run_files.py`, `run_kill.py` and `run_churn.py` left in `results/`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch

from bench.arguments import campaign_arguments
from bench.compare.store import append
from bench.fuzz.campaign import BACKENDS, LEVELS, play_chunk
from bench.fuzz.models import NAMES
from bench.fuzz.page import page
from bench.measure.environment import environment
from bench.trust.page import sections

PAGE = Path(__file__).resolve().parent / "FUZZ.md"
RESULTS = PAGE.parent / "results"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--level", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["eager"])
    parser.add_argument("--model", nargs="+", choices=list(NAMES), metavar="CLASS", help="all unless given")
    parser.add_argument("--chunk", type=float, default=4.0, help="processor seconds a model is kept")
    campaign_arguments(parser, each="chunk")
    parser.add_argument("--page", type=Path, nargs="?", const=PAGE, help="write what --out has")
    arguments = parser.parse_args(argv)
    if arguments.page is not None:
        lines = [json.loads(line) for line in arguments.out.read_text().splitlines()]
        arguments.page.write_text("\n".join([page(lines), *(f"{part}\n" for part in sections(RESULTS))]))
        return 0
    torch.set_num_threads(1)
    done = _numbers(arguments.out, arguments.seed)
    commit = environment()["commit"]  # of the code that is loaded now
    failures, until = 0, time.monotonic() + arguments.seconds
    for number in itertools.count(max(done, default=-1) + 1):
        if time.monotonic() >= until:
            break
        for level, backend in itertools.product(arguments.level, arguments.backend):
            own = None if arguments.model is None else arguments.model[number % len(arguments.model)]
            chunk = play_chunk(arguments.seed, number, level, backend, model=own, seconds=arguments.chunk)
            if chunk is None:
                continue
            chunk.commit = commit
            failures += len(chunk.failures)
            print(
                f"{number} {level} {backend} {chunk.dtype} {chunk.model}: {chunk.cases} cases, {chunk.runs} runs, "
                f"worst {chunk.worst:.0e}, {chunk.runs / chunk.cpu:.1f} runs/s, {len(chunk.failures)} failures"
            )
            print(*chunk.failures, sep="\n", end="\n" if chunk.failures else "", flush=True)
            append(arguments.out, chunk.line())
    return 1 if failures else 0


def _numbers(out: Path | None, seed: int) -> list[int]:
    """Of chunks that a file has of a seed."""
    if out is None or not out.exists():
        return []
    lines = map(json.loads, out.read_text().splitlines())
    return [line["number"] for line in lines if line["seed"] == seed]


if __name__ == "__main__":
    sys.exit(main())
