"""Jobs of many images of a reference model: an image depends on the job and its index alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import harmonica_rt as hrt

from .pipelines import PixelPipeline
from .reference import REFERENCES, TRAINED, load_pipeline, weights_digest
from .schedule_specs import parse_schedule

BACKENDS = ("auto", "eager", "inductor", "cudagraph")
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Job:
    """What a folder's images are: equal jobs make equal images.

    Attributes:
        weights: digest of the model's weights.
        schedule: name and digest; "none" where diffusers' own model samples.
        backend: as asked for; "diffusers" where there is no schedule.
        count: images.
        shard: images a file, a multiple of `batch`; the last file may hold fewer.
        batch: images a call; guidance doubles the samples.
        dtype: of the images in the files; they are sampled in fp32.
    """

    model: str
    weights: str
    sampler: str
    steps: int
    guidance: float
    schedule: str
    backend: str
    seed: int
    count: int
    shard: int
    batch: int
    dtype: str

    def indices(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.count))

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard)


def prepare(
    model: str,
    schedule: str | None = None,
    *,
    count: int,
    seed: int = 0,
    steps: int = 20,
    guidance: float | None = None,
    shard: int = 32,
    batch: int = 16,
    backend: str = "auto",
    dtype: str = "float32",
    device: str = "cpu",
) -> tuple[PixelPipeline, Job]:
    """The pipeline that makes a job's images, and the job.

    Args:
        model: a trained reference model.
        schedule: a file or a name as in `parse_schedule`; diffusers' own model samples unless given.
        guidance: the model's own unless given.

    Raises:
        ValueError: naming what was expected and what came.
    """
    for name, value, allowed in (
        ("model", model, TRAINED),
        ("backend", backend, BACKENDS),
        ("dtype", dtype, DTYPES),
    ):
        if value not in allowed:
            raise ValueError(f"--{name}: expected one of {', '.join(allowed)}, got {value!r}")
    for name, number, least in (("count", count, 1), ("seed", seed, 0), ("batch", batch, 1), ("shard", shard, 1)):
        if number < least:
            raise ValueError(f"--{name}: expected an integer from {least} on, got {number}")
    if shard % batch:
        raise ValueError(f"--shard: expected a multiple of --batch, {batch}, got {shard}")
    guidance = REFERENCES[model].guidance if guidance is None else guidance
    if not np.isfinite(guidance):
        raise ValueError(f"--guidance: expected a finite number, got {guidance}")
    pipeline = load_pipeline(model)
    if device != "cpu":
        pipeline.to(device)
    weights, sampler = weights_digest(pipeline.transformer), type(pipeline.scheduler).__name__
    planned = "none"
    if schedule is not None:
        plan = parse_schedule(schedule, pipeline, steps)
        _check_schedule(schedule, plan, sampler, pipeline.timesteps(steps))
        planned = f"{Path(schedule).stem if Path(schedule).is_file() else schedule}, {_schedule_digest(plan)}"
        pipeline = hrt.compile(pipeline, plan, backend=backend, plans=1, strict=True)
    made = "diffusers" if schedule is None else backend
    return pipeline, Job(
        model, weights, sampler, steps, float(guidance), planned, made, seed, count, shard, batch, dtype
    )


def _check_schedule(name: str, schedule: hrt.Schedule, sampler: str, known: list[int]) -> None:
    """What a compiled pipeline refuses at its first step, before a folder is taken."""
    if schedule.steps != len(known):
        raise ValueError(f"--steps: {name} has {schedule.steps} steps, got {len(known)}")
    if schedule.sampler not in (None, sampler):
        raise ValueError(f"--schedule: {name} was made for {schedule.sampler}, the model samples with {sampler}")
    if schedule.timesteps is not None and not np.allclose(schedule.timesteps, known):
        raise ValueError(f"--schedule: {name} was made for timesteps {schedule.timesteps}, {sampler} has {known}")


def _schedule_digest(schedule: hrt.Schedule) -> str:
    """Of what it computes and with what weights it reuses; not of its note."""
    digest = hashlib.sha256(repr((schedule.order, schedule.branches, schedule.compute.shape)).encode())
    for array in (schedule.compute, schedule.weights, schedule.output, schedule.output_weights):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def noise(seed: int, indices: range, shape: tuple[int, int, int]) -> Tensor:
    """Initial noise [len(indices), *shape]; an image's is drawn from (seed, its index) alone."""
    return torch.stack([_noise(seed, index, shape) for index in indices])


def _noise(seed: int, index: int, shape: tuple[int, int, int]) -> Tensor:
    (mixed,) = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(mixed)))


def render(pipeline: PixelPipeline, job: Job, shard: int) -> dict[str, Tensor]:
    """The tensors of a shard's file. Batches are always whole, so that one plan serves all: what is beyond is cut."""
    known, shown = pipeline.known, "labels" if pipeline.prompts is None else "prompts"
    indices, parts = job.indices(shard), []
    for first in range(indices.start, indices.stop, job.batch):
        batch = range(first, first + job.batch)
        wanted = [known[i % len(known)] for i in batch]
        start = noise(job.seed, batch, pipeline.shape).to(pipeline.transformer.device)
        call = {"num_inference_steps": job.steps, "latents": start, "output_type": "latent"}
        parts.append(pipeline(wanted, job.guidance, **call).images.cpu())
    images = torch.cat(parts)[: len(indices)].to(getattr(torch, job.dtype))
    return {"images": images, shown: torch.tensor([i % len(known) for i in indices])}
