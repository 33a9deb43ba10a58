"""Where a learned schedule is used other than it was learned: what is left of what learning gave.

    python bench/recolour.py --model flux-emoji --out out/flux-emoji-recoloured.safetensors
    python bench/run_carry_over.py --schedule bench/schedules/flux-emoji-flow-euler20-2x.safetensors \
        --lora out/flux-emoji-recoloured.safetensors

PSNR to the full run under each condition of what was learned, and of the forecast that computes the same: of all
carries and orders the best where it was learned. Prints a table for `CARRY_OVER.md`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import numpy as np
import torch
from torch import Tensor, nn

import harmonica_rt as hrt
from bench.arguments import positive
from bench.compare.comparison import HELD_OUT
from bench.models.flux_pipeline import PixelVae
from bench.models.pipelines import PixelPipeline
from bench.models.sampling import Sampling, accelerated
from bench.recolour import MODELS, fused
from harmonica_rt.checks import may_carry
from harmonica_rt.compiled import Schedules
from harmonica_rt.measuring import psnr
from harmonica_rt.schedule_specs import named_files
from harmonica_rt.train.contexts import each, every

CARRIES = (0.0, 0.5, 1.0)
UNSEEN = 0.25  # share of prompts, the last, that learning holds out
GUIDANCES = {"pixart-emoji": (2.0, 7.0), "flux-emoji": (1.5, 2.5, 7.0)}
SIDES = (24, 48)
STEPS = (14, 28)
SLOW = 4  # times fewer images in bf16, which a CPU is slow at


@dataclass(frozen=True)
class Condition:
    """What is other than where a schedule was learned.

    Attributes:
        name: for people.
        sampling: how images are made.
        side: of images, in pixels.
        count: images.
        steps: of a run.
    """

    name: str
    sampling: Sampling
    side: int
    count: int
    steps: int

    @property
    def start(self) -> Tensor:
        """Noise, held out."""
        shape = (self.count, 3, self.side, self.side)
        return torch.randn(shape, generator=torch.Generator().manual_seed(HELD_OUT)).to(
            self.sampling.pipeline.transformer.dtype
        )

    def images(self, schedules: Schedules | None) -> Tensor:
        """Of the full run, unless schedules are given."""
        if schedules is None:
            return self.sampling(self.start, self.steps).float()
        pipeline = self.sampling.pipeline
        with (
            warnings.catch_warnings(),
            at_levels(pipeline, schedules),
            accelerated(pipeline, schedules, backend="eager"),
        ):
            warnings.filterwarnings("ignore", message=".*guidance.*")  # that it is another is what is asked
            return self.sampling(self.start, self.steps).float()


@contextmanager
def at_levels(pipeline: PixelPipeline, schedules: Schedules) -> Iterator[None]:
    """With `pipeline` at the noise levels of `schedules`, if they have some of their own."""
    own = every(schedules)[0]
    if own.timesteps is None or np.allclose(own.timesteps, pipeline.timesteps(own.steps), atol=1e-2):
        yield
        return
    pipeline.sigmas = [t / pipeline.scheduler.config.num_train_timesteps for t in own.timesteps]
    try:
        yield
    finally:
        pipeline.sigmas = None


def conditions(name: str, steps: int, count: int, lora: Path | None) -> Iterator[Condition]:
    """Where it was learned, then each other."""
    home = Sampling.of(name)
    pipeline, names = home.pipeline, home.pipeline.prompts.names
    held = round(UNSEEN * len(names))

    def asked(pipeline: PixelPipeline, guidance: float = home.guidance, start: int = 0) -> Sampling:
        wanted = tuple(names[start + i * (held if start else len(names) - held) // count] for i in range(count))
        return Sampling(pipeline, guidance, wanted)

    side = pipeline.shape[-1]
    own = Condition("as learned, other noises", asked(pipeline), side, count, steps)
    yield own
    yield replace(own, name="prompts never seen", sampling=asked(pipeline, start=len(names) - held))
    for guidance in GUIDANCES[name]:
        yield replace(own, name=f"guidance {guidance:g}", sampling=asked(pipeline, guidance))
    for other in SIDES:
        yield replace(own, name=f"{other} x {other} pixels", sampling=asked(sized(pipeline, other)), side=other)
    for other in STEPS:
        yield replace(own, name=f"{other} steps (`between`)", steps=other)
    if lora is not None:
        model = fused(pipeline.transformer, lora)
        yield replace(own, name="a LoRA, other colours", sampling=asked(pipeline.around(model)))
    model = copy.deepcopy(pipeline.transformer).to(torch.bfloat16)
    yield replace(own, name="bf16", sampling=asked(pipeline.around(model)), count=max(1, count // SLOW))
    yield replace(own, name="int8 weights", sampling=asked(pipeline.around(rounded(pipeline.transformer))))


def sized(pipeline: PixelPipeline, side: int) -> PixelPipeline:
    """The same model for images of another side; what is told of an image's size stays that of the training."""
    own = pipeline.around(pipeline.transformer)
    if isinstance(getattr(own, "vae", None), PixelVae):
        own.register_modules(vae=PixelVae(side))
    return own


