"""Pipelines: one line makes them fast, their scheduler tells where a run is, and they can be had back."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

import harmonica_rt as hrt
from bench.by_hand.module_reuse import ModuleReuse
from bench.models.pipelines import PixelDiTPipeline

from .conftest import assert_close, make_dit, random_schedule, relative_error


def make_pipeline(model: torch.nn.Module | None = None) -> PixelDiTPipeline:
    pipeline = PixelDiTPipeline(model or make_dit(in_channels=2, out_channels=2), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: PixelDiTPipeline, steps: int = 6, guidance: float = 1.5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipeline([0, 3], guidance, generator, num_inference_steps=steps, output_type="latent").images


def test_a_schedulers_timesteps_are_read_at_once() -> None:
    """On a GPU, where PixArt's pipeline has them, the host waits at each read."""
    pipeline = hrt.compile(make_pipeline(), random_schedule(3), backend="eager")
    pipeline.scheduler.set_timesteps(6)

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    with Reads() as reads:
        pipeline.transformer._sampling.watch()
    assert pipeline.transformer._sampling.tracker.timesteps == tuple(map(float, pipeline.scheduler.timesteps.tolist()))
    assert reads.count == 0


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler]
)
def test_a_pipeline_equals_module_level_reuse(scheduler: type, guidance: float) -> None:
    pipeline = make_pipeline()
    pipeline.scheduler = scheduler()
    pipeline.scheduler.set_timesteps(6)
    calls = len(pipeline.scheduler.timesteps)  # Heun calls the denoiser twice a step
    schedule = random_schedule(3, steps=calls)
    model = pipeline.transformer
    oracle = ModuleReuse(model, schedule)
    object.__setattr__(pipeline, "transformer", oracle)
    wanted = sample(pipeline, guidance=guidance)
    oracle.remove()
    object.__setattr__(pipeline, "transformer", model)
    assert hrt.compile(pipeline, schedule, backend="eager") is pipeline
    for _ in range(2):
        assert relative_error(sample(pipeline, guidance=guidance), wanted) < 1e-4
    report = pipeline.transformer.report().plans[0]
    assert report.computed == schedule.compute.sum()


def test_modulation_is_computed_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = hrt.compile(make_pipeline(), random_schedule(3), backend="eager")
    sample(pipeline)
    filled = []
    plan = next(iter(pipeline.transformer._plans.values()))
    modulate = plan.adapter.modulate
    monkeypatch.setattr(plan.adapter, "modulate", lambda t, c, out: filled.append(len(t)) or modulate(t, c, out))
    sample(pipeline)
    sample(pipeline)
    assert filled == [6, 6]


