"""How close a schedule's images are to the full run's, from the same noise: PSNR on the trained reference model.

    python bench/run_quality.py --count 64 --frechet 2000

Fewer steps of the same sampler is the baseline to beat. CUR counts what is skipped of the full run's branches. With
``--frechet``, the images are also compared as a set, by a classifier's features: see `bench.frechet`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import harmonica_rt as hrt
from bench import run_latency
from bench.frechet import WIDTH, Classifier, Statistics, class_accuracy, features, frechet_distance
from bench.measure import environment, pooled_psnr, psnr
from bench.reference import GUIDANCE, PixelDiTPipeline, labels, load_pipeline, noise

MODEL = "dit-fashion"
SCHEDULES = ("uniform:2:0", "uniform:2:1", "uniform:3:0", "uniform:3:1", "uniform:4:0", "uniform:4:1")
FEWER = (14, 10, 7, 5)
BATCH = 32  # of the Fréchet distance's images; the noises are a multiple of it, so that one plan serves all
FULL, PSNR = "full run", ("mean", "pooled", "worst")
APART = 1_000_000  # between the seeds of the PSNR's noises, the Fréchet distance's and those of its reference


def sample(pipeline: PixelDiTPipeline, start: Tensor, steps: int, batch: int = 16) -> Tensor:
    """Images as sampled, [count, channels, height, width]."""
    classes = labels(MODEL, len(start))
    parts = [
        pipeline(classes[i : i + batch], GUIDANCE, num_inference_steps=steps, latents=part, output_type="latent").images
        for i, part in zip(range(0, len(start), batch), start.split(batch))
    ]
    return torch.cat(parts)


@contextmanager
def accelerated(pipeline: PixelDiTPipeline, schedule: hrt.Schedule) -> Iterator[None]:
    hrt.compile(pipeline, schedule)
    try:
        yield
    finally:
        hrt.uncompile(pipeline)


@dataclass(frozen=True)
class Judge:
    """Compares sets of `count` images, all sampled from the same noises, with two references."""

    start: Tensor  # noises, padded to whole batches
    count: int
    classifier: Classifier
    real: Statistics
    full: Statistics  # of the full run from other noises

    @classmethod
    def prepare(cls, pipeline: PixelDiTPipeline, steps: int, count: int, seed: int) -> Judge:
        """Sample the reference images: `pipeline` makes the full run."""
        classifier, padded = Classifier.load(), -(-count // BATCH) * BATCH
        images = sample(pipeline, noise(pipeline, padded, seed + 2 * APART), steps, BATCH)[:count]
        full = Statistics.of(features(images, classifier))
        return cls(noise(pipeline, padded, seed + APART), count, classifier, Statistics.load(), full)

    def __call__(self, pipeline: PixelDiTPipeline, steps: int) -> dict[str, float]:
        """Columns for a row: `pipeline`, as it is, sampled in `steps`."""
        seen = features(sample(pipeline, self.start, steps, BATCH)[: self.count], self.classifier)
        mine = Statistics.of(seen)
        return {
            "frechet_real": frechet_distance(mine, self.real),
            "frechet_full": frechet_distance(mine, self.full),
            "class_accuracy": class_accuracy(seen, labels(MODEL, self.count), self.classifier),
        }


def measure(
    schedules: tuple[str, ...],
    *,
    steps: int,
    count: int,
    seed: int,
    seeds: int = 1,
    fewer: tuple[int, ...] = FEWER,
    frechet: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Run the comparison; the result is what ``--json`` writes.

    Args:
        count: noises a seed; `seeds` of them are used, from `seed` on.
        frechet: images a row for the Fréchet distance; 0 leaves it out, and the full run's own row with it.
    """
    if frechet and frechet <= WIDTH:
        raise ValueError(f"--frechet: expected 0 or more images than the classifier's {WIDTH} features, got {frechet}")
    pipeline = load_pipeline(MODEL)
    start = torch.cat([noise(pipeline, count, seed + i) for i in range(seeds)])
    progress(f"full run, {steps} steps")
    full = sample(pipeline, start, steps)
    rows, judge = [], None
    if frechet:
        progress(f"full run, {steps} steps, {2 * frechet} images")
        with accelerated(pipeline, run_latency.parse_schedule("full", pipeline, steps)):
            judge = Judge.prepare(pipeline, steps, frechet, seed)
            rows.append(
                {"name": FULL, "cur": 0.0, "theoretical": 1.0}
                | dict.fromkeys((*PSNR, "by_seed"))
                | judge(pipeline, steps)
            )
    for text in schedules:
        progress(text)
        schedule = run_latency.parse_schedule(text, pipeline, steps)
        with accelerated(pipeline, schedule):
            images = sample(pipeline, start, steps)
            row = _row(text, schedule.cur, schedule.speedup(pipeline.transformer), images, full, seeds)
            rows.append(row | (judge(pipeline, steps) if judge else {}))
    for less in (n for n in fewer if n < steps):
        progress(f"{less} steps")
        row = _row(f"{less} steps", 1 - less / steps, steps / less, sample(pipeline, start, less), full, seeds)
        if judge:
            with accelerated(pipeline, run_latency.parse_schedule("full", pipeline, less)):
                row |= judge(pipeline, less)
        rows.append(row)
    run = {"model": MODEL, "steps": steps, "count": count, "frechet": frechet, "seed": seed, "seeds": seeds}
    return run | {"environment": environment(), "rows": rows}


