"""The command line: learn, try, inspect, plot and convert schedules.

harmonica learn --pipeline FOLDER --prompts prompts.txt --target-speedup 2 --out schedule.json
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .errors import one_line_errors
from .pipeline_options import Asked, PipelineDtype, asks
from .trying import try_schedules

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Reuse schedules for diffusion transformers: learn one for a frozen model, try it, convert others.",
)
console = Console()


class Objective(StrEnum):
    sdt = "sdt"
    l2c = "l2c"


class Estimator(StrEnum):
    none = "none"
    leave_one_out = "leave-one-out"
    telescoping = "telescoping"
    gain = "gain"


class Target(StrEnum):
    full = "full"
    converged = "converged"


class Method(StrEnum):
    harmonica = "harmonica"
    l2c = "l2c"
    ecad = "ecad"
    smoothcache = "smoothcache"
    mask = "mask"


class MaskLevel(StrEnum):
    blocks = "blocks"
    output = "output"


class Contexts(StrEnum):
    shared = "shared"
    own = "own"


class Level(StrEnum):
    auto = "auto"
    blocks = "blocks"
    branches = "branches"
    output = "output"


class Channels(StrEnum):
    auto = "auto"
    yes = "yes"
    no = "no"


Model = Annotated[
    str, typer.Option(help="Folder or hub name, of a pipeline or its transformer; in a checkout dit-fashion.")
]
File = Annotated[Path, typer.Argument(help="A schedule file.")]
Seed = Annotated[int, typer.Option(help="Of everything drawn.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint, to the same result.")]


@app.command(no_args_is_help=True)
@asks
def learn(
    asked: Asked,
    *,
    out: Annotated[Path, typer.Option(help="The schedule file to write.")],
    target_speedup: Annotated[float | None, typer.Option(help="Theoretical speed-up to reach; 3 unless given.")] = None,
    target: Annotated[
        Target, typer.Option(help="What runs aim at: the run without reuse, or the solution that its sampler nears.")
    ] = Target.full,
    init: Annotated[
        str | None,
        typer.Option(help="A schedule file to go on from, or cond=FILE,uncond=FILE, in place of a speed-up."),
    ] = None,
    level: Annotated[Level, typer.Option(help="What is reused; auto: one group of blocks.")] = Level.auto,
    groups: Annotated[int, typer.Option(min=1, help="At level blocks, of each list of blocks.")] = 1,
    order: Annotated[
        int | None, typer.Option(min=0, max=2, help="A reused value stands on its last order + 1 values; 2.")
    ] = None,
    channels: Annotated[
        Channels, typer.Option(help="Weights per channel; auto: where they help, in a .safetensors.")
    ] = Channels.auto,
    contexts: Annotated[
        Contexts,
        typer.Option(help="Weights that guidance's contexts share, or own, a file each, OUT-cond, OUT-uncond"),
    ] = Contexts.shared,
    minutes: Annotated[float | None, typer.Option(help="Time to learn for; 15 unless --iterations is given.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Steps of the weights.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images an iteration, over all processes; 4.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Backward passes an iteration is split into.")] = None,
    lr: Annotated[float | None, typer.Option(help="Length of the weights' first steps.")] = None,
    power: Annotated[float, typer.Option(help="Of errors before their mean is lowered: higher for the worst.")] = 0.0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Where the learning is kept until it ends; OUT.checkpoint unless given.")
    ] = None,
    resume: Resume = False,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Learn a schedule for your own pipeline: the weights that what is reused stands on.

    Ctrl-C ends it early with the best schedule so far; exit code 3 if that is the forecast's still. --resume goes on.

    [bold]Examples[/bold]

    harmonica learn --pipeline FOLDER_OR_HUB --prompts prompts.txt --steps 28 --target-speedup 3 --out s.safetensors

    harmonica learn --pipeline FOLDER_OR_HUB --init s.safetensors --minutes 60 --out better.safetensors

    accelerate launch -m harmonica_rt.train learn --pipeline FOLDER_OR_HUB --target converged --out closer.safetensors
    """
    from .pipeline_command import learn_for_pipeline
    from .stopping import EndedEarly

    with one_line_errors():
        settings: dict[str, Any] = {
            "minutes": minutes,
            "iterations": iterations,
            "order": order,
            "batch": batch,
            "lr": lr,
            "power": power,
        }
        settings |= {"accumulate": accumulate, "target_speedup": target_speedup, "contexts": contexts.value}
        settings |= {"channels": {"yes": True, "no": False}.get(channels.value), "target": target.value}
        settings |= {"level": level.value, "groups": groups, "seed": seed}
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        try:
            learn_for_pipeline(
                asked,
                out,
                console,
                {name: value for name, value in settings.items() if value is not None},
                init,
                checkpoint,
                resume,
            )
        except EndedEarly as early:
            Console(stderr=True).print(str(early), soft_wrap=True, highlight=False, markup=False)
            raise typer.Exit(3) from None


