"""`harmonica learn`: from a request to a schedule file, with progress, checkpoints and trackers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from harmonica_rt.layout import trunk_beside
from harmonica_rt.schedule import Schedule

from . import learn, models
from .budget import TOLERANCE, Budget, macs
from .checkpoint import check_path
from .denoiser import adapt_to_learn
from .errors import check_file
from .progress import Display
from .record import Record
from .router import write_published
from .starts import mean, starts_of
from .stopping import EndedEarly, stopping
from .task import Task
from .timing import seconds
from .trainer import Progress, Settings, Trainer
from .weights import WeightSettings, check_schedule

MINUTES, ORDER, POWERS = 15.0, 2, (1.0, 0.8, 0.65, 0.5)  # on the end error, unless given
MOST = 1_000_000  # iterations, where the minutes decide
CUT_NOISES, CUT_SEED = 16, 1 << 45  # that decide which layers a spread leaves out
# What a checkpoint of the end error belongs to, besides the weights' settings
ASKED = ("target_speedup", "target_cur", "init", "order", "budget", "dtype", "mixed_precision")
CONVERGED_POOL = 192  # noises: each one's target is a run of 100 steps


@dataclass(frozen=True)
class Request:
    """The command line, read.

    Attributes:
        objective: "end", or how a router is learned: "sdt" or "l2c".
        guidance: None for the model's own.
        classes: labels to learn on; all where None.
        features: file of the prompts' features to learn on, for a model that reads text.
        budget: what a target speed-up counts, "macs" or "time", measured on this machine.
        settings: the fields of `WeightSettings` (end) or `Settings` (router) that were given.
        target_speedup, target_cur, init, order: None where not given.
    """

    model: str
    sampler: str
    steps: int
    out: Path
    guidance: float | None = None
    objective: str = "end"
    paper: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    target_speedup: float | None = None
    target_cur: float | None = None
    classes: tuple[int, ...] | None = None
    features: Path | None = None
    budget: str = "macs"
    init: str | None = None
    order: int | None = None
    minutes: float | None = None
    moves: int = 0
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
    """Learn, write `request.out`, and say what came of it.

    Raises:
        EndedEarly: it was stopped before anything was learned on the end error; the file is written.
    """
    for path in filter(None, (request.out, request.checkpoint, request.router)):
        check_file(path)
    if request.resume and request.checkpoint is None:
        raise ValueError("--resume: expected --checkpoint FILE, got none")
    if request.checkpoint is not None:
        check_path(request.checkpoint, request.resume)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    settings = _weight_settings(request) if request.objective == "end" else _settings(request)
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
        within_steps = request.checkpointing and request.objective != "end"  # whose checkpoints are whole steps
        conditions = models.conditions(request.model, model, request.features, request.classes)
        guidance = models.guidance(adapt_to_learn(model)) if request.guidance is None else request.guidance
        task = Task(model, scheduler, request.steps, guidance, conditions, within_steps)
        kind = _end if isinstance(settings, WeightSettings) else _router
        schedule = kind(request, task, settings, accelerator, display)
    accelerator.end_training()
    if accelerator.is_main_process:
        console.print(
            f"wrote {request.out}: {schedule!r}\n{schedule.note}", highlight=False, markup=False, soft_wrap=True
        )
    return schedule


def _end(
    request: Request, task: Task, settings: WeightSettings, accelerator: Accelerator, display: Display
) -> Schedule:
    """What is computed and reuse weights, on the end error."""
    minutes = request.minutes
    if minutes is None and "iterations" not in request.settings:
        minutes = MINUTES
    learn.check_minutes(minutes)

    def show(progress: learn.Progress) -> None:
        display.show(progress.phase, str(progress), progress.share, progress.left)
        if request.log is not None:
            accelerator.log({"gained": progress.gained}, step=int(1000 * progress.share))

    with stopping(accelerator) as stopped:
        display.show("what to compute", left=None if minutes is None else 60 * minutes)
        asked = {name: getattr(request, name) for name in ASKED} | asdict(settings) | {"minutes": minutes}
        record = Record(request.checkpoint, request.resume, task, asked)
        starts = record.starts or _end_starts(request, task, accelerator)
        if request.log is not None:
            accelerator.init_trackers("harmonica")
        told = {"on_progress": show, "stopped": stopped, "record": record}
        learned = learn.learn(task, starts, settings, minutes, request.moves, accelerator, **told)
        whole = learned.failure is None and not stopped()
    if accelerator.is_main_process:
        learned.schedule.save(request.out)
        if whole and request.checkpoint is not None:
            request.checkpoint.unlink(missing_ok=True)
    if learned.failure is not None:
        raise type(learned.failure)(f"{learned.failure}; {request.out} is the best schedule until then")
    if learned.psnr is None:
        raise EndedEarly(f"ended early, nothing better than the forecast yet: {request.out} has the forecast's weights")
    return learned.schedule


def _router(request: Request, task: Task, settings: Settings, accelerator: Accelerator, display: Display) -> Schedule:
    """A router by SDT and IEPO, or L2C."""
    images = _images(request.images, task.model)
    start = _start(settings.init, task.model, request.steps, 0)
    if start is not None and (start.output.any() or trunk_beside(start.groups)):
        raise ValueError(f"init: expected a schedule that reuses branches alone for a router, got {request.init}")
    trainer = Trainer(task, settings, accelerator, images, start)
    if request.resume:
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
        if request.router is not None:
            write_published(trainer.router, request.router, trainer.tau())
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


def _start(init: str, model: torch.nn.Module, steps: int, order: int) -> Schedule | None:
    """The schedule `--init` names: none for normal."""
    if init == "normal":
        return None
    kind, _, every = init.partition(":")
    if kind not in ("uniform", "output") or not every:
        return Schedule.load(init)
    if not every.isdecimal():
        raise ValueError(f"init: expected normal, uniform:N, output:N or a schedule file, got {init!r}")
    uniform = Schedule.uniform(model, steps, int(every), order=order)
    output = ~uniform.compute.any((1, 2))
    return uniform if kind == "uniform" else uniform.replace(output=output, note=f"output reused but every {every}")


def _end_starts(request: Request, task: Task, accelerator: Accelerator) -> list[Schedule]:
    """What may be computed at first: whole steps that meet the target, evenly and towards the end, unless told."""
    if request.init == "normal":
        raise ValueError(
            "init: expected uniform:N, output:N or a schedule file, got normal, which is for a router's logits"
        )
    order = ORDER if request.order is None else request.order
    fields, budget = task.fields(), None
    costs = macs(task.adapter, task.context)
    if request.budget == "time":  # the main process's, since all are to start from the same
        (costs,) = broadcast_object_list([seconds(task)])
    if request.target_speedup is not None or request.target_cur is not None:
        budget = Budget(task.adapter, task.steps, request.target_speedup, request.target_cur, costs=costs)
    if request.init is None:
        if budget is None:
            raise ValueError("expected a target speed-up, a target CUR or --init, got none")
        first = _cut_first(task, budget, order, accelerator)
        spreads = [budget.spread(power, first) for power in POWERS]
        computed = {spread.tobytes(): spread for spread in spreads}
        return [Schedule(compute, order=order, **fields) for compute in computed.values()]
    start = _start(request.init, task.model, task.steps, order)
    check_schedule(task, start)
    if request.order is not None and start.order != order:
        raise ValueError(f"init: expected a schedule of order {order}, got order {start.order}")
    value = budget and budget.value(
        start.compute.reshape(start.steps, -1)[:, : len(costs.entries)], int(start.output.sum())
    )
    if budget is not None and value < (1 - TOLERANCE) * budget.target:
        raise ValueError(
            f"init: expected a schedule that meets the target of {budget.target:g}, got one of "
            f"{value:.2f}; moves do not change what a start costs"
        )
    return [start.replace(**{name: fields[name] for name in ("sampler", "timesteps", "guidance_scale")})]


def _cut_first(task: Task, budget: Budget, order: int, accelerator: Accelerator) -> bool:
    """Whether leaving out first layers costs less than last ones, by the forecast's error: DiTs and PixArts differ."""
    computed = [budget.spread(first=first) for first in (False, True)]
    if np.array_equal(*computed):
        return False
    starts = starts_of(task, "full", CUT_NOISES, CUT_SEED)
    last, first = (mean(starts.judge(Schedule(c, order=order, **task.fields()), accelerator)) for c in computed)
    return bool(first < last)


def _settings(request: Request) -> Settings:
    """SDT starts from every second step unless told otherwise: worth 5 dB at 60 iterations (train/STUDY.md)."""
    named = {name: getattr(request, name) for name in ("objective", "target_speedup", "target_cur", "init", "order")}
    chosen = request.settings | {name: value for name, value in named.items() if value is not None}
    if request.paper:
        return Settings.paper(request.steps, **chosen)
    start = {} if request.objective == "l2c" else {"init": "uniform:2"}
    return Settings(**{**start, **chosen})


def _weight_settings(request: Request) -> WeightSettings:
    given = {"iterations": MOST, "checkpointing": "steps" if request.checkpointing else "none", **request.settings}
    if given.get("target") == "converged":
        given = {"pool": CONVERGED_POOL, **given}
    return WeightSettings(**given)


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
