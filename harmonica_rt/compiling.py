"""`compile()` and `uncompile()`: models, and the denoisers of pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from torch import nn

from .backends import OPS
from .compiled import CompiledTransformer, put
from .models import own_model
from .sampling import Sampling
from .schedule import Schedule

DENOISERS = ("transformer", "transformer_2", "unet")  # of a pipeline, whichever it has


def compile(
    model_or_pipeline: Any,
    schedule: Schedule | Mapping[str, Any],
    *,
    backend: str = "auto",
    plans: int = 4,
    strict: bool = False,
) -> Any:
    """Lower `schedule` onto a denoiser.

    Args:
        model_or_pipeline: a denoiser in eval mode, or a DiffusionPipeline with one as `transformer` or `unet`; a second
            one, `transformer_2`, goes on with the same run where the pipeline switches.
        schedule: for a model of this class. Or a schedule each: for the contexts that a pipeline names within a step,
            ``{"cond": a, "uncond": b}``, or for its denoisers, ``{"transformer": a, "transformer_2": b}``.
        backend: ``"eager"`` (plain torch ops), ``"inductor"`` (TorchInductor: at level branches pointwise work, else
            the model's own blocks, one compile for all that are alike and another for batches of 1),
            ``"cudagraph"`` (Triton kernels, one CUDA graph for each distinct step) or ``"auto"``: cudagraph on CUDA,
            where it keeps plain launches if they measure faster, inductor elsewhere at level branches, and eager at the
            other levels or if the first choice cannot be had; `report()` then says why.
        plans: how many (batch, resolution, prompt length, dtype, start) are kept ready of each context; the least
            recently used goes first.
        strict: refuse a pipeline's sampler that the schedule was not made for; a warning names both otherwise.

    Returns:
        A `CompiledTransformer` for a model; the same pipeline, its denoisers replaced, for a pipeline. `uncompile`
        takes it back. The pipeline's scheduler tells when a run starts and what its timesteps are.

    Raises:
        TypeError, ValueError: naming what was expected and what came; nothing is changed then.

    Example::

        pipe = hrt.compile(pipe, hrt.Schedule.load("mine.json"))
        schedule = hrt.Schedule.uniform(model, steps=20, timesteps=scheduler.timesteps)
        model = hrt.compile(model, schedule, backend="eager")
    """
    if backend not in ("auto", *OPS):
        raise ValueError(f"backend: expected one of {('auto', *OPS)}, got {backend!r}")
    if isinstance(plans, bool) or not isinstance(plans, int) or plans < 1:
        raise ValueError(f"plans: expected a positive integer, got {plans!r}")
    if not isinstance(strict, bool):
        raise TypeError(f"strict: expected True or False, got {strict!r}")
    options: dict[str, Any] = {"backend": backend, "plans": plans, "strict": strict}
    return put_in(
        model_or_pipeline, schedule, strict, lambda model, own, more: CompiledTransformer(model, own, **options, **more)
    )


def put_in(
    model_or_pipeline: Any, schedule: Any, strict: bool, make: Callable[[nn.Module, Any, dict[str, Any]], Any]
) -> Any:
    """`compile`, with compiled models as `make`(model, schedules, keyword arguments) gives them."""
    if not (denoisers := denoisers_of(model_or_pipeline)):
        if not isinstance(model_or_pipeline, nn.Module):
            raise TypeError(
                f"expected a torch.nn.Module, or a pipeline with a scheduler and one as {', '.join(DENOISERS[:-1])} or "
                f"{DENOISERS[-1]}, got {type(model_or_pipeline).__name__}"
            )
        _check_schedules(schedule)
        return make(own_model(model_or_pipeline), schedule, {})
    by_denoiser = _by_denoiser(schedule, denoisers)
    every = [each for schedules in by_denoiser.values() for each in _check_schedules(schedules)]
    if len(steps := {each.steps for each in every}) > 1:
        raise ValueError(f"schedule: expected as many steps in all, got {sorted(steps)}")
    sampling = Sampling(every, strict, model_or_pipeline)
    made = {
        name: make(own_model(denoisers[name]), schedules, {"sampling": sampling})
        for name, schedules in by_denoiser.items()
    }
    for name, compiled in made.items():
        if is_compiled(current := denoisers[name]):
            current.leave(model_or_pipeline, compiled)
        put(model_or_pipeline, name, compiled)
    sampling.scheduler()  # the pipeline may be gone before its first run, and another carry on
    return model_or_pipeline


def uncompile(model_or_pipeline: Any) -> Any:
    """The model as it was, or the same pipeline with its own denoisers back; other pipelines keep theirs.

    What was never compiled is given back as it is. Plans and graphs are freed.
    """
    if denoisers := denoisers_of(model_or_pipeline):
        for name, current in denoisers.items():
            if is_compiled(current):
                current.leave(model_or_pipeline, current.model)
                put(model_or_pipeline, name, current.model)
        return model_or_pipeline
    return model_or_pipeline.uncompile() if is_compiled(model_or_pipeline) else model_or_pipeline


def is_compiled(candidate: Any) -> TypeGuard[CompiledTransformer]:
    return issubclass(type(candidate), CompiledTransformer)


def denoisers_of(candidate: Any) -> dict[str, nn.Module]:
    """Those of a pipeline, by name; empty for a model."""
    if isinstance(candidate, nn.Module) or not hasattr(candidate, "scheduler"):
        return {}
    found = {name: getattr(candidate, name, None) for name in DENOISERS}
    return {name: denoiser for name, denoiser in found.items() if isinstance(denoiser, nn.Module)}


def _by_denoiser(schedule: Any, denoisers: Mapping[str, nn.Module]) -> dict[str, Any]:
    if isinstance(schedule, Mapping) and schedule.keys() & set(DENOISERS):
        if schedule.keys() != denoisers.keys():
            raise ValueError(f"schedule: expected one for each of {tuple(denoisers)}, got {tuple(schedule)}")
        return dict(schedule)
    return dict.fromkeys(denoisers, schedule)


def _check_schedules(schedule: Any) -> list[Schedule]:
    """All schedules of one denoiser: one, or one a context."""
    schedules = [*schedule.values()] if isinstance(schedule, Mapping) else [schedule]
    if not schedules:
        raise ValueError("schedule: expected at least one context, got an empty mapping")
    for name in schedule if isinstance(schedule, Mapping) else ():
        if not isinstance(name, str):
            raise TypeError(f"schedule: expected names of contexts, got {name!r}")
    for each in schedules:
        if not isinstance(each, Schedule):
            raise TypeError(
                f"schedule: expected a harmonica_rt.Schedule, got {type(each).__name__} (Schedule.load reads a file)"
            )
        for what in ("steps", "level"):
            if getattr(each, what) != getattr(schedules[0], what):
                got = f"{getattr(schedules[0], what)} and {getattr(each, what)}"
                raise ValueError(f"schedule: expected the same {what} in all contexts, got {got}")
    return schedules
