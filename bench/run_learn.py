"""Learn a schedule on a reference model through its pipeline, as `harmonica learn --pipeline` does on a person's own.

    python bench/run_learn.py --model flux-emoji --target-speedup 2 --minutes 10 --out flux-emoji-2x.safetensors

Prompts are all that the model has features of, a quarter of them held out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from accelerate import Accelerator

import harmonica_rt as hrt
from bench.arguments import positive
from bench.models.pipelines import PixelPipeline
from bench.models.reference import TRAINED
from bench.models.sampling import Sampling
from bench.models.schedule_specs import parse_schedule
from harmonica_rt.compiled import Schedules
from harmonica_rt.schedule_specs import named_files
from harmonica_rt.train import models
from harmonica_rt.train.contexts import CONTEXTS, files_of, save
from harmonica_rt.train.progress import Display
from harmonica_rt.train.starts import TARGETS
from harmonica_rt.train.stopping import stopping

CHANNELS = {"auto": None, "yes": True, "no": False}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=TRAINED, default="flux-emoji")
    parser.add_argument("--sampler", choices=models.SAMPLERS, help="the model's own unless given")
    parser.add_argument("--guidance", type=float, help="the model's own unless given")
    parser.add_argument("--target-speedup", type=float, help="3 unless given")
    parser.add_argument("--target", choices=TARGETS, default="full")
    parser.add_argument(
        "--init",
        metavar="S",
        help="a file, cond=FILE,uncond=FILE or blocks:10of60:2 to go on from, in place of a speed-up",
    )
    parser.add_argument("--level", choices=("auto", "blocks", "branches", "output"), default="auto")
    parser.add_argument("--groups", type=positive, default=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--batch", type=positive, default=8, help="images an iteration")
    parser.add_argument("--validation", type=positive, default=32, help="images that tell the best weights")
    parser.add_argument("--power", type=float, default=0.0, help="of errors before their mean is lowered")
    parser.add_argument("--channels", choices=CHANNELS, default="auto", help="weights per channel")
    parser.add_argument("--contexts", choices=CONTEXTS, default="shared", help="own: a file each, OUT-cond, OUT-uncond")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    sampling, accelerator = Sampling.of(arguments.model, arguments.sampler, arguments.guidance), Accelerator(cpu=True)
    pipeline = sampling.pipeline
    names = getattr(pipeline, "prompts", None)

    with Display(True) as display, stopping(accelerator) as stopped:
        schedule = hrt.learn(
            pipeline,
            None if names is None else [name for name in names.names if name],
            target_speedup=arguments.target_speedup,
            target=arguments.target,
            init=arguments.init and initial(arguments.init, pipeline, arguments.steps),
            level=arguments.level,
            groups=arguments.groups,
            channels=CHANNELS[arguments.channels],
            contexts=arguments.contexts,
            minutes=arguments.minutes,
            batch=arguments.batch,
            power=arguments.power,
            validation=arguments.validation,
            accelerator=accelerator,
            on_progress=lambda p: display.show(p.phase, str(p), p.share, p.left),
            on_better=lambda better: save(better, arguments.out),
            stopped=stopped,
            num_inference_steps=arguments.steps,
            guidance_scale=sampling.guidance,
        )
    finish(schedule, arguments.out)
    return 0


def finish(schedules: Schedules, out: Path) -> None:
    """Write and show what was learned."""
    save(schedules, out)
    for path, own in files_of(schedules, out).items():
        print(path, own, own.note, sep="\n")


def initial(text: str, pipeline: PixelPipeline, steps: int) -> Schedules:
    files = named_files(text)
    if not files or "" in files:
        return parse_schedule(text, pipeline, steps)
    return {context: hrt.Schedule.load(file) for context, file in files.items()}


if __name__ == "__main__":
    sys.exit(main())
