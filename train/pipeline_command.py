"""`harmonica learn --pipeline`: from a folder and a file of prompts to a schedule file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from harmonica_rt.generating import load_pipeline, read_prompts
from harmonica_rt.schedule import Schedule
from harmonica_rt.schedule_specs import named_files

from . import learn as learning
from .checkpoint import check_path
from .contexts import Schedules, every, files_of, save
from .errors import check_file
from .memory import Memory
from .pipeline import learn
from .pipeline_options import Asked, torch_dtype
from .progress import Display
from .stopping import EndedEarly, stopping
from .trainer import LossNotFinite


def learn_for_pipeline(
    asked: Asked,
    out: Path,
    console: Console,
    settings: dict[str, Any],
    init: str | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Schedules:
    """Learn, write `out` at each improvement, and say what came of it; own weights of contexts in OUT-cond, OUT-uncond.

    Args:
        asked: the pipeline and its call.
        settings: arguments of `learn`. Weights per channel need a .safetensors file.
        init: file to go on from, or cond=FILE,uncond=FILE.
        checkpoint: where the learning is kept until it ends whole; beside `out` unless given.
        resume: go on from there.

    Raises:
        EndedEarly: it was stopped before anything was learned; the file has the forecast's weights.
    """
    checkpoint = checkpoint or out.with_name(f"{out.name}.checkpoint")
    for path in (out, checkpoint):
        check_file(path)
    check_path(checkpoint, resume)
    plain = out.suffix != ".safetensors"
    if settings.setdefault("channels", False if plain else None) and plain:
        raise ValueError(f"--channels yes: expected a .safetensors file as --out, got {out}")
    call = asked.arguments()
    own = None if asked.prompts is None else read_prompts(asked.prompts)
    start = None if init is None else _start(init)
    wide = (own is not None for first in every(start or {}) for own in (first.channels, first.output_channels))
    if plain and any(wide):
        raise ValueError(f"--init with weights per channel: expected a .safetensors file as --out, got {out}")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with Display(accelerator.is_main_process) as display, stopping(accelerator) as stopped:
        display.show("pipeline", asked.pipeline)
        pipeline = load_pipeline(asked.pipeline, torch_dtype(asked.dtype), accelerator.device)
        display.show("what to compute")

        def show(progress: learning.Progress) -> None:
            display.show(progress.phase, str(progress), progress.share, progress.left)

        def tell(memory: Memory) -> None:
            display.show("memory", str(memory) if memory.fits else f"{memory}; it will not fit: {memory.advice}")

        written = False

        def write(better: Schedules) -> None:
            nonlocal written
            save(better, out)
            written = True

        try:
            schedule = learn(
                pipeline,
                own,
                inputs=asked.inputs,
                accelerator=accelerator,
                on_progress=show,
                on_better=write,
                on_memory=tell,
                stopped=stopped,
                checkpoint=checkpoint,
                resume=resume,
                init=start,
                **settings,
                **call,
            )
        except LossNotFinite as error:
            left = f"; {out} is the best schedule until then" if written else ""
            raise LossNotFinite(f"{error}{left}") from None
        whole = not stopped()
    if accelerator.is_main_process:
        save(schedule, out)
        if whole:
            checkpoint.unlink(missing_ok=True)
        elif checkpoint.exists():
            display.console.print(f"--resume goes on from {checkpoint}", highlight=False, markup=False, soft_wrap=True)
        for path, made in files_of(schedule, out).items():
            console.print(f"wrote {path}: {made!r}\n{made.note}", highlight=False, markup=False, soft_wrap=True)
    if every(schedule)[0].note.startswith("ended early"):
        names = " and ".join(str(path) for path in files_of(schedule, out))
        raise EndedEarly(f"ended early, nothing better than the forecast yet: {names} has the forecast's weights")
    return schedule


def _start(init: str) -> Schedules:
    """The schedules that ``--init`` names."""
    if not (files := named_files(init)):
        raise FileNotFoundError(f"--init: expected a schedule file, or cond=FILE,uncond=FILE, got {init!r}")
    schedules = {context: Schedule.load(path) for context, path in files.items()}
    return schedules.get("", schedules)
