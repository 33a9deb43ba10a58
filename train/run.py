"""`harmonica learn`: from a request to a schedule file, with progress, checkpoints and trackers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from harmonica_rt.schedule import Schedule

from . import models
from .router import write_published
from .task import Task
from .trainer import Progress, Settings, Trainer


@dataclass(frozen=True)
class Request:
    """The command line, read. `settings` are the fields of `Settings` that were given."""

    model: str
    sampler: str
    steps: int
    guidance: float
    out: Path
    paper: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    images: Path | None = None
    threads: int | None = None
    dtype: str = "float32"
    variant: str | None = None
    mixed_precision: str = "no"
    checkpointing: bool = False
    checkpoint: Path | None = None
    resume: bool = False
    router: Path | None = None
    log: Path | None = None


def learn_schedule(request: Request, console: Console) -> Schedule:
    """Learn, write `request.out`, and say what came of it."""
    for path in filter(None, (request.out, request.checkpoint, request.router)):
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
        if path.is_dir():
            raise IsADirectoryError(f"{path}: expected a file to write, got a folder")
    if request.resume and request.checkpoint is None:
        raise ValueError("--resume: expected --checkpoint FILE, got none")
    if request.checkpoint is not None and request.checkpoint.exists() and not request.resume:
        raise ValueError(
            f"--checkpoint: {request.checkpoint} exists; expected --resume to go on from it, or another file"
        )
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    settings = _settings(request)
    accelerator = Accelerator(
        mixed_precision=request.mixed_precision,
        log_with="tensorboard" if request.log else None,
        project_dir=request.log,
    )
    dtype = getattr(torch, request.dtype)
    model, scheduler = models.load(request.model, request.sampler, dtype, request.variant)
    model.to(accelerator.device)
    task = Task(model, scheduler, request.steps, request.guidance, checkpointing=request.checkpointing)
    images, start = _images(request.images, model), _start(settings.init, model, request.steps)
    trainer = Trainer(task, settings, accelerator, images, start)
    if request.resume:
        trainer.load(request.checkpoint)
    if request.log is not None:
        accelerator.init_trackers("harmonica")
    with tqdm(
        total=settings.iterations, initial=trainer.iteration, disable=not accelerator.is_main_process, unit="run"
    ) as bar:

        def show(progress: Progress) -> None:
            bar.update()
            bar.set_postfix_str(_line(progress))
            if request.log is not None:
                _track(accelerator, trainer, progress)

        schedule = trainer.run(request.checkpoint, on_progress=show)
    accelerator.end_training()
    if accelerator.is_main_process:
        schedule.save(request.out)
        if request.router is not None:
            write_published(trainer.router, request.router, trainer.tau())
        console.print(
            f"wrote {request.out}: {schedule!r}\n{schedule.note}", highlight=False, markup=False, soft_wrap=True
        )
    return schedule


def _line(progress: Progress) -> str:
    low, high = progress.lambdas
    return (
        f"loss {progress.loss:.2e}, CUR by r {100 * progress.cur:.1f} %, beta {progress.beta:.1e}, "
        f"lambda {low:.2g} to {high:.2g}"
    )


def _track(accelerator: Accelerator, trainer: Trainer, progress: Progress) -> None:
    low, high = progress.lambdas
    values = {
        "loss": progress.loss,
        "mse": progress.mse,
        "cur": progress.cur,
        "beta": progress.beta,
        "lambda/min": low,
        "lambda/max": high,
    }
    accelerator.log(values, step=progress.iteration)
    if progress.iteration % 25 == 0 or progress.iteration == trainer.settings.iterations:
        gates = torch.sigmoid(trainer.router.to_tensor()).flatten(1).numpy()  # [T, L B]
        picture = np.kron(gates, np.ones((8, 8)))[None, :, :, None]
        accelerator.get_tracker("tensorboard").log_images({"router": picture}, progress.iteration, dataformats="NHWC")


def _start(init: str, model: torch.nn.Module, steps: int) -> Schedule | None:
    """The schedule `--init` names: none for normal."""
    if init == "normal":
        return None
    if not init.startswith("uniform:"):
        return Schedule.load(init)
    if not (every := init.removeprefix("uniform:")).isdecimal():
        raise ValueError(f"init: expected normal, uniform:N or a schedule file, got {init!r}")
    return Schedule.uniform(model, steps, int(every), order=0)


def _settings(request: Request) -> Settings:
    """SDT starts from every second step unless told otherwise: worth 5 dB at 60 iterations (train/README.md)."""
    if request.paper:
        return Settings.paper(request.steps, **request.settings)
    start = {} if request.settings.get("objective") == "l2c" else {"init": "uniform:2"}
    return Settings(**{**start, **request.settings})


def _images(path: Path | None, model: torch.nn.Module) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
    """Real samples for L2C and their class labels, checked against the model."""
    if path is None:
        return None
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if set(tensors) != {"images", "labels"} or shapes["labels"] != shapes["images"][:1]:
        raise ValueError(f"{path}: expected images [n, channels, height, width] and labels [n], got {shapes}")
    images, labels, config = tensors["images"], tensors["labels"], model.config
    size = [config.in_channels, config.sample_size, config.sample_size]
    if shapes["images"][1:] != size or len(images) == 0:
        raise ValueError(f"{path}: expected images of {size}, one at least, got {shapes['images']}")
    if labels.is_floating_point() or not 0 <= labels.min() <= labels.max() < config.num_embeds_ada_norm:
        raise ValueError(
            f"{path}: expected integer labels from 0 to {config.num_embeds_ada_norm - 1}, "
            f"got {labels.dtype} from {labels.min()} to {labels.max()}"
        )
    return images, (labels,)