@app.command(no_args_is_help=True)
def router(
    model: Model,
    out: Annotated[Path, typer.Option(help="The schedule file to write.")],
    objective: Annotated[Objective, typer.Option(help="HarmoniCa's SDT, or L2C (needs --images).")] = Objective.sdt,
    paper: Annotated[bool, typer.Option("--paper", help="HarmoniCa's settings as published: SDT + IEPO.")] = False,
    target_speedup: Annotated[float | None, typer.Option(help="Theoretical speed-up to reach.")] = None,
    target_cur: Annotated[float | None, typer.Option(help="Cache utilisation ratio to reach, 0 to 1.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the cost, in place of a target.")] = None,
    estimator: Annotated[Estimator | None, typer.Option(help="How IEPO's lambda is estimated.")] = None,
    refresh: Annotated[int | None, typer.Option(help="Iterations between estimates of lambda.")] = None,
    init: Annotated[str | None, typer.Option(help="normal, uniform:N or a schedule file to start from.")] = None,
    order: Annotated[
        int | None, typer.Option(min=0, max=2, help="A reused branch stands on its last order + 1 values.")
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="ddim, ddpm, iddpm, dpmsolver++, sa-solver, unipc, euler or flow-euler.")
    ] = "ddim",
    steps: Annotated[int, typer.Option(min=2, help="Of a run, T.")] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; off unless above 1. Unless given, the model's own.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Class labels to learn on, e.g. 0,1,2; all unless given.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="Text: safetensors, states (n, tokens, width), mask (n, tokens); last empty.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="L2C: safetensors, images (n, C, H, W), labels (n).")] = None,
    iterations: Annotated[int | None, typer.Option(help="Trajectories.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images an iteration, over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Where to keep its state.")] = None,
    resume: Resume = False,
    published: Annotated[
        Path | None, typer.Option(help="Also write the router as HarmoniCa publishes them, a .pt.")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    dtype: Annotated[PipelineDtype, typer.Option(help="Of the weights.")] = PipelineDtype.float32,
    variant: Annotated[str | None, typer.Option(help="Of the weights' files, e.g. fp16.")] = None,
    mixed_precision: Annotated[str, typer.Option(help="no, fp16 or bf16: autocast.")] = "no",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations: less memory.")] = False,
    log: Annotated[Path | None, typer.Option(help="Folder for TensorBoard.")] = None,
) -> None:
    """Learn a router as published, HarmoniCa's SDT and IEPO or L2C, for a DiT or PixArt.

    [bold]Examples[/bold]

    harmonica router --model dit-fashion --target-speedup 2 --out router.json

    accelerate launch -m harmonica_rt.train router --model facebook/DiT-XL-2-256 --target-cur 0.375 --out xl.json
    """
    from .router_command import Request, learn_router

    with one_line_errors():
        settings: dict[str, Any] = {
            "iterations": iterations,
            "batch": batch,
            "lr": lr,
            "seed": seed,
            "refresh": refresh,
            "beta": beta,
        }
        settings["estimator"] = estimator and estimator.value
        request = Request(
            model=model,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            out=out,
            objective=objective.value,
            paper=paper,
            settings={name: value for name, value in settings.items() if value is not None},
            target_speedup=target_speedup,
            target_cur=target_cur,
            features=features,
            classes=None if classes is None else _numbers("classes", classes),
            init=init,
            order=order,
            images=images,
            threads=threads,
            dtype=dtype.value,
            variant=variant,
            mixed_precision=mixed_precision,
            checkpointing=checkpointing,
            checkpoint=checkpoint,
            resume=resume,
            published=published,
            log=log,
        )
        learn_router(request, console)


