"""Schedulers by the name of a sampler and of how its timesteps are spaced.

Samplers of noise prediction are `harmonica_rt.train.models.SAMPLERS`'; of flow matching there are Euler's and two of a
higher order. A flow's spacing is the shift of its noise levels, s -> shift * s / (1 + (shift - 1) * s), 1 unless told.
(Karras's levels, made for noise that has no end, spoil all three: NaN, or 6 dB worse than the others; and FluxPipeline
refuses SA-Solver.)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers

import harmonica_rt as hrt
from harmonica_rt.train import models

SPACINGS = ("leading", "trailing", "linspace", "karras")
FLOW_SPACINGS = ("shift 1", "shift 0.6", "shift 1.7", "shift 3")
OWN_SIGMAS = "own sigmas"  # of a schedule whose times are learned: flow-euler's call is given them
DEFAULTS = {"ddim": "leading"}  # of diffusers; linspace for the others
LEVELS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
FLOW = {
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-unipc": ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    "flow-dpmsolver++": (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ),
}
NOISE = ("ddim", "dpmsolver++", "unipc", "sa-solver", "euler")


def default(sampler: str) -> str:
    """The spacing that diffusers gives a sampler unless told."""
    return "shift 1" if sampler in FLOW else DEFAULTS.get(sampler, "linspace")


def spacings(sampler: str) -> tuple[str, ...]:
    """Those that a sampler can have, its default first."""
    if sampler in FLOW:
        return FLOW_SPACINGS
    own = inspect.signature(_kind(sampler).__init__).parameters
    some = [spacing for spacing in SPACINGS if spacing != "karras" or "use_karras_sigmas" in own]
    return tuple(sorted(some, key=lambda spacing: spacing != default(sampler)))


def of_same_kind(sampler: str) -> tuple[str, ...]:
    """All samplers that a model sampled by `sampler` can have."""
    return tuple(FLOW) if sampler in FLOW else NOISE


def _kind(sampler: str) -> Any:
    known = {**models.SAMPLERS, **FLOW}
    if sampler not in known:
        raise ValueError(f"sampler: expected one of {', '.join(known)}, got {sampler!r}")
    return getattr(diffusers, known[sampler][0])


def scheduler(sampler: str, spacing: str, config: Mapping[str, Any]) -> Any:
    """A scheduler with the noise levels of `config`, its timesteps spaced so.

    Raises:
        ValueError: there is no such sampler, or it cannot have that spacing.
    """
    kind = _kind(sampler)
    if (sampler, spacing) == ("flow-euler", OWN_SIGMAS):
        spacing = default(sampler)
    if spacing not in (known := spacings(sampler)):
        raise ValueError(f"spacing: expected one of {', '.join(known)} for {sampler}, got {spacing!r}")
    if sampler in FLOW:
        return _flow(kind, FLOW[sampler][1], spacing)
    kept = {name: config[name] for name in LEVELS if name in config}
    own = models.scheduler(sampler, kept)
    spaced = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    return kind.from_config(own.config, **spaced)


def _flow(kind: Any, options: dict[str, Any], spacing: str) -> Any:
    shift = float(spacing.split()[1])
    if not options:  # Euler's
        return kind(shift=shift)
    own = kind(**options, flow_shift=shift)
    if kind is diffusers.DPMSolverMultistepScheduler:
        # FluxPipeline tells schedulers the logarithm of a shift, interpolated between two numbers of their config; this
        # one takes it if it is dynamic alone, and raises otherwise
        own.register_to_config(use_dynamic_shifting=True, time_shift_type="exponential")
        own.register_to_config(base_shift=math.log(shift), max_shift=math.log(shift))
    return own


def of_schedule(schedule: hrt.Schedule, config: Mapping[str, Any], own: str, timesteps: Any) -> tuple[str, str]:
    """The sampler and the spacing that a schedule was made for.

    Args:
        config: of the model's own scheduler; `own` is that sampler's name.
        timesteps: (scheduler, steps) -> those of a pipeline with that scheduler.

    Raises:
        ValueError: no spacing has its timesteps.
    """
    names = [name for name in of_same_kind(own) if schedule.sampler in (None, _kind(name).__name__)]
    names.sort(key=lambda name: name != own)
    if schedule.timesteps is None and names:
        return names[0], default(names[0])
    for name in names:
        for spacing in spacings(name):
            found = timesteps(scheduler(name, spacing, config), schedule.steps)
            if len(found) == schedule.steps and all(
                math.isclose(a, b, abs_tol=1e-3) for a, b in zip(found, schedule.timesteps)
            ):
                return name, spacing
    if own == "flow-euler" and schedule.sampler == _kind(own).__name__:
        return own, OWN_SIGMAS
    raise ValueError(
        f"schedule: expected the timesteps of one of {', '.join(of_same_kind(own))} in {schedule.steps} steps, got "
        f"{schedule.timesteps} for {schedule.sampler}"
    )
