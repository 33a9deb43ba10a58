"""The solution that a sampler's run approximates: what another sampler, or many more steps, make of the same noise."""

from __future__ import annotations

import copy
from typing import Any

STEPS = 100  # of DPM-Solver++ or UniPC
FLOW_STEPS = 100  # of Euler's, 52 dB from 1000 on flux-emoji: UniPC rounds a flow's timesteps, and is no closer
FIRST_ORDER = ("DDIMScheduler", "EulerDiscreteScheduler")
HIGHER_ORDER = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler",)
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def converged(scheduler: Any) -> tuple[Any, int]:
    """A sampler that shares the solution of `scheduler`, and in how many steps it has as good as converged.

    Raises:
        ValueError: `scheduler` draws noise, so that no other sampler shares its solution, or is not known here.
    """
    from diffusers import DPMSolverMultistepScheduler

    name, config = type(scheduler).__name__, scheduler.config
    noisy = str(config.get("algorithm_type", "")).startswith("sde") or config.get("stochastic_sampling")
    if name in FLOW and not noisy:
        return copy.deepcopy(scheduler), FLOW_STEPS
    if name in HIGHER_ORDER and config.get("use_flow_sigmas"):
        return type(scheduler).from_config(scheduler.config), STEPS  # one that ran keeps outputs with gradients
    if name in FIRST_ORDER and config.get("clip_sample"):
        raise ValueError(f"target converged: expected a sampler that does not clip, got {name} with clip_sample=True")
    if name in (*FIRST_ORDER, *HIGHER_ORDER) and not noisy:
        return DPMSolverMultistepScheduler(**{key: config[key] for key in BETAS}), STEPS
    expected = ", ".join((*FIRST_ORDER, *HIGHER_ORDER, *FLOW))
    noise = f" with {config.get('algorithm_type') or 'noise'}" if noisy else ""
    raise ValueError(f"target converged: expected a deterministic sampler of {expected}, got {name}{noise}")
