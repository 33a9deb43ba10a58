"""Runs of a frontier's candidates, and what their images are compared with.

What a row's PSNR is taken to: the same sampler's run of as many steps without reuse, where there is reuse and these
steps are no fewer than the reference's; else the reference run, so that nobody gains by reusing in a run that is short.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

import harmonica_rt as hrt
from bench.models import samplers
from bench.models.reference import TRAINED
from bench.models.sampling import Sampling, accelerated
from bench.peers import PEERS
from harmonica_rt.measuring import psnr
from harmonica_rt.models import layout_of
from harmonica_rt.train.contexts import every

from . import candidates
from .candidates import FULL, OURS, WHOLE, Candidate

BATCH = 16  # of what is measured, but not timed


@dataclass(frozen=True)
class Job:
    """What a results file is about; rows of another job do not go into it.

    Attributes:
        steps: of the reference run.
        count, screen: noises measured and screened on.
        batch, rounds: of the timings: images a call, interleaved with the reference run.
    """

    model: str
    steps: int = 20
    count: int = 64
    screen: int = 8
    batch: int = 4
    rounds: int = 5
    threads: int = 1

    def __post_init__(self) -> None:
        if self.model not in TRAINED:
            raise ValueError(f"--model: expected one of {', '.join(TRAINED)}, got {self.model!r}")


class Runner:
    """Runs of candidates on one model; runs without reuse are kept.

    Args:
        start: noises.
        batch: images a call where time does not matter.
    """

    def __init__(self, job: Job, start: Tensor, batch: int = BATCH, sampling: Sampling | None = None) -> None:
        self.job, self.start, self.batch = job, start, batch
        self.sampling = Sampling.of(job.model) if sampling is None else sampling
        self.pipeline, self._plain = self.sampling.pipeline, {}
        self.reference = candidates.own(job.model, job.steps)

    @cached_property
    def converged(self) -> Tensor:
        return self.sampling.converged(self.start)

    @cached_property
    def whole(self) -> torch.nn.Module:
        """The model under torch.compile."""
        return torch.compile(self.pipeline.transformer)

    def wanted(self, candidate: Candidate) -> Tensor:
        """What a candidate's images should be."""
        own = candidate.reuses and candidate.steps >= self.job.steps
        return self.plain(candidate.plain if own else self.reference)

    def plain(self, candidate: Candidate) -> Tensor:
        """Images of a sampler without reuse."""
        if candidate not in self._plain:
            self._plain[candidate] = self.images(candidate, self.start)
        return self._plain[candidate]

    def images(self, candidate: Candidate, start: Tensor) -> Tensor:
        """Images of a candidate; one that reuses nothing is run on the engine where that is exact and faster."""
        if not candidate.reuses:
            exact = layout_of(self.pipeline.transformer, "auto", 1).level == "branches"
            candidate = replace(candidate, by=OURS, setting=FULL) if exact else candidate.plain
        with self.prepared(candidate) as own:
            return self.sample(own, start, candidate.steps)

    def sample(self, own: Sampling, start: Tensor, steps: int) -> Tensor:
        """The same images each time, of samplers that draw noise too."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return own(start, own.pipeline.steps or steps, self.batch)

    @contextmanager
    def prepared(self, candidate: Candidate, backend: str = "auto") -> Iterator[Sampling]:
        """A sampling that runs the candidate."""
        model = self.pipeline.transformer
        peer = PEERS.get(candidate.by)
        own = self.pipeline.around(copy.deepcopy(model) if peer else model)
        own.scheduler = samplers.scheduler(candidate.sampler, candidate.spacing, self.pipeline.scheduler.config)
        sampling = Sampling(own, self.sampling.guidance, self.sampling.classes)
        if candidate.by == OURS:
            schedule = candidate.schedule(own)
            if candidate.spacing == samplers.OWN_SIGMAS:
                own.sigmas = [t / own.scheduler.config.num_train_timesteps for t in every(schedule)[0].timesteps]
            # At level output nothing within the model is touched
            if backend == "inductor" and all(each.level == "output" for each in every(schedule)):
                object.__setattr__(own, "transformer", self.whole)
                backend = "eager"
            with accelerated(own, schedule, backend=backend):
                yield sampling
            return
        if candidate.by == WHOLE:
            object.__setattr__(own, "transformer", self.whole)
        elif peer is not None:
            own = peer.prepare(own, candidate.setting, candidate.steps)
            if peer.compile is not None:
                torch._dynamo.reset()  # or peers share one recompile limit
                self.__dict__.pop("whole", None)
                peer.compile(own)
            sampling = replace(sampling, pipeline=own)
        yield sampling

    def same_calls(self, a: Candidate, b: Candidate) -> bool:
        """Whether runs of two learned schedules take the same time: as many steps compute and reuse the same."""
        if not (a.learned and b.learned and b.file.is_file() and (a.sampler, a.steps) == (b.sampler, b.steps)):
            return False
        first, second = (_calls(each.schedule(self.pipeline)) for each in (a, b))
        return first == second

    def quality(self, candidate: Candidate, images: Tensor) -> dict[str, float]:
        """PSNR columns with their spreads: standard deviations over resamples of the noises."""
        if not torch.isfinite(images).all():
            raise FloatingPointError("the images are not finite")
        row = {}
        for name, wanted in (("psnr", self.wanted(candidate)), ("converged", self.converged)):
            values = psnr(images, wanted)
            draws = values[torch.randint(len(values), (200, len(values)), generator=torch.Generator().manual_seed(0))]
            row |= {
                name: values.mean().item(),
                f"{name}_spread": draws.mean(1).std().item(),
                f"{name}_worst": values.min().item(),
                f"{name}_worst_spread": draws.amin(1).std().item(),
            }
        return row


def _calls(schedules: hrt.Schedule | dict[str, hrt.Schedule]) -> list[tuple[object, ...]]:
    """What makes a run's time, by context; one schedule's is the same in all."""
    own = {} if isinstance(schedules, hrt.Schedule) else schedules
    return [_kinds_of_steps(own.get(context, schedules)) for context in candidates.GUIDED]


def _kinds_of_steps(schedule: hrt.Schedule) -> tuple[object, ...]:
    steps = Counter((row.tobytes(), reused) for row, reused in zip(schedule.compute, schedule.output))
    learned = schedule.channels is None, schedule.output_channels is None, schedule.carry.any()
    return schedule.level, schedule.groups, schedule.order, steps, learned


def backend(candidate: Candidate) -> str:
    """What is timed: ours at its fastest on a CPU, at level output the model under torch.compile."""
    return "inductor" if candidate.by == OURS else "auto"
