"""The command line: learn, try, inspect, plot and convert schedules.

harmonica learn --pipeline FOLDER --prompts prompts.txt --target-speedup 2 --out schedule.json
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import pipeline_options as own
from .errors import one_line_errors
from .trying import try_schedules

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Reuse schedules for diffusion transformers: learn one for a frozen model, try it, convert others.",
)
console = Console()


class Objective(StrEnum):
    end = "end"
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


class Spent(StrEnum):
    macs = "macs"
    time = "time"


class Tie(StrEnum):
    none = "none"
    branch = "branch"
    step = "step"


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
LearnedModel = Annotated[
    str | None, typer.Option(help="A DiT or PixArt without a pipeline: folder or hub name, in a checkout dit-fashion.")
]
File = Annotated[Path, typer.Argument(help="A schedule file.")]

LEARNERS = {  # which options go with which objective
    "end": ("budget", "target", "minutes", "moves", "tie", "pool", "accumulate"),
    "router": ("estimator", "refresh", "beta", "images", "router"),
}


# Options of `learn` that a pipeline has no use for, and what they are where nothing was given
ONLY_MODEL = {
    "sampler": "ddim", "target_cur": None, "classes": None, "features": None, "budget": None, "target": None,
    "moves": None, "init": None, "pool": None, "tie": None, "objective": None, "paper": False, "beta": None,
    "estimator": None, "refresh": None, "images": None, "router": None,
    "variant": None, "mixed_precision": "no", "checkpointing": False, "log": None,
}  # fmt: skip


@app.command(no_args_is_help=True)
def learn(
    out: Annotated[Path, typer.Option(help="The schedule file to write.")],
    pipeline: own.Pipeline = None,
    model: LearnedModel = None,
    sampler: Annotated[
        str, typer.Option(help="ddim, ddpm, iddpm, dpmsolver++, sa-solver, unipc, euler or flow-euler.")
    ] = "ddim",
    steps: Annotated[int | None, typer.Option(min=2, help="Of a run, T: the pipeline's own, or 20.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; off unless above 1. Unless given, the model's own.")
    ] = None,
    target_speedup: Annotated[float | None, typer.Option(help="Theoretical speed-up to reach.")] = None,
    target_cur: Annotated[float | None, typer.Option(help="Cache utilisation ratio to reach, 0 to 1.")] = None,
    classes: Annotated[str | None, typer.Option(help="Class labels to learn on, e.g. 0,1,2; all unless given.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="Text: safetensors, states (n, tokens, width), mask (n, tokens); last empty.")
    ] = None,
    budget: Annotated[
        Spent | None, typer.Option(help="What a target speed-up counts: MACs, or time measured here.")
    ] = None,
    target: Annotated[
        Target | None, typer.Option(help="What runs aim at: the run without reuse, or the converged solution.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Time to learn for; 15 unless --iterations is given.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Steps of the weights; trajectories of a router.")] = None,
    moves: Annotated[
        int | None, typer.Option(min=0, help="Most changes of what is computed to try; none unless given.")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="uniform:N, output:N or a schedule file to start from; normal for a router.")
    ] = None,
    order: Annotated[
        int | None, typer.Option(min=0, max=2, help="A reused branch stands on its last order + 1 values.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images an iteration, over all processes.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Backward passes an iteration is split into.")] = None,
    pool: Annotated[int | None, typer.Option(help="Noises to learn on.")] = None,
    tie: Annotated[Tie | None, typer.Option(help="Weights that layers (branch) or all of a step share.")] = None,
    lr: Annotated[float | None, typer.Option(help="Length of the weights' steps; learning rate of a router.")] = None,
    objective: Annotated[
        Objective | None, typer.Option(help="The end error; or a router by SDT, or by L2C (needs --images).")
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="HarmoniCa's settings as published: SDT + IEPO.")] = False,
    beta: Annotated[float | None, typer.Option(help="Router: weight of the cost, the paper's way.")] = None,
    estimator: Annotated[Estimator | None, typer.Option(help="Router: how IEPO's lambda is estimated.")] = None,
    refresh: Annotated[int | None, typer.Option(help="Router: iterations between estimates of lambda.")] = None,
    images: Annotated[Path | None, typer.Option(help="L2C: safetensors, images (n, C, H, W), labels (n).")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Where to keep its state; a pipeline's: OUT.checkpoint.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint, to the same result.")] = False,
    router: Annotated[Path | None, typer.Option(help="Router: also write it as HarmoniCa publishes them.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    dtype: Annotated[
        own.PipelineDtype | None, typer.Option(help="Of the weights: float32, or on CUDA a pipeline's bfloat16.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Of the weights' files, e.g. fp16.")] = None,
    mixed_precision: Annotated[str, typer.Option(help="no, fp16 or bf16: autocast.")] = "no",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations: less memory.")] = False,
    log: Annotated[Path | None, typer.Option(help="Folder for TensorBoard.")] = None,
    prompts: own.Prompts = None,
    inputs: own.Inputs = None,
    negative_prompt: own.NegativePrompt = None,
    true_cfg: own.TrueCfg = None,
    height: own.Height = None,
    width: own.Width = None,
    frames: own.Frames = None,
    call: own.Call = None,
    level: Annotated[
        Level, typer.Option(help="What is reused; auto: one group of blocks.", rich_help_panel=own.PANEL)
    ] = Level.auto,
    groups: Annotated[
        int, typer.Option(min=1, help="At level blocks, of each list of blocks.", rich_help_panel=own.PANEL)
    ] = 1,
    channels: Annotated[
        Channels,
        typer.Option(
            help="Weights per channel; auto: where they help, in a .safetensors.",
            rich_help_panel=own.PANEL,
        ),
    ] = Channels.auto,
    contexts: Annotated[
        Contexts,
        typer.Option(
            help="Weights that guidance's contexts share, or own ones: a file each, OUT-cond, OUT-uncond.",
            rich_help_panel=own.PANEL,
        ),
    ] = Contexts.shared,
) -> None:
    """Learn a schedule for a frozen model: what is computed, and the weights that what is reused stands on.

    Ctrl-C ends it early with the best schedule so far; exit code 3 if that is the forecast's still. --resume goes on.

    [bold]Examples[/bold]

    harmonica learn --pipeline FOLDER_OR_HUB --prompts prompts.txt --steps 28 --target-speedup 3 --out s.json

    harmonica learn --model dit-fashion --target-speedup 2.9 --minutes 15 --out dit-fashion-2.9x.json

    harmonica learn --model dit-fashion --target-speedup 2.9 --target converged --out closer-than-uncached.json

    harmonica learn --model dit-fashion --objective sdt --target-speedup 2 --out router.json

    accelerate launch -m harmonica_rt.train learn --model facebook/DiT-XL-2-256 --target-cur 0.375 --out xl.json
    """
    from .pipeline_command import learn_for_pipeline
    from .run import Request, learn_schedule
    from .stopping import EndedEarly

    with one_line_errors():
        if (pipeline is None) == (model is None):
            got = "none" if model is None else "both"
            raise ValueError(f"expected --pipeline, a person's own, or --model, one whose loop is here; got {got}")
        if pipeline is not None:
            given = {name: value for name, value in locals().items() if name in ONLY_MODEL}
            for name, value in given.items():
                if value not in (ONLY_MODEL[name], None):
                    raise ValueError(f"--{name.replace('_', '-')}: goes with --model, got --pipeline {pipeline}")
            options = {"negative_prompt": negative_prompt, "steps": steps, "guidance": guidance, "true_cfg": true_cfg}
            options |= {"height": height, "width": width, "frames": frames}
            settings = {"minutes": minutes, "iterations": iterations, "order": order, "batch": batch, "lr": lr}
            settings |= {"accumulate": accumulate, "target_speedup": target_speedup, "contexts": contexts.value}
            settings |= {"channels": {"yes": True, "no": False}.get(channels.value)}
            settings |= {"level": level.value, "groups": groups, "seed": seed}
            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            try:
                learn_for_pipeline(
                    pipeline,
                    out,
                    console,
                    dtype,
                    prompts,
                    inputs,
                    own.call_arguments(call, **options),
                    {name: value for name, value in settings.items() if value is not None},
                    checkpoint,
                    resume,
                )
            except EndedEarly as early:
                Console(stderr=True).print(str(early), soft_wrap=True, highlight=False, markup=False)
                raise typer.Exit(3) from None
            return
        if contexts is Contexts.own:
            raise ValueError(f"--contexts own: goes with --pipeline, got --model {model}")
        kind = objective or (Objective.sdt if paper else Objective.end)
        given = {
            "budget": budget and budget.value,
            "target": target and target.value,
            "minutes": minutes,
            "moves": moves,
            "tie": tie and tie.value,
            "pool": pool,
            "accumulate": accumulate,
            "estimator": estimator and estimator.value,
            "refresh": refresh,
            "beta": beta,
            "images": images,
            "checkpoint": checkpoint,
            "router": router,
        }
        given = {name: value for name, value in given.items() if value is not None}
        learner, other = ("end", "router") if kind is Objective.end else ("router", "end")
        for name in LEARNERS[other]:
            if name in given:
                expected = "sdt or l2c" if learner == "end" else "end"
                raise ValueError(f"--{name}: goes with --objective {expected}, got {kind.value}")
        if budget is Spent.time and target_speedup is None:
            raise ValueError("--budget time: expected --target-speedup, got none")
        if paper and kind is Objective.end:
            raise ValueError("--paper: goes with --objective sdt or l2c, got end")
        apart = ("budget", "minutes", "moves", "images", "checkpoint", "router")
        common = {"iterations": iterations, "batch": batch, "lr": lr, "seed": seed}
        request = Request(
            model=model,
            sampler=sampler,
            steps=20 if steps is None else steps,
            guidance=guidance,
            out=out,
            objective=kind.value,
            paper=paper,
            settings={k: v for k, v in (given | common).items() if v is not None and k not in apart},
            target_speedup=target_speedup,
            target_cur=target_cur,
            features=features,
            classes=None if classes is None else _numbers("classes", classes),
            init=init,
            order=order,
            threads=threads,
            dtype="float32" if dtype is None else dtype.value,
            variant=variant,
            mixed_precision=mixed_precision,
            checkpointing=checkpointing,
            resume=resume,
            log=log,
            **{name: given[name] for name in apart if name in given},
        )
        try:
            learn_schedule(request, console)
        except EndedEarly as early:
            Console(stderr=True).print(str(early), soft_wrap=True, highlight=False, markup=False)
            raise typer.Exit(3) from None


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
