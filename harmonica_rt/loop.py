"""The sampling loop around the denoiser: plainly, or as one CUDA graph."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cuda_graphs import Recorder, Replayable, capture_failed

if TYPE_CHECKING:
    from .executor import Plan

SCHEDULERS = ("DDIMScheduler", "DPMSolverMultistepScheduler")  # updates without fresh noise or hidden host reads


class LoopGraph:
    """A whole trajectory, denoiser, guidance and sampler updates, as one graph: one launch an image.

    The scheduler's own `step` is captured, so results are the step graphs'. Its host-side numbers (alphas, sigmas) are
    the same in every run and become constants of the graph.

    Attributes:
        seconds: that warming up and capturing took.
    """

    def __init__(self, plan: Plan, recorder: Recorder, scheduler: Any, guidance_scale: float, images: int) -> None:
        started = time.perf_counter()
        self.plan, self.recorder = weakref.proxy(plan), recorder  # the plan owns this
        self.scheduler, self.guidance_scale = scheduler, guidance_scale
        shape = plan.shape
        size = (images, plan.adapter.in_channels, shape.height, shape.width)
        self.noise = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self.graph: Replayable | None = None
        try:
            self._rewind()
            recorder.warm_up(self._launch)
            self._rewind()
            self.graph, self.output = recorder.capture(self._launch)
        except Exception as error:
            raise capture_failed(error, "an update between steps") from error
        self.seconds = time.perf_counter() - started

    def _rewind(self) -> None:
        self.scheduler.set_timesteps(len(self.scheduler.timesteps))

    def _launch(self) -> Tensor:
        return trajectory(self.plan.run_plainly, self.scheduler, self.noise, self.guidance_scale)

    def run(self, noise: Tensor) -> Tensor:
        """The sampler's result from `noise`, a new tensor."""
        self.plan.streams.enter()
        self.noise.copy_(noise)
        self.graph.replay()
        return self.output.clone()

    def release(self) -> None:
        """Free the graph's memory once no replay is under way."""
        if self.graph is not None:
            self.recorder.synchronize()
            self.graph.reset()
            self.graph = None


def trajectory(
    denoise: Callable[[int, Tensor], Tensor], scheduler: Any, noise: Tensor, guidance_scale: float
) -> Tensor:
    """Sample from `noise` with classifier-free guidance, conditional samples first as in diffusers' DiT pipeline.

    Args:
        denoise: (step, [batch or 2 batch, channels, height, width]) -> the model's output.
        scheduler: with its timesteps set.
    """
    x, channels = noise, noise.shape[1]
    for step, t in enumerate(scheduler.timesteps):
        output = denoise(step, torch.cat([x, x]) if guidance_scale > 1 else x)
        output = guide(output, guidance_scale, channels)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def guide(output: Tensor, scale: float, channels: int, variance: bool = False) -> Tensor:
    """Classifier-free guidance on [conditional, unconditional] outputs.

    Args:
        output: [2 batch, `channels` or more, height, width]; [batch, ...] where `scale` is at most 1: no guidance.
        variance: keep learned variances, the conditional ones (IDDPM); they are dropped otherwise, as in diffusers.
    """
    mean = output.narrow(1, 0, channels)
    if scale > 1:
        conditional, unconditional = mean.chunk(2)
        mean = unconditional + scale * (conditional - unconditional)
    return torch.cat([mean, output[: len(mean), channels:]], dim=1) if variance else mean


def learns_variance(scheduler: Any) -> bool:
    """Whether `scheduler` takes the model's own variances (IDDPM)."""
    return str(scheduler.config.get("variance_type", "")).startswith("learned")


def loop_key(scheduler: Any, guidance_scale: float) -> tuple[Any, ...]:
    """All that a captured loop has baked in: the sampler's numbers and the guidance."""
    config = repr(sorted(scheduler.config.items()))
    return type(scheduler).__name__, config, tuple(scheduler.timesteps.tolist()), float(guidance_scale)


def copied(scheduler: Any) -> Any:
    """A copy of `scheduler` at the start of its run. Raises ValueError if its updates cannot be captured."""
    name, kind = type(scheduler).__name__, str(scheduler.config.get("algorithm_type", ""))
    if name not in SCHEDULERS or kind.startswith("sde"):
        raise ValueError(
            f"trajectory: expected a deterministic scheduler of {SCHEDULERS}, "
            f"got {name}{' with ' + kind if kind.startswith('sde') else ''}"
        )
    own, steps = copy.deepcopy(scheduler), len(scheduler.timesteps)
    own.set_timesteps(steps)
    if not torch.equal(own.timesteps, scheduler.timesteps.cpu()):
        raise ValueError(f"trajectory: expected timesteps that {name}.set_timesteps({steps}) gives, got others")
    return own
