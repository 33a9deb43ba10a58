"""The figures this project promises, measured again: each line says what was expected and what came.

    python bench/targets.py

Exits with 1 if one is missed. One thread; ratios, not seconds, so any machine may run it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from rich.console import Console

import harmonica_rt as hrt
from bench import run_learn
from bench.arguments import positive
from bench.measure import breakdown
from bench.measure.latency import NAIVE
from bench.measure.latency import measure as measure_latency
from bench.measure.quality import measure as measure_quality
from bench.measure.timing import interleave
from bench.models.pipelines import PixelPipeline
from bench.models.reference import REFERENCES, load_pipeline, noise
from harmonica_rt.lowering import lower
from harmonica_rt.measuring import ratio

INDUCTOR, EAGER = "harmonica_rt, inductor", "harmonica_rt, eager"


@dataclass(frozen=True)
class Target:
    what: str
    measured: float
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.met else "MISSED"
        return f"{verdict:6}  {self.what}: {self.measured:.2f} (expected {sign} {self.bound:g})"


def quality() -> Iterator[Target]:
    result = measure_quality(("uniform:2:1", "uniform:2:0"), steps=20, count=64, seed=0, fewer=())
    for row, bound in zip(result["rows"], (42.5, 30.0)):
        yield Target(f"dit-fashion, DDIM 20, {row['name']}: mean PSNR over 64 noises, dB", row["mean"], bound)


def latency(rounds: int) -> Iterator[Target]:
    result = measure_latency(
        "dit-fashion", "uniform:2", backends=["inductor"], steps=20, batch=4, rounds=rounds, compiled=False
    )
    yield Target(
        "dit-fashion, batch 4 with guidance, uniform:2: speed-up over diffusers", _row(result, INDUCTOR)["speedup"], 1.9
    )


MEASURED = {  # what realised / theoretical is promised for: steps and images a call
    "dit-fashion": {"steps": 20, "batch": 4},
    "dit-s-2": {"steps": 10, "batch": 1},
    "pixart-emoji": {"steps": 20, "batch": 4},
    "pixart-alpha-256": {"steps": 10, "batch": 1, "layers": 4},
}


def realised(rounds: int) -> Iterator[Target]:
    """Entries reused at random, no two steps alike: the hardest schedules there are for a runtime."""
    for model, options in MEASURED.items():
        for schedule in ("random:25", "random:50", "random:75"):
            result = measure_latency(model, schedule, backends=["inductor"], rounds=rounds, **options)
            row = _row(result, INDUCTOR)
            name = f"{model}, CUR {100 * result['cur']:.0f} %, {schedule}: realised / theoretical"
            yield Target(f"{name}, against diffusers eager", row["realised"], 1.0)
            yield Target(f"{name}, against torch.compile of the full model", row["realised_over_compile"], 0.95)


def host(rounds: int) -> Iterator[Target]:
    """Time of what is not a torch op: Python between launches, around a replay, and at the start of a run."""
    pipeline = load_pipeline("dit-fashion")
    start, wanted = noise(pipeline, 4), pipeline.examples(4)

    def sample(own: PixelPipeline) -> torch.Tensor:
        return own(
            wanted, REFERENCES["dit-fashion"].guidance, num_inference_steps=20, latents=start, output_type="latent"
        ).images

    schedule = hrt.Schedule.uniform(pipeline.transformer, 20, every=2, timesteps=pipeline.timesteps(20))
    found = breakdown.profile(pipeline.around(pipeline.transformer), schedule, "eager", sample, rounds)
    parts = {part: seconds.sum() for part, seconds in found.medians().items()}
    share = 100 * parts["host"] / sum(parts.values())
    yield Target("dit-fashion, batch 4, uniform:2, eager: host, % of a run", share, 3.0, at_least=False)
    yield Target("dit-fashion, captured: host us a step", 1e6 * _replayed(pipeline, schedule), 30.0, at_least=False)


@torch.no_grad()  # as pipelines do
def _replayed(pipeline: PixelPipeline, schedule: hrt.Schedule) -> float:
    """Seconds of a call whose replay takes none: a captured step on the tests' emulator, less its two copies."""
    from tests.emulator import Emulator

    fast = hrt.compile(pipeline.transformer, schedule, backend="cudagraph")
    fast._recorder = Emulator
    sample, labels = noise(pipeline, 8), torch.arange(8)
    calls = [torch.full((8,), t) for t in schedule.timesteps]
    for t in calls:
        fast(sample, timestep=t, class_labels=labels)
    (plan,) = fast._plans.values()
    for graph, _ in plan.graphs.of_step:
        graph.replay = lambda: None
    seconds = []
    for _ in range(100):
        for step, t in enumerate(calls):
            began = time.perf_counter()
            fast(sample, timestep=t, class_labels=labels)
            if step > 1:  # a run's first step looks at the model and fills modulation rows
                seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(1000):
        plan.graphs.sample.copy_(sample)
        plan.graphs.of_step[0][1].clone()
    return statistics.median(seconds) - (time.perf_counter() - began) / 1000


