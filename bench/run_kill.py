"""Saving, learning, trying, comparing and compiling, killed at random moments (SIGKILL) and gone on with.

    python bench/run_kill.py --moments 50 --out bench/results/kills.jsonl

Every file that is left must be whole or refused by its name, and the result that of an undisturbed run. A kind of work
is a line of `--out`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch

from bench.arguments import campaign_arguments
from bench.compare.store import append
from bench.measure.environment import environment
from bench.trust.killing import campaign
from bench.trust.works import WORKS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=10, help="of each kind of work")
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    campaign_arguments(parser, each="kind of work")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    commit = environment()["commit"]  # of the code that is loaded now
    failures = 0
    for name in arguments.work:
        tally = campaign(name, WORKS[name](), arguments.moments, arguments.seed, tell=_tell)
        failures += len(tally.failures)
        _tell(f"{name}, {tally.seconds:.1f} s: {tally.kills} killed, {tally.late} too late, whole then: {tally.left}")
        print(*tally.failures, sep="\n", end="\n" if tally.failures else "", flush=True)
        append(arguments.out, asdict(tally) | {"commit": commit})
    return 1 if failures else 0


def _tell(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
