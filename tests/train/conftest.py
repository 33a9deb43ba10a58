"""Tiny tasks, and the training's run written out once more in plain loops: what train/ is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

from bench.models.pipelines import PixelDiTPipeline
from harmonica_rt.generating import Generation
from harmonica_rt.train import denoiser as denoiser_module
from harmonica_rt.train.denoiser import compute
from harmonica_rt.train.pipeline_task import PipelineTask
from harmonica_rt.train.router import Router
from harmonica_rt.train.sampled import Sampled
from harmonica_rt.train.task import Batch, Task, Trajectory, prompts

from ..conftest import make_dit, make_pixart

STEPS, LAYERS, ENTRIES = 6, 3, 6


def ddim() -> DDIMScheduler:
    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)


def make_task(steps: int = STEPS, guidance: float = 1.5, double: bool = False, **config: object) -> Task:
    checkpointing = config.pop("checkpointing", False)
    model = make_dit(**config)
    return Task(model.double() if double else model, ddim(), steps, guidance, checkpointing=checkpointing)


def make_pipeline_task(
    level: str = "branches", steps: int = STEPS, guidance: float = 1.5, size: int = 4, **config: object
) -> PipelineTask:
    """What is learned on a pipeline around a small DiT, whose latents are pixels; it starts from order 1's forecast."""
    pipeline = PixelDiTPipeline(make_dit(**config).requires_grad_(False), ddim())
    generation = Generation(pipeline, num_inference_steps=steps, guidance_scale=guidance)
    task = PipelineTask(Sampled(pipeline), generation, level, size=size)
    task.start = (0.0, 1)
    return task


def make_text_task(steps: int = STEPS, guidance: float = 4.5, double: bool = False, **config: object) -> Task:
    model = make_pixart(**config)
    model = model.double() if double else model
    features = torch.randn(6, 4, 10, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(4) <= torch.arange(6)[:, None]).long()
    return Task(model, ddim(), steps, guidance, prompts(model, features, mask))


def make_router(
    logits: object = None, steps: int = STEPS, seed: int = 3, spread: float = 2.0, branches: int = 2
) -> Router:
    """Logits as given, or N(0, spread): some below the threshold of 0.1, some above."""
    router = Router(steps, LAYERS, branches, seed)
    if logits is None:
        logits = spread * torch.randn(steps, LAYERS * branches, generator=torch.Generator().manual_seed(seed))
    logits = torch.as_tensor(logits, dtype=torch.float32).reshape(steps, LAYERS, branches).clone()
    logits[0] = 5.0
    router.load(logits)
    return router


@torch.no_grad()
def full_run(task: Task, batch: Batch) -> Tensor:
    """The sampler's result without reuse."""
    run = Trajectory(task, batch)
    while not run.done:
        run.advance(run.denoise(compute))
    return run.x


@dataclass
class Explicit:
    """What a plain loop found: per step after the first, x before, outputs, error, and the cache after."""

    x: list[Tensor] = field(default_factory=list)
    students: list[Tensor] = field(default_factory=list)
    errors: dict[int, Tensor] = field(default_factory=dict)
    caches: list[list[Tensor]] = field(default_factory=list)
    end: Tensor | None = None


@torch.no_grad()
def explicit_run(
    task: Task,
    router: Router,
    batch: Batch,
    tau: float = 0.1,
    computed: Collection[int] = (),
    advance: str = "student",
    cached: str = "mixed",
    teachers: bool = True,
) -> Explicit:
    """SDT's trajectory by METHOD.md with order 0; every step in `computed` computes everything."""
    found = Explicit()
    scheduler = copy.deepcopy(task.scheduler)
    labels = tuple(torch.cat([c, u]) for c, u in zip(batch.conditional, batch.unconditional))
    rows = task.denoiser.modulation(scheduler.timesteps, labels, batch.noise.dtype)
    x, cache = batch.noise, [None] * task.denoiser.entries

    def guided(stand_in: Callable) -> Tensor:
        on, off = task.denoiser(torch.cat([x, x]), rows[step], stand_in)[:, : x.shape[1]].chunk(2)
        return off + task.guidance_scale * (on - off)

    for step, t in enumerate(scheduler.timesteps):
        r = torch.sigmoid(router.logits[step].double()).to(x.dtype)
        r = torch.ones_like(r) if step == 0 or step in computed else r

        def student(entry: int, evaluate: Callable, r: Tensor = r) -> Tensor:
            f = evaluate()
            o = f if cache[entry] is None else r[entry] * f + (1 - r[entry]) * cache[entry]
            if r[entry] > tau or cached == "always":
                cache[entry] = f if cached == "fresh" else o
            return o

        found.x.append(x)
        output = guided(student)
        if teachers:
            teacher = guided(compute)
            found.errors[step] = (output - teacher).square().mean()
        found.students.append(output)
        found.caches.append(list(cache))
        x = scheduler.step(teacher if advance == "teacher" else output, t, x).prev_sample
    found.end = x
    return found


def sample(model: torch.nn.Module, task: Task, batch: Batch) -> Tensor:
    """The same sampler around a model's own forward."""
    scheduler, x = copy.deepcopy(task.scheduler), batch.noise
    labels = torch.cat([*batch.conditional, *batch.unconditional]) if task.guided else batch.conditional[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            sample = torch.cat([x, x]) if task.guided else x
            output = model(sample, timestep=t.expand(len(sample)), class_labels=labels).sample[:, : x.shape[1]]
            if task.guided:
                on, off = output.chunk(2)
                output = off + task.guidance_scale * (on - off)
            x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One element for each branch the denoiser really evaluates."""
    counted: list[int] = []
    branch = denoiser_module._branch

    def count(*args: object) -> Tensor:
        counted.append(1)
        return branch(*args)

    monkeypatch.setattr(denoiser_module, "_branch", count)
    return counted


def bools(*rows: str) -> np.ndarray:
    return np.array([[c == "1" for c in row] for row in rows])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_dit().save_pretrained(folder)
    ddim().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unet")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    UNet2DModel(sample_size=8, norm_num_groups=1, layers_per_block=1, **blocks).save_pretrained(folder)
    return folder
