"""Everything this project wants to know from a CUDA machine, in one run: make bench-gpu.

    python bench/run_gpu.py --budget 600
    python bench/run_gpu.py --report FOLDER

Stages in order of value: what the card is, whether we are right on it, what captures cost, latency, the Gap kernel,
where a step's time goes. Each figure is a line of JSON, on disk as soon as it exists, in OUT/CARD-TIME.jsonl; errors
are lines too, and the next case goes on. After an error that leaves the device unusable the process starts itself anew
and goes on behind it. `--report` turns the lines of one card or several into tables and plots. Without CUDA it says so
and exits with 2; `--dry-run` runs the same code on a CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from diffusers.utils import logging as diffusers_logging

from bench.arguments import positive
from bench.gpu import capture, correct, environment, gap, latency, learning, levels, profile, report
from bench.gpu.machine import Machine, Rehearsal
from bench.gpu.record import STAGES, Case, DeviceLost, Record, Stopped

DRY_PACE = 0.2  # tiny sizes


def cases(machine: Machine, stages: list[str], only: list[str], without: list[str], rounds: int) -> list[Case]:
    """Those of `stages` whose "stage: name" contains one of `only`, if there are any."""
    steps = 4 if machine.dry else 20
    made = {
        "environment": lambda: environment.cases(machine),
        "correct": lambda: correct.cases(machine),
        "levels": lambda: levels.cases(machine, min(rounds, 3)),
        "learning": lambda: learning.cases(machine),
        "capture": lambda: capture.cases(machine),
        "latency": lambda: latency.cases(machine, rounds, steps, without),
        "gap": lambda: gap.cases(machine, rounds),
        "profile": lambda: profile.cases(machine),
    }
    found = [case for stage in STAGES if stage in stages for case in made[stage]()]
    return [case for case in found if not only or any(text in f"{case.stage}: {case.name}" for text in only)]


def stages(text: str) -> list[str]:
    """An argparse type."""
    names = text.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(STAGES)}, got {unknown[0]!r}")
    return names


def candidates(text: str) -> list[str]:
    """An argparse type."""
    names = text.split(";")
    if unknown := [name for name in names if name not in latency.NAMES]:
        raise argparse.ArgumentTypeError(f"expected some of {';'.join(latency.NAMES)}, got {unknown[0]!r}")
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the lines")
    parser.add_argument("--stages", type=stages, default=list(STAGES), metavar="A,B", help=f"of {','.join(STAGES)}")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="TEXT,...",
                        help='cases whose "stage: name" contains one of these')  # fmt: skip
    parser.add_argument("--without", type=candidates, default=[], metavar="NAME;...",
                        help="candidates that latency leaves out")  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="skip what would not fit")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny sizes: figures mean nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the newest run in --out")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only make tables and plots of its lines")
    arguments = parser.parse_args(argv)
    if arguments.report is not None:
        print(report.write(arguments.report))
        return 0
    if not (arguments.dry_run or torch.cuda.is_available()):
        print("bench-gpu: expected a CUDA device, found none; nothing was measured (--dry-run rehearses on a CPU)")
        return 2
    diffusers_logging.set_verbosity_error()
    machine = Rehearsal() if arguments.dry_run else Machine()
    earlier = sorted(arguments.out.glob(f"{machine.slug}-*.jsonl")) if arguments.resume else []
    path = earlier[-1] if earlier else arguments.out / f"{machine.slug}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    asked = {"only": arguments.only, "without": arguments.without, "rounds": arguments.rounds}
    pace = DRY_PACE if machine.dry else 1.0
    record = Record(path, machine, budget=arguments.budget, stages=arguments.stages, pace=pace, **asked)
    print(f"bench-gpu on {machine.name}: {path}", flush=True)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        record.run(cases(machine, arguments.stages, arguments.only, arguments.without, arguments.rounds), _say)
    except Stopped:
        record.write("end", how="stopped by SIGTERM")
        return 128 + signal.SIGTERM
    except DeviceLost as error:
        _say(f"the device refuses further work ({error.__cause__}): starting anew")
        _again(sys.argv[1:] if argv is None else argv)
    finally:
        signal.signal(signal.SIGTERM, before)
    record.write("end", how="complete")
    return 0


def _stop(*_: object) -> None:
    raise Stopped


def _say(text: str) -> None:
    print(text, flush=True)


def _again(argv: list[str]) -> None:
    """Replace this process by one that goes on where it is."""
    resume = [] if "--resume" in argv else ["--resume"]
    os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *argv, *resume])


if __name__ == "__main__":
    sys.exit(main())