@app.command(no_args_is_help=True)
def inspect(file: File) -> None:
    """Print a schedule: what is computed at each step, CUR, how it was made."""
    from harmonica_rt import Schedule

    with one_line_errors():
        console.print(str(Schedule.load(file)), highlight=False, markup=False, soft_wrap=True)


@app.command(no_args_is_help=True)
def plot(
    file: File, out: Annotated[Path | None, typer.Option(help="Picture; FILE with .png unless given.")] = None
) -> None:
    """Draw a schedule as a heatmap, steps by layers, one panel a branch."""
    from harmonica_rt import Schedule

    with one_line_errors():
        out = out or file.with_suffix(".png")
        Schedule.load(file).plot(out)
        console.print(f"wrote {out}", highlight=False)


@app.command(no_args_is_help=True)
def convert(
    source: Annotated[str, typer.Argument(help="A published file; with --method mask the digits, 1 a computed step.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="The schedule file to write.")],
    method: Annotated[Method, typer.Option(help="Whose it is; mask: cache-dit's step masks.")] = Method.harmonica,
    tau: Annotated[float, typer.Option(help="Routers: an entry is computed iff sigmoid(logit) > tau.")] = 0.1,
    level: Annotated[MaskLevel, typer.Option(help="Masks: what is reused, all blocks or the output.")] = (
        MaskLevel.blocks
    ),
    variant: Annotated[str | None, typer.Option(help="Of the weights' files, e.g. fp16.")] = None,
) -> None:
    """Turn what another method fixes into a schedule file, without running what a file pickles.

    A router of HarmoniCa's or Learning-to-Cache's (.pt), a schedule of ECAD's or SmoothCache's (.json), a step mask.

    [bold]Examples[/bold]

    harmonica convert router.pt --model facebook/DiT-XL-2-256 --tau 0.1 --out dit.json

    harmonica convert ours_fast.json --method ecad --model PixArt-alpha/PixArt-XL-2-256x256 --out pixart.json

    harmonica convert 1111110100100000100001000001 --method mask --model black-forest-labs/FLUX.1-dev --out flux.json
    """
    from harmonica_rt import Schedule

    from .models import load
    from .router import check_tau

    with one_line_errors():
        check_tau(tau)
        transformer, _ = load(model, "ddim", variant=variant)
        match method:
            case Method.ecad:
                schedule = Schedule.from_ecad(source, transformer)
            case Method.smoothcache:
                schedule = Schedule.from_smoothcache(source, transformer)
            case Method.mask:
                schedule = Schedule.from_mask(source, transformer, level=level.value)
            case _:
                schedule = Schedule.from_router(source, transformer, method=method.value, tau=tau)
        schedule.save(out)
        console.print(f"wrote {out}: {schedule!r}", highlight=False, markup=False, soft_wrap=True)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    if not all(number.isdecimal() for number in text.split(",")):
        raise ValueError(f"--{name}: expected numbers with commas between them, got {text!r}")
    return tuple(map(int, text.split(",")))


app.command("try", no_args_is_help=True)(try_schedules)


if __name__ == "__main__":
    app()