def _row(name: str, cur: float, theoretical: float, images: Tensor, full: Tensor, seeds: int) -> dict[str, Any]:
    values = psnr(images, full)
    return {
        "name": name,
        "cur": cur,
        "theoretical": theoretical,
        "mean": values.mean().item(),
        "pooled": pooled_psnr(images, full),
        "worst": values.min().item(),
        "by_seed": [part.mean().item() for part in values.chunk(seeds)],
    }


def _seeds(result: dict[str, Any]) -> str:
    first, last = result["seed"], result["seed"] + result["seeds"] - 1
    return f"{first}" if first == last else f"{first} to {last} each"


def table(result: dict[str, Any]) -> Table:
    caption = "mean: over images; pooled: of the error over all images; uniform:N:ORDER"
    if result["frechet"]:
        caption += (
            f"\nFréchet: distance of {result['frechet']} images to the real ones, "
            "and to the full run's from other noises (its own row: chance)"
        )
    out = Table(
        title=f"{result['model']}, DDIM {result['steps']}, guidance {GUIDANCE}: PSNR to the full run, dB "
        f"({result['count']} noises, seed {_seeds(result)})",
        caption=caption,
    )
    out.add_column("")
    columns = ["CUR %", "theoretical", *PSNR, *(["means by seed"] if result["seeds"] > 1 else [])]
    for column in columns + (["Fréchet (real)", "Fréchet (full run)", "class acc. %"] if result["frechet"] else []):
        out.add_column(column, justify="right")
    for row in result["rows"]:
        cells = [f"{100 * row['cur']:.0f}", f"{row['theoretical']:.2f}x"]
        cells += ["" if row[key] is None else f"{row[key]:.1f}" for key in PSNR]
        if result["seeds"] > 1:
            cells.append("" if row["by_seed"] is None else f"{min(row['by_seed']):.1f} to {max(row['by_seed']):.1f}")
        if result["frechet"]:
            cells += [f"{row['frechet_real']:.2f}", f"{row['frechet_full']:.2f}", f"{100 * row['class_accuracy']:.1f}"]
        out.add_row(row["name"], *cells)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schedule", action="append", help="as run_latency's; may be repeated")
    parser.add_argument("--steps", type=run_latency.positive, default=20)
    parser.add_argument("--count", type=run_latency.positive, default=64, help="noises")
    parser.add_argument("--frechet", type=int, default=0, metavar="N", help="images a row for its distance; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=run_latency.positive, default=1, metavar="N", help="seeds from --seed on")
    parser.add_argument("--fewer", type=int, action="append", help="steps of a shorter run to compare; 0: none")
    parser.add_argument("--threads", type=run_latency.positive, default=1)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    with console.status("") as status:
        try:
            result = measure(
                tuple(arguments.schedule or SCHEDULES),
                steps=arguments.steps,
                count=arguments.count,
                seed=arguments.seed,
                seeds=arguments.seeds,
                fewer=FEWER if arguments.fewer is None else tuple(n for n in arguments.fewer if n > 0),
                frechet=arguments.frechet,
                progress=status.update,
            )
        except (ValueError, TypeError) as error:
            console.print(f"[red]error:[/red] {error}", soft_wrap=True)
            return 2
    console.print(table(result))
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
