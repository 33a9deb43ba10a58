"""What schedules do to a reference model's pipeline, as `harmonica try` shows it of a person's own.

    python bench/run_try.py --model flux-emoji --schedule blocks:2:1 --schedule FILE --out out/try

Time, memory and quality in turns with the full run; a page, a sheet and the figures in OUT.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch

import harmonica_rt as hrt
from bench.arguments import positive
from bench.models.reference import REFERENCES, TRAINED
from bench.models.sampling import Sampling
from harmonica_rt.train.progress import Display


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=TRAINED, default="flux-emoji")
    parser.add_argument("--schedule", action="append", required=True, help="as `harmonica try` takes it")
    parser.add_argument("--prompts", type=lambda text: text.split(","), help="with commas between; three unless given")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    guidance = REFERENCES[arguments.model].guidance
    pipeline = Sampling.of(arguments.model, guidance=guidance).pipeline
    with Display(True) as display:
        compared = hrt.compare(
            pipeline,
            arguments.schedule,
            arguments.prompts or pipeline.examples(3),
            backend=arguments.backend,
            rounds=arguments.rounds,
            show=display.show,
            num_inference_steps=arguments.steps,
            guidance_scale=guidance,
        )
    compared.command = shlex.join(["python", *(sys.argv if argv is None else ["bench/run_try.py", *argv])])
    compared.save(arguments.out)
    print(compared)
    return 0


if __name__ == "__main__":
    sys.exit(main())
