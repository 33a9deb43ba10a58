"""Runs over 60 shapes in threads that come and go, and cycles of compiling and uncompiling: what grows meanwhile.

    python bench/run_churn.py --runs 5000 --cycles 20 --out bench/results/churn.jsonl

Memory of the process and of emulated CUDA graphs must stay what it was once warm, and every plan must go.
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
from bench.trust.churning import cycles, runs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--cycles", type=int, default=20, help="of each backend")
    parser.add_argument("--backend", nargs="+", choices=("eager", "inductor", "cudagraph"), help="of the cycles")
    campaign_arguments(parser, each="part")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    commit = environment()["commit"]  # of the code that is loaded now
    parts = [lambda: runs(arguments.runs, arguments.seed, _tell)] if arguments.runs else []
    backends = (arguments.backend or ("inductor", "cudagraph")) if arguments.cycles else ()
    parts += [lambda backend=backend: cycles(arguments.cycles, backend, tell=_tell) for backend in backends]
    failures = 0
    for part in parts:
        tally = part()
        failures += len(tally.failures)
        resident = [round(bytes_ / 2**20, 1) for bytes_ in tally.resident]
        _tell(
            f"{tally.what}, {tally.count}: {resident[0]} MiB once warm, at most {max(resident)}, {resident[-1]} at the "
            f"end; plans {max(tally.plans)}, then {tally.plans[-1]}; graphs of {max(tally.graph_bytes)} bytes, then "
            f"{tally.graph_bytes[-1]}"
        )
        print(*tally.failures, sep="\n", end="\n" if tally.failures else "", flush=True)
        append(arguments.out, asdict(tally) | {"commit": commit})
    return 1 if failures else 0


def _tell(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
