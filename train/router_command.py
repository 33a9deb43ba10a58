"""`harmonica router`: from a request to a schedule file, with progress, checkpoints and trackers."""

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

from harmonica_rt.layout import trunk_beside
from harmonica_rt.schedule import Schedule

from . import models
from .checkpoint import check_path
from .denoiser import adapt_to_learn
from .errors import check_file
from .progress import Display
from .router import write_published
from .task import Task
from .trainer import Progress, Settings, Trainer


@dataclass(frozen=True)
class Request:
    """The command line, read.

    Attributes:
        objective: "sdt" or "l2c".
        guidance: None for the model's own.
        classes: labels to learn on; all where None.
        features: file of the prompts' features to learn on, for a model that reads text.
        settings: the fields of `Settings` that were given.
        target_speedup, target_cur, init, order: None where not given.
    """

    model: str
    sampler: str
    steps: int
    out: Path
    guidance: float | None = None
    objective: str = "sdt"
    paper: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    target_speedup: float | None = None
    target_cur: float | None = None
    classes: tuple[int, ...] | None = None
    features: Path | None = None
    init: str | None = None
    order: int | None = None
    images: Path | None = None
    threads: int | None = None
    dtype: str = "float32"
    variant: str | None = None
    mixed_precision: str = "no"
    checkpointing: bool = False
    checkpoint: Path | None = None
    resume: bool = False
    published: Path | None = None
    log: Path | None = None


def learn_router(request: Request, console: Console) -> Schedule:
    """Learn, write `request.out`, and say what came of it."""
    for path in filter(None, (request.out, request.checkpoint, request.published)):
        check_file(path)
    if request.resume and request.checkpoint is None:
        raise ValueError("--resume: expected --checkpoint FILE, got none")
    if request.checkpoint is not None:
        check_path(request.checkpoint, request.resume)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    settings = _settings(request)
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    accelerator = Accelerator(
        cpu=not accelerated,  # a launcher's processes on CPUs are a group only if Accelerate is told so
        mixed_precision=request.mixed_precision,
        log_with="tensorboard" if request.log else None,
        project_dir=request.log,
    )
    dtype = getattr(torch, request.dtype)
    with Display(accelerator.is_main_process) as display:
        display.show("model", request.model)
        model, scheduler = models.load(request.model, request.sampler, dtype, request.variant)
        model.to(accelerator.device)
        conditions = models.conditions(request.model, model, request.features, request.classes)
        guidance = models.guidance(adapt_to_learn(model)) if request.guidance is None else request.guidance
        task = Task(model, scheduler, request.steps, guidance, conditions, request.checkpointing)
        schedule = _learn(request, task, settings, accelerator, display)
    accelerator.end_training()
    if accelerator.is_main_process:
        console.print(
            f"wrote {request.out}: {schedule!r}\n{schedule.note}", highlight=False, markup=False, soft_wrap=True
        )
    return schedule


def _learn(request: Request, task: Task, settings: Settings, accelerator: Accelerator, display: Display) -> Schedule:
    """A router by SDT and IEPO, or L2C."""
    images = _images(request.images, task.model)
    start = _start(settings.init, task.model, request.steps)
    if start is not None and (start.output.any() or trunk_beside(start.groups)):
        raise ValueError(f"init: expected a schedule that reuses branches alone for a router, got {request.init}")
    trainer = Trainer(task, settings, accelerator, images, start)
    if request.resume and request.checkpoint is not None:
        trainer.load(request.checkpoint)
    if request.log is not None:
        accelerator.init_trackers("harmonica")
    before, resumed = trainer.seconds, trainer.iteration
    total = settings.iterations
    display.show("first iteration", f"{resumed} of {total} iterations", resumed / total)

    def show(progress: Progress) -> None:
        done = progress.iteration
        left = (progress.seconds - before) / (done - resumed) * (total - done)
        display.show("router", f"{done} of {total} iterations, {_line(progress)}", done / total, left)
        if request.log is not None:
            _track(accelerator, trainer, progress)

    schedule = trainer.run(request.checkpoint, on_progress=show)
    if accelerator.is_main_process:
        schedule.save(request.out)
        if request.published is not None:
            write_published(trainer.router, request.published, trainer.tau())
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
    kind, _, every = init.partition(":")
    if kind != "uniform" or not every:
        return Schedule.load(init)
    if not every.isdecimal():
        raise ValueError(f"init: expected normal, uniform:N or a schedule file, got {init!r}")
    return Schedule.uniform(model, steps, int(every), order=0)


def _settings(request: Request) -> Settings:
    """SDT starts from every second step unless told otherwise: worth 5 dB at 60 iterations (train/STUDY.md)."""
    named = {name: getattr(request, name) for name in ("objective", "target_speedup", "target_cur", "init", "order")}
    chosen = request.settings | {name: value for name, value in named.items() if value is not None}
    if request.paper:
        return Settings.paper(request.steps, **chosen)
    start = {} if request.objective == "l2c" else {"init": "uniform:2"}
    return Settings(**{**start, **chosen})


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
    images, labels = tensors["images"], tensors["labels"]
    config: Any = model.config
    size = [config.in_channels, config.sample_size, config.sample_size]
    if shapes["images"][1:] != size or len(images) == 0:
        raise ValueError(f"{path}: expected images of {size}, one at least, got {shapes['images']}")
    if labels.is_floating_point() or not 0 <= labels.min() <= labels.max() < config.num_embeds_ada_norm:
        raise ValueError(
            f"{path}: expected integer labels from 0 to {config.num_embeds_ada_norm - 1}, "
            f"got {labels.dtype} from {labels.min()} to {labels.max()}"
        )
    return images, (labels,)
