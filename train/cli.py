"""The command line: learn, inspect, plot and convert schedules.

harmonica learn --model dit-fashion --steps 20 --target-speedup 2 --out schedule.json
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Reuse schedules for diffusion transformers: learn one for a frozen model, look at it, convert others.",
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


class Method(StrEnum):
    harmonica = "harmonica"
    l2c = "l2c"


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Model = Annotated[str, typer.Option(help="Reference model, folder or hub name (a pipeline or its transformer).")]
File = Annotated[Path, typer.Argument(help="A schedule file.")]
Order = Annotated[int, typer.Option(min=0, max=2, help="A reused branch stands on its last order + 1 values.")]


@app.command(no_args_is_help=True)
def learn(
    model: Model,
    out: Annotated[Path, typer.Option(help="The schedule file to write.")],
    sampler: Annotated[str, typer.Option(help="ddim or dpmsolver++.")] = "ddim",
    steps: Annotated[int, typer.Option(min=2, help="Denoiser calls a run, T.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; off unless above 1.")] = 1.5,
    target_speedup: Annotated[float | None, typer.Option(help="Theoretical speed-up to reach.")] = None,
    target_cur: Annotated[float | None, typer.Option(help="Cache utilisation ratio to reach, 0 to 1.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the cost, the paper's way; no target then.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="HarmoniCa's settings as published.")] = False,
    objective: Annotated[Objective | None, typer.Option(help="SDT, or the L2C baseline (needs --images).")] = None,
    images: Annotated[Path | None, typer.Option(help="L2C: safetensors with images [n, C, H, W], labels [n].")] = None,
    estimator: Annotated[Estimator | None, typer.Option(help="How IEPO's lambda is estimated.")] = None,
    refresh: Annotated[int | None, typer.Option(help="Iterations between estimates of lambda.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Trajectories to train on.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images an iteration, over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of AdamW.")] = None,
    init: Annotated[str | None, typer.Option(help="normal, uniform:N, or a schedule file to start from.")] = None,
    order: Order = 0,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the model's weights.")] = Dtype.float32,
    variant: Annotated[str | None, typer.Option(help="Of the weights' files, e.g. fp16.")] = None,
    mixed_precision: Annotated[str, typer.Option(help="no, fp16 or bf16: autocast.")] = "no",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations: less memory.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Where to keep the training's state.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --checkpoint.")] = False,
    router: Annotated[Path | None, typer.Option(help="Also write the router as HarmoniCa publishes them.")] = None,
    log: Annotated[Path | None, typer.Option(help="Folder for TensorBoard.")] = None,
) -> None:
    """Learn a schedule for a frozen model.

    [bold]Examples[/bold]

    harmonica learn --model dit-fashion --target-speedup 2 --out dit-fashion-2x.json

    accelerate launch -m harmonica_rt.train learn --model facebook/DiT-XL-2-256 --target-cur 0.375 --out xl.json
    """
    from .run import Request, learn_schedule

    chosen = {
        "objective": objective and objective.value,
        "estimator": estimator and estimator.value,
        "refresh": refresh,
        "iterations": iterations,
        "batch": batch,
        "lr": lr,
        "beta": beta,
        "target_speedup": target_speedup,
        "target_cur": target_cur,
        "init": init,
    }
    request = Request(
        model=model,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        out=out,
        paper=paper,
        settings={k: v for k, v in chosen.items() if v is not None} | {"order": order, "seed": seed},
        images=images,
        threads=threads,
        dtype=dtype.value,
        variant=variant,
        mixed_precision=mixed_precision,
        checkpointing=checkpointing,
        checkpoint=checkpoint,
        resume=resume,
        router=router,
        log=log,
    )
    with _errors():
        learn_schedule(request, console)


@app.command(no_args_is_help=True)
def inspect(file: File) -> None:
    """Print a schedule: what is computed at each step, CUR, how it was made."""
    from harmonica_rt import Schedule

    with _errors():
        console.print(str(Schedule.load(file)), highlight=False, markup=False, soft_wrap=True)


@app.command(no_args_is_help=True)
def plot(
    file: File, out: Annotated[Path | None, typer.Option(help="Picture; FILE with .png unless given.")] = None
) -> None:
    """Draw a schedule as a heatmap, steps by layers, one panel a branch."""
    from harmonica_rt import Schedule

    with _errors():
        out = out or file.with_suffix(".png")
        Schedule.load(file).plot(out)
        console.print(f"wrote {out}", highlight=False)


@app.command(no_args_is_help=True)
def convert(
    router: Annotated[Path, typer.Argument(help="A published router checkpoint (.pt).")],
    model: Model,
    out: Annotated[Path, typer.Option(help="The schedule file to write.")],
    method: Annotated[Method, typer.Option(help="Which paper's checkpoint it is.")] = Method.harmonica,
    tau: Annotated[float, typer.Option(help="An entry is computed iff sigmoid(logit) > tau.")] = 0.1,
    variant: Annotated[str | None, typer.Option(help="Of the weights' files, e.g. fp16.")] = None,
) -> None:
    """Turn a published router checkpoint into a schedule file, without running what it pickles."""
    from harmonica_rt import Schedule

    from .models import load
    from .router import check_tau

    with _errors():
        check_tau(tau)
        transformer, _ = load(model, "ddim", variant=variant)
        schedule = Schedule.from_router(router, transformer, method=method.value, tau=tau)
        schedule.save(out)
        console.print(f"wrote {out}: {schedule!r}", highlight=False, markup=False, soft_wrap=True)


class _errors:
    """Bad input ends with its message and exit code 2; anything else with its traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (ValueError, TypeError, OSError, FloatingPointError)):
            line = " ".join(str(error).split("\n"))
            Console(stderr=True).print(f"[red]error:[/red] {escape(line)}", soft_wrap=True, highlight=False)
            raise typer.Exit(2)


if __name__ == "__main__":
    app()