def test_modulation_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows for many steps are computed in parts, and come out the same."""
    pipeline = make_pipeline()
    hrt.compile(pipeline, random_schedule(3), backend="eager")
    wanted = sample(pipeline)
    row_bytes = 4 * pipeline.transformer.report().plans[0].modulation_bytes // (4 * 6)
    monkeypatch.setattr("harmonica_rt.buffers.MODULATION_BYTES", 4 * row_bytes + 1)
    hrt.compile(pipeline, random_schedule(3), backend="eager")
    assert relative_error(sample(pipeline), wanted) < 1e-5
    assert pipeline.transformer.report().plans[0].modulation_bytes == 4 * row_bytes


def test_diffusers_own_dit_pipeline() -> None:
    vae = AutoencoderKL(in_channels=3, out_channels=3, block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    model = make_dit(in_channels=2, out_channels=4, num_embeds_ada_norm=1000)
    pipeline = DiTPipeline(model, vae.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images() -> np.ndarray:
        generator = torch.Generator().manual_seed(1)
        return pipeline([1, 2], generator=generator, num_inference_steps=4, output_type="np").images

    wanted = images()
    hrt.compile(pipeline, hrt.Schedule.full(model, 4), backend="eager")
    np.testing.assert_allclose(images(), wanted, atol=1e-4)
    hrt.uncompile(pipeline)
    assert pipeline.transformer is model


def test_a_pipeline_interrupted_starts_over() -> None:
    pipeline = hrt.compile(make_pipeline(), random_schedule(3), backend="eager")
    wanted = sample(pipeline)
    model_step, calls = pipeline.scheduler.step, []

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model_step(*args, **kwargs)

    pipeline.scheduler.step = failing
    with pytest.raises(KeyboardInterrupt):
        sample(pipeline, seed=5)
    pipeline.scheduler.step = model_step
    assert torch.equal(sample(pipeline), wanted)


def test_a_run_entering_midway_follows_the_schedulers_timesteps() -> None:
    """What image-to-image pipelines do: all timesteps set, the first ones left out."""
    pipeline = make_pipeline()
    model, schedule = pipeline.transformer, random_schedule(4)
    hrt.compile(pipeline, schedule, backend="eager")
    oracle = ModuleReuse(model, schedule.starting_at(2))
    pipeline.scheduler.set_timesteps(6)
    x, labels = torch.randn(2, 2, 8, 8), torch.tensor([1, 2])
    for t in pipeline.scheduler.timesteps[2:]:
        with torch.no_grad():
            wanted = oracle(x, timestep=t.expand(2), class_labels=labels).sample
        pairs = [(block, name, getattr(block, name)) for block, name in oracle.wrapped]
        for block, name, cached in pairs:  # the compiled model sees the plain modules
            setattr(block, name, cached.module)
        assert relative_error(pipeline.transformer(x, timestep=t.expand(2), class_labels=labels).sample, wanted) < 1e-4
        for block, name, cached in pairs:
            setattr(block, name, cached)
    oracle.remove()


def test_a_run_entering_midway_where_timesteps_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler then tells the step; twice, since it forgets its count when it gets new timesteps."""
    pipeline = make_pipeline()
    pipeline.scheduler = scheduler = DPMSolverMultistepScheduler()
    hrt.compile(pipeline, random_schedule(4), backend="eager")
    noise, labels = torch.randn(2, 2, 8, 8), torch.tensor([1, 2])

    def enter(step: int) -> torch.Tensor:
        x = noise
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(step)
        for t in scheduler.timesteps[step:]:
            output = pipeline.transformer(x, timestep=t.expand(2), class_labels=labels).sample
            x = scheduler.step(output[:, :2], t, x).prev_sample
        return x

    wanted = [enter(step) for step in (2, 0, 4)]
    monkeypatch.setattr("harmonica_rt.compiled.read_timestep", lambda timestep: None)
    for step, expected in zip((2, 0, 4), wanted):
        assert relative_error(enter(step), expected) < 1e-5


def test_another_scheduler_is_noticed() -> None:
    pipeline = make_pipeline()
    hrt.compile(pipeline, hrt.Schedule.full(pipeline.transformer, 6), backend="eager")
    sample(pipeline)
    pipeline.scheduler = DPMSolverMultistepScheduler()
    fast = sample(pipeline)
    hrt.uncompile(pipeline)
    assert relative_error(fast, sample(pipeline)) < 1e-4


def test_a_schedule_for_other_steps_names_both() -> None:
    pipeline = make_pipeline()
    hrt.compile(pipeline, hrt.Schedule.full(pipeline.transformer, 6), backend="eager")
    with pytest.raises(ValueError, match=r"the schedule has 6 steps, but DDIMScheduler has 5 timesteps"):
        sample(pipeline, steps=5)
    x, labels = torch.randn(2, 2, 8, 8), torch.tensor([1, 2])
    for _ in range(2):  # also when the same timesteps come again
        with pytest.raises(ValueError, match="6 steps, but DDIMScheduler has 5"):
            pipeline.transformer(x, timestep=pipeline.scheduler.timesteps[0].expand(2), class_labels=labels)
    assert sample(pipeline, steps=6).isfinite().all()


def test_a_schedule_for_other_timesteps_names_both() -> None:
    pipeline = make_pipeline()
    schedule = hrt.Schedule.full(pipeline.transformer, 4, timesteps=[750, 500, 249, 0])
    hrt.compile(pipeline, schedule, backend="eager")
    with pytest.raises(ValueError, match=r"at step 2 the schedule has 249, DDIMScheduler has 250"):
        sample(pipeline, steps=4)