def rounded(model: nn.Module) -> nn.Module:
    """A copy with linear weights as int8 holds them, a scale a row: the numbers of a model that is quantised so."""
    own = copy.deepcopy(model)
    for module in own.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.data
            scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            weight.copy_((weight / scale).round() * scale)
    return own


def forecasts(schedules: Schedules, timesteps: Sequence[float]) -> Iterator[Schedules]:
    """What computes the same at these timesteps, the sampler's, and was not learned."""
    bare: dict[str, Any] = {"weights": None, "output_weights": None, "channels": None, "output_channels": None}
    first = every(schedules)[0]
    carries = any((may_carry(own.compute, own.groups, own.level) & reuses(own)).any() for own in every(schedules))
    for order, carry in itertools.product(range(first.order + 1), CARRIES if carries else (0.0,)):

        def forecast(own: hrt.Schedule, order: int = order, carry: float = carry) -> hrt.Schedule:
            carried = may_carry(own.compute, own.groups, own.level) & reuses(own)
            return own.replace(order=order, timesteps=tuple(timesteps), **bare).replace(
                carry=np.where(carried, carry, 0.0)
            )

        yield each(schedules, forecast)


def reuses(schedule: hrt.Schedule) -> np.ndarray:
    return ~(schedule.left_alone | schedule.compute)


def row(condition: Condition, learned: Schedules, forecast: Schedules) -> dict[str, Any]:
    """PSNR of both, mean and worst."""
    if condition.steps != every(learned)[0].steps:
        timesteps = tuple(condition.sampling.pipeline.timesteps(condition.steps))
        learned, forecast = (
            each(own, lambda one: one.between(condition.steps, timesteps=timesteps)) for own in (learned, forecast)
        )
    full = condition.images(None)
    values = {name: psnr(condition.images(own), full) for name, own in (("learned", learned), ("forecast", forecast))}
    return {"name": condition.name, **{name: (own.mean().item(), own.min().item()) for name, own in values.items()}}


def table(rows: list[dict[str, Any]]) -> str:
    out = ["| | forecast | learned | gain | of the gain as learned |", "| --- | --- | --- | --- | --- |"]
    gains = [found["learned"][0] - found["forecast"][0] for found in rows]
    for found, gain in zip(rows, gains):
        cells = [f"{mean:.1f} / {worst:.1f}" for mean, worst in (found["forecast"], found["learned"])]
        out.append(f"| {found['name']} | {' | '.join(cells)} | {gain:+.1f} | {gain / gains[0]:.0%} |")
    return "\n".join(out)


def best(home: Condition, found: Iterable[Schedules], few: int) -> Schedules:
    """Of `found` the best where it was learned, on a few images."""
    some = replace(home, count=few)
    full = some.images(None)
    return max(found, key=lambda own: psnr(some.images(own), full).mean().item())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="flux-emoji")
    parser.add_argument(
        "--schedule", action="append", required=True, help="a learned file, or cond=FILE,uncond=FILE; may be repeated"
    )
    parser.add_argument("--lora", type=Path, help="of bench/recolour.py; without it that row is left out")
    parser.add_argument("--count", type=positive, default=32, help="images under each condition")
    parser.add_argument("--few", type=positive, default=8, help="images that the forecast is chosen on")
    parser.add_argument("--only", type=positive, help="so many of the conditions")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    for text in arguments.schedule:
        files = named_files(text) or {"": Path(text)}  # a file that is not there is told by loading it
        named = {context: hrt.Schedule.load(file) for context, file in files.items()}
        learned = named.get("", named)
        rows, forecast = [], None
        found = conditions(arguments.model, every(learned)[0].steps, arguments.count, arguments.lora)
        for condition in itertools.islice(found, arguments.only):
            timesteps = condition.sampling.pipeline.timesteps(condition.steps)
            forecast = forecast or best(condition, forecasts(learned, timesteps), arguments.few)
            rows.append(row(condition, learned, forecast))
            print(rows[-1], file=sys.stderr, flush=True)
        first = every(forecast)[0]
        kind = f"order {first.order}, carry {first.carry.max(initial=0.0):g}"
        print(f"\n{', '.join(file.name for file in files.values())}; forecast of {kind}:\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