def eager_backend(rounds: int) -> Iterator[Target]:
    """Small batches of a small model, where every launch shows."""
    for schedule in ("full", "uniform:2:0", "uniform:4:1", "random:10:0", "random:50:1", "random:90:2"):
        result = measure_latency(
            "dit-fashion", schedule, backends=["eager"], steps=20, batch=1, rounds=rounds, compiled=False
        )
        naive, ours = (_row(result, name)["speedup"] for name in (NAIVE, EAGER))
        yield Target(
            f"dit-fashion, batch 1, {result['schedule']}: eager backend over module-level reuse", ours / naive, 0.97
        )


SHIPPED = Path(__file__).parent / "schedules"


def shipped() -> Iterator[Target]:
    """The schedules that come with the project, on three seeds that training never saw."""
    files = [str(SHIPPED / f"dit-fashion-ddim20-{speedup}.json") for speedup in ("2x", "2.9x", "4x")]
    result = measure_quality(tuple(files), steps=20, count=64, seed=0, seeds=3, fewer=())
    for row, bound in zip(result["rows"], (47.0, 41.0, 33.8)):
        what = f"{row['name']} ({row['theoretical']:.2f}x): mean PSNR to the full run over 3 x 64 noises, dB"
        yield Target(what, row["mean"], bound)
    files = [path.replace(".json", "-converged.json") for path in files]
    result = measure_quality(tuple(files), steps=20, count=64, seed=0, seeds=3, fewer=(), target="converged")
    full, *learned = result["rows"]
    for row, bound in zip(learned, (3.5, 1.5, -2.5)):
        what = f"{row['name']} ({row['theoretical']:.2f}x): dB closer to the converged solution than the uncached run"
        yield Target(what, row["mean"] - full["mean"], bound)


def learning(minutes: float = 15) -> Iterator[Target]:
    """What README.md promises of learning."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "learned.safetensors")
        run_learn.main(["--model", "dit-fashion", "--target-speedup", "2.8", "--minutes", f"{minutes:g}", "--out", out])
        result = measure_quality(("uniform:3:1", out), steps=20, count=64, seed=0, fewer=())
    uniform, learned = result["rows"]
    yield Target(
        f"dit-fashion: dB over uniform:3:1 ({uniform['theoretical']:.2f}x) after {minutes:g} minutes of learning at "
        f"{learned['theoretical']:.2f}x",
        learned["mean"] - uniform["mean"],
        3.0,
    )


def twins(rounds: int) -> Iterator[Target]:
    """Learned weights cost nothing: the same entries computed, the forecast's weights."""
    pipeline = load_pipeline("dit-fashion")
    learned = hrt.Schedule.load(SHIPPED / "dit-fashion-ddim20-2.9x.json")
    start = noise(pipeline, 4)
    labels = torch.tensor([0, 1, 2, 3] + [10] * 4)
    pipeline.scheduler.set_timesteps(20)
    models = {
        name: hrt.compile(pipeline.transformer, schedule)
        for name, schedule in [("learned", learned), ("forecast", learned.replace(weights=None, output_weights=None))]
    }
    timings = interleave(
        {
            name: lambda m=model: m.trajectory(start, pipeline.scheduler, 1.5, class_labels=labels)
            for name, model in models.items()
        },
        2 * rounds,
        warmup=2,
    )
    yield Target(
        "dit-fashion at 2.9x: time with learned weights over time with the forecast's",
        ratio(timings["learned"], timings["forecast"]),
        1.03,
        at_least=False,
    )


