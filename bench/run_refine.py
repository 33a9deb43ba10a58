"""Learn the weights of a reference model's output reuse to the end, by Gauss-Newton, from a schedule that has some.

python bench/run_refine.py --model flux-emoji --init cond=a.json,uncond=b.json --minutes 12 --out refined.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch

from bench.arguments import positive
from bench.models.reference import TRAINED
from bench.models.sampling import Sampling
from bench.run_learn import finish, initial
from harmonica_rt.train.refine import refine
from harmonica_rt.train.starts import TARGETS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=TRAINED, default="flux-emoji")
    parser.add_argument(
        "--init", metavar="S", required=True, help="a file, cond=FILE,uncond=FILE or output:6of20:2 to start from"
    )
    parser.add_argument("--target", choices=TARGETS, default="full")
    parser.add_argument("--times", action="store_true", help="move noise levels of computed steps too")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--iterations", type=positive, default=100)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--batch", type=positive, default=16, help="images an iteration")
    parser.add_argument("--validation", type=positive, default=32, help="images that tell the best numbers")
    parser.add_argument("--power", type=float, default=0.0, help="of errors before their mean is lowered")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    sampling = Sampling.of(arguments.model)
    names = getattr(sampling.pipeline, "prompts", None)
    schedules = refine(
        sampling.pipeline,
        initial(arguments.init, sampling.pipeline, arguments.steps),
        None if names is None else [name for name in names.names if name],
        target=arguments.target,
        times=arguments.times,
        minutes=arguments.minutes,
        iterations=arguments.iterations,
        batch=arguments.batch,
        validation=arguments.validation,
        power=arguments.power,
        on_progress=lambda progress: print(progress, flush=True),
        num_inference_steps=arguments.steps,
        guidance_scale=sampling.guidance,
    )
    finish(schedules, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
