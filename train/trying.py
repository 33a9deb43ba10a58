"""``harmonica try``: what schedules do to a person's own pipeline."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import check_folder, one_line_errors
from .pipeline_options import Asked, asks, torch_dtype


class Backend(StrEnum):
    auto = "auto"
    eager = "eager"
    inductor = "inductor"
    cudagraph = "cudagraph"


@asks
def try_schedules(
    asked: Asked,
    *,
    schedule: Annotated[
        list[str],
        typer.Option(
            help="A file, cond=FILE,uncond=FILE, uniform:N, branches:N, blocks:N[:groups=G][:carry=C], "
            "trunk:N[:carry=C] or output:N, each with :ORDER after N if wished, and NofT, N steps of T computed, in "
            "place of N; may be repeated."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page, the sheet, the figures and the schedules.")],
    backend: Annotated[Backend, typer.Option(help="What runs the schedules.")] = Backend.auto,
    seed: Annotated[int, typer.Option(help="Of the first image's noise.")] = 0,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Times through all prompts; as many as make 3 calls unless given."),
    ] = None,
) -> None:
    """Run your own pipeline as it came and with each schedule, in turns: time, memory, PSNR, pictures side by side.

    Ctrl-C ends it early with what is there.

    [bold]Examples[/bold]

    harmonica try --pipeline black-forest-labs/FLUX.1-dev --prompts prompts.txt --steps 28 --guidance 3.5
    --schedule uniform:2 --schedule blocks:3 --schedule learned.json --out out/flux
    """
    from harmonica_rt.comparing import compare
    from harmonica_rt.cuda_graphs import CaptureFailed
    from harmonica_rt.generating import load_pipeline, read_prompts
    from harmonica_rt.kernels.inductor import CompilerMissing

    from .progress import Display

    console = Console()
    with one_line_errors(CompilerMissing, CaptureFailed):
        given = asked.arguments()
        check_folder(out)
        subjects = None if asked.prompts is None else read_prompts(asked.prompts)
        with Display(True) as display:
            display.show("reading the pipeline", asked.pipeline)
            pipe = load_pipeline(asked.pipeline, torch_dtype(asked.dtype))
            compared = compare(
                pipe,
                schedule,
                subjects,
                inputs=asked.inputs,
                backend=backend.value,
                rounds=rounds,
                seed=seed,
                show=display.show,
                **given,
            )
        compared.command = shlex.join(["harmonica", *sys.argv[1:]])
        compared.save(out)
        console.print(str(compared), highlight=False, markup=False, soft_wrap=True)
        console.print(f"wrote {out / 'index.html'}", highlight=False, markup=False, soft_wrap=True)
