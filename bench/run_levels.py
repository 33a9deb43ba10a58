"""Levels blocks and output on any model: schedules against diffusers eager and both forms of torch.compile, in one run.

    python bench/run_levels.py --models flux,sd3 --rounds 7 --json levels.jsonl

Every candidate makes the same calls of a random model (`denoisers.py`); rounds are interleaved, one thread; the outputs
of computed steps are checked first. A line of JSON a model, and a table of them all.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from torch import Tensor, nn

import harmonica_rt as hrt
from bench.arguments import positive
from bench.measure.environment import environment
from bench.measure.latency import WrongResult
from bench.measure.timing import interleave
from bench.models.denoisers import SIZED, Sized
from harmonica_rt.measuring import ratio

EAGER, WHOLE, REPEATED = "diffusers", "torch.compile", "compile_repeated_blocks"
TOLERANCE = 1e-4  # relative error of a computed step


def sample(model: nn.Module, calls: list[dict[str, Any]]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**call)[0] for call in calls]


def schedules(model: nn.Module, name: str, steps: int) -> dict[str, hrt.Schedule]:
    """One group without a carry; of a UNet, which has none, the output."""
    level = "output" if name == "sd" else "blocks"
    every = {"full": 1, "uniform:2": 2, "uniform:3": 3}
    return {spec: hrt.Schedule.uniform(model, steps, n, 1, level=level) for spec, n in every.items()}


def measure(
    name: str,
    *,
    steps: int,
    batch: int,
    rounds: int,
    backend: str = "inductor",
    whole: bool = True,
    cpu_time: bool = False,
    sized: dict[str, Sized] = SIZED,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """One model's line."""
    torch._dynamo.reset()
    model = sized[name].make()
    calls = [sized[name].call(step, steps, batch) for step in range(steps)]
    wanted = sample(model, calls)
    candidates: dict[str, nn.Module] = {EAGER: model}
    if whole:
        candidates[WHOLE] = torch.compile(copy.deepcopy(model))
        candidates[REPEATED] = copy.deepcopy(model)
        try:
            candidates[REPEATED].compile_repeated_blocks()
        except ValueError:  # it names none
            del candidates[REPEATED]
    plans = schedules(model, name, steps)
    for spec, schedule in plans.items():
        own = copy.deepcopy(model)
        if (by_output := schedule.level == "output") and backend == "inductor":
            own.compile()  # nothing of it is ours: it is compiled as a person would
        candidates[f"ours, {spec}"] = hrt.compile(own, schedule, backend="auto" if by_output else backend)
    seconds: dict[str, float] = {}
    for candidate, own in candidates.items():
        progress(f"{name}: {candidate}")
        started = time.perf_counter()
        sample(own, calls)  # ours learns by launches
        outputs = sample(own, calls)
        spent = time.perf_counter() - started
        started = time.perf_counter()
        sample(own, calls)
        seconds[candidate] = spent - 2 * (time.perf_counter() - started)
        computed = range(0, steps, int(candidate[-1]) if candidate[-1].isdigit() else 1)
        for step in computed:
            error = ((outputs[step] - wanted[step]).norm() / wanted[step].norm()).item()
            if not error < TOLERANCE:
                raise WrongResult(f"{name}, {candidate}: expected a relative error below {TOLERANCE}, got {error:.1e}")
    progress(f"{name}: {rounds} rounds")
    runs = {c: (lambda own=own: sample(own, calls)) for c, own in candidates.items()}
    timings = interleave(runs, rounds, clock=time.thread_time if cpu_time else time.perf_counter)
    rows = []
    for spec in plans:
        ours = f"ours, {spec}"
        report = candidates[ours].report()
        plan, every = report.plans[0], int(spec[-1]) if spec[-1].isdigit() else 1  # compiled whole: nothing is counted
        rows.append(
            {
                "schedule": spec,
                "theory": steps / len(range(0, steps, every)) if plan.macs is None else plan.full_macs / plan.macs,
                "seconds": timings[ours].median,
                "compile_seconds": seconds[ours],
                "speedup": {c: ratio(timings[c], timings[ours]) for c in (EAGER, WHOLE, REPEATED) if c in timings},
                "compiled": None if report.compiled is None else str(report.compiled),
            }
        )
    baselines = {
        c: {"seconds": timings[c].median, "compile_seconds": seconds[c]}
        for c in (EAGER, WHOLE, REPEATED)
        if c in timings
    }
    return {
        "model": name, "level": plans["full"].level, "backend": backend, "steps": steps, "batch": batch,
        "rounds": rounds, "cpu_time": cpu_time, "baselines": baselines, "rows": rows, **environment(),
    }  # fmt: skip


def markdown(lines: list[dict[str, Any]]) -> str:
    """Realised speed-ups; against compile of theory, the better form."""
    head = ["model", "schedule", "theory", "over diffusers", "over torch.compile", "over repeated blocks"]
    head += ["realised / theory, eager", "better compile", "compile s: ours", "torch.compile", "repeated"]
    out = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for line in lines:
        for row in line["rows"]:
            speedup, theory = row["speedup"], row["theory"]
            compiled = [speedup[c] for c in (WHOLE, REPEATED) if c in speedup]
            cells = [f"{line['model']}, {line['level']}", row["schedule"], f"{theory:.2f}x"]
            cells += [f"{speedup[c]:.2f}x" if c in speedup else "" for c in (EAGER, WHOLE, REPEATED)]
            cells += [f"{speedup[EAGER] / theory:.3f}", f"{min(compiled) / theory:.3f}" if compiled else ""]
            cells += [f"{row['compile_seconds']:.0f}"]
            bases = line["baselines"]
            cells += [f"{bases[c]['compile_seconds']:.0f}" if c in bases else "" for c in (WHOLE, REPEATED)]
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(SIZED), help=f"of {', '.join(SIZED)}")
    parser.add_argument("--steps", type=positive, default=6)
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--ours-only", action="store_true", help="no torch.compile beside it")
    parser.add_argument("--cpu-time", action="store_true", help="of the one thread: a neighbour's does not count")
    parser.add_argument("--json", type=Path, help="append a line a model")
    arguments = parser.parse_args(argv)
    names = arguments.models.split(",")
    if unknown := set(names) - SIZED.keys():
        parser.error(f"--models: expected some of {', '.join(SIZED)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    lines = []
    for name in names:
        lines.append(
            measure(
                name,
                steps=arguments.steps,
                batch=arguments.batch,
                rounds=arguments.rounds,
                backend=arguments.backend,
                whole=not arguments.ours_only,
                cpu_time=arguments.cpu_time,
                progress=lambda message: print(message, file=sys.stderr, flush=True),
            )
        )
        if arguments.json:
            with arguments.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    print(markdown(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
