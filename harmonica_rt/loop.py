"""The sampling loop around the denoiser: plainly, or as one CUDA graph."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cuda_graphs import Recorder, Replayable, capture_failed
from .streams import Streams

LOOPS = 4  # captured trajectories a plan keeps: each is a graph of all steps, for one sampler and guidance
SCHEDULERS = ("DDIMScheduler", "DPMSolverMultistepScheduler")  # updates without fresh noise or hidden host reads


class LoopGraph:
    """A whole trajectory, denoiser, guidance and sampler updates, as one graph: one launch an image.

    The scheduler's own `step` is captured, so results are the step graphs'. Its host-side numbers (alphas, sigmas) are
    the same in every run and become constants of the graph.

    Args:
        denoise: as in `trajectory`, by launches.
        noise: the static buffer that it begins with, [images, channels, height, width].

    Attributes:
        seconds: that warming up and capturing took.
    """

    def __init__(
        self,
        denoise: Callable[[int, Tensor], Tensor],
        streams: Streams,
        recorder: Recorder,
        scheduler: Any,
        guidance_scale: float,
        noise: Tensor,
    ) -> None:
        started = time.perf_counter()
        self.streams, self.recorder, self.scheduler, self.noise = streams, recorder, scheduler, noise
        self.graph: Replayable | None = None
        launch = partial(trajectory, denoise, scheduler, noise, guidance_scale)
        try:
            self._rewind()
            recorder.warm_up(launch)
            self._rewind()
            self.graph, self.output = recorder.capture(launch)
        except Exception as error:
            raise capture_failed(error, "an update between steps") from error
        self.seconds = time.perf_counter() - started

    def _rewind(self) -> None:
        self.scheduler.set_timesteps(len(self.scheduler.timesteps))

    def run(self, noise: Tensor) -> Tensor:
        """The sampler's result from `noise`, a new tensor."""
        self.streams.enter()
        self.noise.copy_(noise)
        assert self.graph is not None, "released"
        self.graph.replay()
        return self.output.clone()

    def release(self) -> None:
        """Free the graph's memory once no replay is under way."""
        if self.graph is not None:
            self.recorder.synchronize()
            self.graph.reset()
            self.graph = None


class Loops:
    """The captured trajectories of a plan, by sampler, guidance and timesteps; the least recently used go first."""

    def __init__(self) -> None:
        self.graphs: dict[tuple[Any, ...], LoopGraph] = {}

    def get(self, key: tuple[Any, ...], make: Callable[[], LoopGraph]) -> LoopGraph:
        """The one of `key`, made if there is none. Raises CaptureFailed: the sampler's updates cannot be captured."""
        self.graphs[key] = self.graphs.pop(key) if key in self.graphs else make()
        while len(self.graphs) > LOOPS:
            self.graphs.pop(next(iter(self.graphs))).release()
        return self.graphs[key]

    def release(self) -> None:
        for loop in self.graphs.values():
            loop.release()
        self.graphs.clear()


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