def test_a_schedule_for_another_sampler_warns_once() -> None:
    pipeline = make_pipeline()
    hrt.compile(pipeline, hrt.Schedule.full(pipeline.transformer, 4, sampler="UniPC"), backend="eager")
    with pytest.warns(UserWarning, match="made for UniPC, the pipeline samples with DDIMScheduler"):
        sample(pipeline, steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(pipeline, steps=4)


def test_compiling_again_replaces_the_schedule_and_uncompile_restores() -> None:
    pipeline = make_pipeline()
    model, wanted = pipeline.transformer, sample(pipeline)
    config = dict(pipeline.config)
    hrt.compile(pipeline, random_schedule(1), backend="eager")
    hrt.compile(pipeline, hrt.Schedule.full(model, 6), backend="eager")
    assert pipeline.transformer.model is model
    assert relative_error(sample(pipeline), wanted) < 1e-5
    assert dict(pipeline.config) == config
    pipeline.transformer.uncompile()
    assert pipeline.transformer is model
    assert torch.equal(sample(pipeline), wanted)


def test_a_pipeline_reassigned_and_rebuilt_still_saves(tmp_path: object) -> None:
    pipeline = hrt.compile(make_pipeline(), random_schedule(1), backend="eager")
    pipeline.transformer = pipeline.transformer
    rebuilt = type(pipeline)(**pipeline.components)
    for p in (pipeline, rebuilt):
        p.save_pretrained(tmp_path)
        assert p.config["transformer"] == ("diffusers", "DiTTransformer2DModel")
        loaded = DiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
        assert torch.equal(loaded.proj_out_2.weight, pipeline.transformer.proj_out_2.weight)


def test_uncompiling_the_transformer_gives_the_pipeline_its_own_back() -> None:
    pipeline = make_pipeline()
    model = pipeline.transformer
    hrt.compile(pipeline, random_schedule(1), backend="eager")
    assert hrt.uncompile(pipeline.transformer) is model
    assert pipeline.transformer is model


def test_labels_made_anew_at_each_call_fill_rows_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where labels cannot be read (here: the device is pretended), steps ahead are not filled again and again."""
    pipeline = hrt.compile(make_pipeline(), hrt.Schedule.full(make_dit(), 6), backend="eager")
    sample(pipeline)
    plan = next(iter(pipeline.transformer._plans.values()))
    filled, modulate = [], plan.adapter.modulate
    monkeypatch.setattr(plan.adapter, "modulate", lambda t, c, out: filled.append(len(t)) or modulate(t, c, out))
    monkeypatch.setattr("harmonica_rt.compiled.read_timestep", lambda timestep: None)
    pipeline.scheduler.set_timesteps(6)
    for t in pipeline.scheduler.timesteps:
        pipeline.transformer(torch.randn(2, 2, 8, 8), t.expand(2), torch.tensor([0, 1]))
    assert filled == [6, 1, 1, 1, 1, 1]


def test_labels_that_change_within_a_run_are_followed_where_they_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of the steps ahead were filled for the labels before."""
    pipeline = hrt.compile(make_pipeline(), random_schedule(3), backend="eager")
    x, labels = torch.randn(6, 2, 2, 8, 8), [torch.tensor([0, 1])] * 2 + [torch.tensor([2, 3])] * 4

    def run() -> list[torch.Tensor]:
        pipeline.scheduler.set_timesteps(6)
        steps = zip(x, pipeline.scheduler.timesteps, labels)
        return [pipeline.transformer(s, timestep=t.expand(2), class_labels=c).sample for s, t, c in steps]

    wanted = run()
    monkeypatch.setattr("harmonica_rt.compiled.read_timestep", lambda timestep: None)
    assert_close(run(), wanted, 1e-5)


def test_a_copied_pipeline_runs_on_its_own() -> None:
    pipeline = hrt.compile(make_pipeline(), random_schedule(1), backend="eager")
    twin = copy.deepcopy(pipeline)
    assert torch.equal(sample(pipeline), sample(twin))
    assert twin.transformer.model is not pipeline.transformer.model
    hrt.uncompile(twin)
    assert type(twin.transformer) is DiTTransformer2DModel
    assert isinstance(pipeline.transformer, hrt.CompiledTransformer)


def test_a_refused_compile_leaves_the_pipeline_alone() -> None:
    pipeline = make_pipeline()
    model = pipeline.transformer
    with pytest.raises(ValueError, match="layers expected 3, got 5"):
        hrt.compile(pipeline, random_schedule(1, layers=5))
    assert pipeline.transformer is model


def test_a_compiled_pipeline_saves_as_if_never_compiled(tmp_path: object) -> None:
    pipeline = make_pipeline()
    wanted = sample(pipeline)
    hrt.compile(pipeline, random_schedule(1), backend="eager")
    sample(pipeline)
    pipeline.save_pretrained(tmp_path)
    model = DiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    scheduler = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    loaded = PixelDiTPipeline(model, scheduler)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded), wanted)
