"""Every sampler by name: training's run is the pipeline's, and stochastic ones draw the same noise for all runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from bench.models.pipelines import PixelDiTPipeline
from harmonica_rt.train.denoiser import compute
from harmonica_rt.train.models import LINEAR, SAMPLERS, scheduler
from harmonica_rt.train.task import Batch, Task, Trajectory

from ..conftest import make_dit, relative_error
from .conftest import full_run

STEPS = 5
STOCHASTIC = {"ddpm", "iddpm", "sa-solver"}


def make(name: str) -> Task:
    return Task(make_dit(), scheduler(name, LINEAR), STEPS)


def pipeline_run(task: Task, batch: Batch) -> Tensor:
    pipeline = PixelDiTPipeline(task.model, copy.deepcopy(task.scheduler))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    arguments = {"generator": generators, "num_inference_steps": STEPS, "latents": batch.noise, "output_type": "latent"}
    return pipeline(batch.conditional[0].tolist(), task.guidance_scale, **arguments).images


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_is_the_pipelines(name: str) -> None:
    task = make(name)
    batch = task.draw(3, 7)
    assert relative_error(full_run(task, batch), pipeline_run(task, batch)) < 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_a_starts_own(name: str) -> None:
    """The same for teacher and student, for a run that forks, and whichever process has the start."""
    task = make(name)
    batch = task.draw(3, 7)
    whole = full_run(task, batch)
    assert torch.equal(full_run(task, batch), whole)
    assert relative_error(full_run(task, batch.part(1, 2)), whole[1:2]) < 1e-5
    run = Trajectory(task, batch)
    for _ in range(2):
        run.advance(run.denoise(compute))
    forks = [run.fork(), run.fork(), run]
    for fork in forks:
        while not fork.done:
            with torch.no_grad():
                fork.advance(fork.denoise(compute))
        assert torch.equal(fork.x, whole)
    other = Batch(batch.noise, batch.conditional, batch.unconditional, tuple(seed + 1 for seed in batch.seeds))
    assert torch.equal(full_run(task, other), whole) == (name not in STOCHASTIC)


def test_learned_variances_need_a_model_that_has_them() -> None:
    with pytest.raises(ValueError, match=r"learned_range: expected a model with 4 output channels, got 2"):
        Task(make_dit(out_channels=2), scheduler("iddpm", LINEAR), STEPS)


def test_unknown_samplers_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"sampler: expected one of ddim, ddpm, .*flow-euler, got 'heun'"):
        scheduler("heun", LINEAR)