def text() -> Iterator[Target]:
    """The text-to-image schedules against fewer steps at their cost."""
    fewer = {"1.65x-trunk.json": 13, "2x-trunk.safetensors": 10, "3x.json": 7}
    files = tuple(str(SHIPPED / f"pixart-emoji-dpmsolver++20-{name}") for name in fewer)
    result = measure_quality(files, model="pixart-emoji", steps=20, count=64, seed=700, fewer=tuple(fewer.values()))
    for row, less in zip(result["rows"][:3], result["rows"][3:]):
        what = f"{row['name']} ({row['theoretical']:.2f}x): dB over {less['name']} ({less['theoretical']:.2f}x)"
        yield Target(what, row["mean"] - less["mean"], 0.0)


COLD = """
import sys, time
import torch
import harmonica_rt as hrt
from bench.models.reference import load_pipeline
torch.set_num_threads(1)
model = load_pipeline("dit-s-2").transformer
call = (torch.randn(2, 4, 32, 32), torch.tensor([900, 900]), torch.tensor([1, 1000]))
for every in (2, 3):
    began = time.perf_counter()
    hrt.compile(model, hrt.Schedule.uniform(model, 10, every), backend="inductor")(*call)
    print(time.perf_counter() - began)
"""


def compile_time() -> Iterator[Target]:
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", COLD],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=True,
        )
    cold, second = map(float, done.stdout.split())
    yield Target(
        "dit-s-2: seconds to compile a plan and run its first step, nothing cached", cold, 40.0, at_least=False
    )
    yield Target("dit-s-2: seconds for a second schedule on the same shapes", second, 3.0, at_least=False)


def capture() -> Iterator[Target]:
    """DiT-XL/2 on the tests' capture emulator, which runs every op that it records."""
    from tests.emulator import Emulator

    pipeline = load_pipeline("dit-xl-2")
    model, steps = pipeline.transformer, 20
    schedule = hrt.Schedule.uniform(model, steps, every=2, order=1, timesteps=pipeline.timesteps(steps))
    fast = hrt.compile(model, schedule, backend="cudagraph")
    fast._recorder = Emulator
    fast(torch.randn(2, 4, 32, 32), torch.full((2,), schedule.timesteps[0]), torch.tensor([1, 1000]))
    plan = fast.report().plans[0]
    graphs = plan.graphs - lower(schedule).distinct_steps
    yield Target("dit-xl-2, 20 steps: seconds to plan and capture on the emulator", plan.seconds, 30.0, at_least=False)
    yield Target("dit-xl-2, 20 steps: graphs beyond one a distinct step", graphs, 0.0, at_least=False)


def _row(result: dict, name: str) -> dict:
    return next(row for row in result["rows"] if row["name"] == name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--only", metavar="A,B,...", help="some of the parts; a wrong name lists them")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console, missed, rounds = Console(), 0, arguments.rounds
    parts = {
        "compile": compile_time(),
        "capture": capture(),
        "host": host(rounds),
        "quality": quality(),
        "latency": latency(rounds),
        "realised": realised(rounds),
        "eager": eager_backend(rounds),
        "twins": twins(rounds),
        "shipped": shipped(),
        "text": text(),
        "learning": learning(),
    }
    names = list(parts) if arguments.only is None else arguments.only.split(",")
    if unknown := [name for name in names if name not in parts]:
        parser.error(f"--only: expected some of {', '.join(parts)}, got {', '.join(unknown)}")
    for name in names:
        for target in parts[name]:
            console.print(str(target), soft_wrap=True, highlight=False, style=None if target.met else "red")
            missed += not target.met
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
