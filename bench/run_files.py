"""Files of every kind damaged at random and read: valid or refused by name, time and memory bounded, no code run.

    python bench/run_files.py --count 10000 --out bench/results/files.jsonl

A kind is a line of `--out`. A failure says its kind, seed and number: `--kind K --seed S --first N --count 1` reads it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch

from bench.arguments import campaign_arguments
from bench.compare.store import append
from bench.measure.environment import environment
from bench.trust.files import KINDS
from bench.trust.reading import MEMORY, SECONDS, campaign


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="files of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), metavar="KIND", default=list(KINDS))
    campaign_arguments(parser, each="kind")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    commit = environment()["commit"]  # of the code that is loaded now
    failures = 0
    for kind in arguments.kind:
        tally = campaign(kind, arguments.seed, arguments.first, arguments.count)
        failures += len(tally.failures)
        print(
            f"{kind}, {tally.bytes} bytes: {tally.count} read, {dict(tally.results)}, "
            f"at most {1e3 * tally.seconds:.0f} ms (of {1e3 * SECONDS:.0f}) and {tally.memory / 2**20:.1f} MiB more "
            f"(of {MEMORY / 2**20:.0f})"
        )
        print(*tally.failures[:20], sep="\n", end="\n" if tally.failures else "", flush=True)
        append(arguments.out, tally.line() | {"commit": commit})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
