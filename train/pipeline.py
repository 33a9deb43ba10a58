"""Learning a schedule on a person's own pipeline, whole: `harmonica_rt.learn`."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from harmonica_rt.compiled import Schedules
from harmonica_rt.generating import Generation
from harmonica_rt.schedule import Schedule

from . import learn as learning
from .checkpoint import check_path, fingerprint
from .contexts import CONTEXTS, check_schedules, each, every
from .errors import check_file
from .memory import Memory, NotCounted
from .pipeline_task import PipelineTask
from .record import Record
from .reusing import CHECKPOINTS
from .sampled import Sampled, check_not_compiled
from .starts import Starts, mean
from .stopping import never
from .weights import WeightSettings

CARRIES = (0.0, 0.5, 1.0)
TRIED = 2  # prompts that tell the carry and the forecast to start from
TRIED_SEED = 1 << 46
MINUTES, MOST = 15.0, 1_000_000  # iterations, where the minutes decide
CAPTIONS = Path(__file__).with_name("captions.txt")


def own_captions() -> list[str]:
    """200 varied captions, for who has none."""
    return CAPTIONS.read_text(encoding="utf-8").splitlines()


def warn_of(memory: Memory) -> None:
    """Warn where learning will not fit, and say what to change."""
    if not memory.fits:
        warnings.warn(f"learning will not fit: {memory}; {memory.advice}", stacklevel=3)


def learn(
    pipeline: Any,
    prompts: Sequence[str | int] | None = None,
    *,
    target_speedup: float | None = None,
    target: str = "full",
    init: Schedules | None = None,
    level: str = "auto",
    groups: int = 1,
    order: int | None = None,
    minutes: float | None = None,
    iterations: int | None = None,
    batch: int = 4,
    accumulate: int = 1,
    validation: int = 16,
    channels: bool | None = None,
    contexts: str = "shared",
    checkpointing: str = "auto",
    lr: float | None = None,
    power: float = 0.0,
    seed: int = 0,
    inputs: Path | None = None,
    accelerator: Accelerator | None = None,
    on_progress: Callable[[learning.Progress], None] = lambda progress: None,
    on_better: Callable[[Schedules], None] = lambda schedule: None,
    on_memory: Callable[[Memory], None] = warn_of,
    stopped: Callable[[], bool] = never,
    checkpoint: Path | None = None,
    resume: bool = False,
    **call: Any,
) -> Schedules:
    """Learn what the reused steps of a pipeline stand on: weights, carries, by the gradient of the latents' error.

    The pipeline's own call runs, with gradients; it is left as it was.

    Args:
        pipeline: a diffusers pipeline, not compiled.
        prompts: texts, or class labels where its call takes these; 200 captions of our own unless given. Of 8 or more a
            quarter is held out, to judge by.
        target_speedup: theoretical, of a run, met within a hundredth; whole steps are computed or reused. 3 unless
            given.
        target: ``"full"``, the same run without reuse, or ``"converged"``, the solution that its sampler approximates.
        init: a schedule to go on from, or one a context, in place of a target speed-up: what it computes stays, which
            may be other steps in other contexts, its level, groups and order are taken.
        level: ``"blocks"``, ``"branches"``, ``"output"``, or ``"auto"``: one group of blocks where there are blocks.
        groups: at level blocks, how many groups each list of blocks is split into.
        order: a reused value stands on the last `order` + 1 computed ones; 2 unless given.
        minutes: to learn for; 15 unless `iterations` are given.
        batch: images an iteration, in `accumulate` calls of the pipeline.
        validation: images that tell the best weights.
        channels: weights per channel; unless given, where there are streams and they are better on what is held out.
        contexts: ``"shared"`` learns one set of weights, carries and channels for all contexts of a step; ``"own"`` one
            for each that the pipeline names (``"cond"``, ``"uncond"``), together. What is computed is the same, unless
            `init` says otherwise.
        checkpointing: keep one step's activations at a time (``"steps"``), or of it one block's (``"blocks"``), which
            takes a third longer, or all (``"none"``); ``"auto"``: steps where that fits, else blocks.
        lr: root mean square of the weights' first changes.
        power: images' squared errors are raised to it before their mean is lowered; 0: the mean of their dB, all alike.
            The higher, the more the worst count: 1 lowers the mean squared error.
        seed: of prompts and noises.
        inputs: folder of pictures and captions, for pipelines that start from a picture.
        on_better: told each better schedule as soon as it is known.
        on_memory: told what learning will take, before it begins; a warning says so where it cannot be counted.
        checkpoint: file to keep the learning in, at least every half minute; none unless given. It stays.
        resume: go on from `checkpoint`: to the same result as if nothing had come between, with what minutes are left.
        call: the pipeline's own arguments: ``num_inference_steps``, ``guidance_scale``, ``height``, ...

    Returns:
        The schedule, or by context each, as `compile` takes them; notes say what was reached on prompts and noises
        held out.

    Raises:
        FileNotFoundError: there is nothing to go on from.
        TypeError, ValueError: naming what was expected and what came; EndedEarly: stopped before anything was learned.
    """
    check_not_compiled(pipeline)
    if contexts not in CONTEXTS:
        raise ValueError(f"contexts: expected one of {CONTEXTS}, got {contexts!r}")
    if checkpointing not in ("auto", *CHECKPOINTS):
        raise ValueError(f"checkpointing: expected one of {('auto', *CHECKPOINTS)}, got {checkpointing!r}")
    learning.check_minutes(minutes)
    if init is not None:
        level, groups, order, contexts = _as_in(init, level, groups, order, contexts, target_speedup, channels)
    target_speedup, order = 3.0 if target_speedup is None else target_speedup, 2 if order is None else order
    rate: dict[str, Any] = {} if lr is None else {"lr": lr}
    settings = WeightSettings(
        target=target,
        iterations=MOST if iterations is None else iterations,
        batch=batch,
        accumulate=accumulate,
        pool=max(batch, 24 * batch),
        validation=validation,
        checkpointing="steps" if checkpointing == "auto" else checkpointing,
        power=power,
        seed=seed,
        **rate,
    )
    if checkpoint is not None:
        check_file(checkpoint := Path(checkpoint))
        check_path(checkpoint, resume)
    if prompts is None and inputs is None and "prompt" in _arguments(pipeline) and "prompt_embeds" not in call:
        prompts = own_captions()
    generation = Generation(pipeline, prompts, inputs=inputs, seed=seed, **call)
    accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
    sampled = Sampled(pipeline)
    with sampled.ready():
        size = max(1, batch // accumulate // accelerator.num_processes)
        task = PipelineTask(sampled, generation, level, groups, size)
        learns = level != "output" and task.width is not None
        settings = replace(settings, carry=task.carry, channels=learns if channels is None else channels)
        if settings.channels and not learns:
            raise ValueError("channels: expected False at level output, got True")
        minutes = MINUTES if minutes is None and iterations is None else minutes
        names = task.named_contexts() if contexts == "own" else ()

        def of_contexts(schedule: Schedule) -> Schedules:
            return dict.fromkeys(names, schedule) if names else schedule

        if init is not None:
            _check_start(task, init, names)
        wanted = init or of_contexts(task.schedule(task.spread(target_speedup), order))
        try:
            memory = task.memory(wanted, settings)
            if checkpointing == "auto" and not memory.fits and task.layout.level != "output":
                settings = replace(settings, checkpointing="blocks")
                memory = task.memory(wanted, settings)
        except NotCounted as error:
            warnings.warn(
                f"what learning takes in memory was not counted: {error}; where it does not fit, make fewer images a "
                "call (--accumulate) or smaller ones (--height, --width)",
                stacklevel=2,
            )
        else:
            on_memory(memory)
        asked = asdict(settings) | {"target_speedup": target_speedup, "order": order, "minutes": minutes}
        asked |= {"contexts": contexts, "init": None if init is None else _told(init)}
        record = Record(checkpoint, resume, task, asked)
        starts: Sequence[Schedules]
        if record.starts is None:
            few = task.starts("full", TRIED, TRIED_SEED)
            task.start = _best_start(task, wanted, few, accelerator)
            record.chosen = {"start": task.start}
            if init is None:
                spreads = [task.schedule(own, order, *task.start) for own in task.spreads(target_speedup)]
                starts = [of_contexts(own) for own in sorted(spreads, key=lambda s: mean(few.judge(s, accelerator)))]
            else:
                starts = [init]
        else:
            starts, task.start = record.starts, tuple(record.chosen["start"])
        told = (on_progress, stopped, on_better)
        plain = channels is None and learns and init is None
        learned = learning.learn(task, starts, settings, minutes, accelerator, *told, record, plain)
    if learned.failure is not None:
        raise learned.failure
    if learned.snr is None:
        return learned.schedule
    return each(learned.schedule, lambda own: own.replace(note=f"{task.told(own)}; {own.note}"))


def _as_in(
    init: Schedules,
    level: str,
    groups: int,
    order: int | None,
    contexts: str,
    target_speedup: float | None,
    channels: bool | None,
) -> tuple[str, int, int, str]:
    """Level, groups, order and contexts of `init`. Raises TypeError or ValueError for others beside it."""
    check_schedules("init", init)
    schedule = every(init)[0]
    if channels is False and any(own.channels is not None for own in every(init)):
        raise ValueError("channels: expected True beside an init with weights per channel, got False")
    parts = max(group.layers for group in schedule.groups) if schedule.level == "blocks" else 1
    own = "own" if isinstance(init, Mapping) else "shared"
    for name, expected, got, free in (
        ("target_speedup", None, target_speedup, None),
        ("level", schedule.level, level, "auto"),
        ("groups", parts, groups, 1),
        ("order", schedule.order, order, None),
        ("contexts", own, contexts, "shared"),
    ):
        if got not in (expected, free):
            raise ValueError(f"{name}: expected {expected} beside init, got {got}")
    return schedule.level, parts, schedule.order, own


def _check_start(task: PipelineTask, init: Schedules, names: Sequence[str]) -> None:
    if isinstance(init, Mapping) and set(init) != set(names):
        raise ValueError(f"init: expected schedules of contexts {tuple(names)}, got {tuple(init)}")
    first = every(init)[0]
    for schedule in every(init):
        task.check(schedule)
        if schedule.order != first.order:
            raise ValueError(f"init: expected one order for all contexts, got {first.order} and {schedule.order}")


def _told(init: Schedules) -> list[str]:
    """Other for other schedules, by context."""
    named = init.items() if isinstance(init, Mapping) else [("", init)]
    return [f"{context}{fingerprint(schedule)}" for context, schedule in named]


def _best_start(task: PipelineTask, schedules: Schedules, few: Starts, accelerator: Accelerator) -> tuple[float, int]:
    """The carry and the order of forecast that are best unlearned, where what `schedules` do is computed."""
    carries = CARRIES if task.carry and task.layout.level == "blocks" else (0.0,)

    def error(start: tuple[float, int]) -> float:
        task.start = start
        return mean(few.judge(task.unlearned(schedules), accelerator))

    return min(itertools.product(carries, range(every(schedules)[0].order + 1)), key=error)


def _arguments(pipeline: Any) -> Any:
    return inspect.signature(type(pipeline).__call__).parameters
