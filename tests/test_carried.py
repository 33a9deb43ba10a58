"""A compiled transformer that several pipelines carry, and what diffusers does with a pipeline's components by type."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

import harmonica_rt as hrt

from .test_pixart_pipelines import images, make_pipeline, offload, relative_error, schedule_for

OWNS = "of the PixArtSigmaPipeline that this transformer was compiled for.* call harmonica_rt.compile"


def compiled() -> DiffusionPipeline:
    return hrt.compile(make_pipeline(PixArtSigmaPipeline), schedule_for(), backend="eager")


@pytest.fixture(scope="module")
def wanted() -> torch.Tensor:
    return images(compiled())


def from_pipe(pipeline: DiffusionPipeline, kind: type = PixArtAlphaPipeline, **more: object) -> DiffusionPipeline:
    made = kind.from_pipe(pipeline, **more)
    made.set_progress_bar_config(disable=True)
    return made


CARRIES = {
    "from_pipe": from_pipe,
    "its own class": lambda p: from_pipe(p, PixArtSigmaPipeline),
    "AutoPipeline": lambda p: from_pipe(p, AutoPipelineForText2Image),
    "components": lambda p: PixArtAlphaPipeline(**p.components),
}
carries = pytest.mark.parametrize("carry", CARRIES.values(), ids=CARRIES)


@carries
def test_another_pipeline_carries_it(carry: Callable, wanted: torch.Tensor, tmp_path: Path) -> None:
    first = compiled()
    second = carry(first)
    assert second.transformer is first.transformer
    for pipeline in (second, first, second):
        assert torch.equal(images(pipeline), wanted)
    second.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"] == [
        "diffusers",
        "PixArtTransformer2DModel",
    ]


@carries
def test_it_outlives_the_pipeline_it_was_compiled_for(
    carry: Callable, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where timesteps cannot be read (here: the device is pretended): the scheduler both had tells of runs."""
    pipeline = compiled()
    pipeline = carry(pipeline)
    gc.collect()
    assert pipeline.transformer._sampling.pipeline() is None
    for _ in range(2):
        assert torch.equal(images(pipeline), wanted)
    monkeypatch.setattr("harmonica_rt.compiled.read_timestep", lambda timestep: None)
    for _ in range(2):
        assert torch.equal(images(pipeline), wanted)


def test_a_type_is_only_taken_for_its_own_models() -> None:
    kind = type(compiled().transformer)
    assert kind in (PixArtTransformer2DModel,) and PixArtTransformer2DModel == kind == kind
    assert kind not in (DDIMScheduler, torch.nn.Module, hrt.CompiledTransformer)
    assert kind not in {PixArtTransformer2DModel: "an adapter"}
    assert issubclass(kind, hrt.CompiledTransformer) and isinstance(compiled().transformer, PixArtTransformer2DModel)


def test_from_pipe_casts_what_it_carries(wanted: torch.Tensor) -> None:
    second = from_pipe(compiled(), dtype=torch.bfloat16)
    assert second.dtype == second.transformer.dtype == torch.bfloat16
    got = images(second).float()
    assert relative_error(got, images(compiled().to(torch.bfloat16)).float()) < 1e-6
    assert 0 < relative_error(got, wanted) < 0.5, "a sampler of 4 steps in bf16"


# ---- schedulers of their own


@pytest.mark.parametrize("read", [True, False], ids=["on a CPU", "elsewhere"])
def test_a_scheduler_of_its_own_is_told_what_to_do(
    read: bool, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled()
    second = from_pipe(first, scheduler=DDIMScheduler())
    plain = from_pipe(make_pipeline(PixArtSigmaPipeline), scheduler=DDIMScheduler())
    expected = images(hrt.compile(plain, schedule_for(), backend="eager"))
    if not read:
        monkeypatch.setattr("harmonica_rt.compiled.read_timestep", lambda timestep: None)
    with pytest.raises(ValueError, match=f"4 steps, but DPMSolverMultistep.*1000 timesteps.*{OWNS}"):
        images(second)
    images(first)
    with pytest.raises(RuntimeError, match=f"beyond the last step.*steps of the DPMSolverMultistepScheduler {OWNS}"):
        images(second)
    hrt.compile(second, schedule_for(), backend="eager")
    for _ in range(2):
        assert torch.equal(images(first), wanted)
        assert torch.equal(images(second), expected)


def test_a_scheduler_of_its_own_is_followed_once_the_other_is_gone() -> None:
    pipeline = compiled()
    images(pipeline)
    pipeline = from_pipe(pipeline, scheduler=DDIMScheduler())
    gc.collect()
    got = images(pipeline)
    assert relative_error(images(hrt.compile(pipeline, schedule_for(), backend="eager")), got) < 1e-4


# ---- taking it back


def test_each_pipeline_is_uncompiled_on_its_own(wanted: torch.Tensor) -> None:
    plain = images(make_pipeline(PixArtSigmaPipeline))
    first = compiled()
    second, third = from_pipe(first), from_pipe(first)
    model = first.transformer.model
    assert hrt.uncompile(second).transformer is model
    assert torch.equal(images(second), plain) and torch.equal(images(first), wanted)
    assert hrt.uncompile(first).transformer is model
    assert torch.equal(images(third), wanted) and torch.equal(images(first), plain)
    assert hrt.uncompile(third).transformer is model


def test_offloading_goes_on_for_whoever_leaves(wanted: torch.Tensor) -> None:
    first = compiled()
    second = from_pipe(first)
    offload(second)
    hrt.compile(second, schedule_for(), backend="eager")
    for _ in range(2):
        assert torch.equal(images(first), wanted)
        moved = offload(second)
        assert torch.equal(images(second), wanted)
        assert moved.count("PixArtTransformer2DModel") == 4
    moved = offload(second)
    hrt.uncompile(second)
    images(second)
    assert moved.count("PixArtTransformer2DModel") == 4


# ---- what else pipelines do to their components


def test_what_changes_nothing_changes_nothing(wanted: torch.Tensor) -> None:
    pipeline = compiled()
    for change in (
        pipeline.enable_attention_slicing,
        pipeline.disable_attention_slicing,
        pipeline.disable_xformers_memory_efficient_attention,
        pipeline.remove_all_hooks,
        pipeline.reset_device_map,
        lambda: pipeline.register_modules(transformer=pipeline.transformer),
        lambda: pipeline.to("cpu", torch.float32),
    ):
        change()
        assert torch.equal(images(pipeline), wanted)
        assert isinstance(pipeline.transformer, hrt.CompiledTransformer)


def test_a_pipeline_is_moved_as_a_whole() -> None:
    pipeline = compiled().to(torch.bfloat16)
    assert images(pipeline).dtype == pipeline.transformer.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: p.transformer.enable_layerwise_casting(torch.float16, torch.float32), "to_q: expected no .*hooks"),
        (lambda p: p.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"), "expected no .*hooks"),
        (lambda p: p.transformer.fuse_qkv_projections(), "attn1: expected .* got FusedAttnProcessor2_0"),
    ],
    ids=["layerwise casting", "group offloading", "fused projections"],
)
def test_what_the_program_would_not_see_is_refused(change: Callable, match: str) -> None:
    pipeline = compiled()
    images(pipeline)
    change(pipeline)
    with pytest.raises(hrt.UnsupportedModelError, match=match):
        images(pipeline)


def test_perturbed_attention_is_refused() -> None:
    with pytest.raises(hrt.UnsupportedModelError, match=r"attn1: expected .* got PAGCFGIdentitySelfAttnProcessor2_0"):
        images(from_pipe(compiled(), PixArtSigmaPAGPipeline), pag_scale=3.0)


# ---- other compilers


@pytest.mark.parametrize(
    "compile",
    [
        lambda model, inputs: torch.compile(model),
        lambda model, inputs: torch.compile(model, mode="reduce-overhead", fullgraph=True),
        lambda model, inputs: model.compile(mode="default"),
        lambda model, inputs: model.compile_repeated_blocks(fullgraph=True),
        lambda model, inputs: torch.compile(model.forward),
        lambda model, inputs: torch.jit.trace(model, inputs),
        lambda model, inputs: torch.export.export(model, inputs),
    ],
    ids=["torch.compile", "with options", "compile()", "repeated blocks", "forward", "torch.jit", "torch.export"],
)
def test_other_compilers_are_told_that_it_is_compiled(compile: Callable, wanted: torch.Tensor) -> None:
    pipeline = compiled()
    inputs = (torch.randn(1, 2, 8, 8), torch.randn(1, 5, 10), torch.tensor([1]))
    with pytest.raises(RuntimeError, match=r"compiled already, by harmonica_rt.* harmonica_rt.uncompile gives back"):
        compile(pipeline.transformer, inputs)
    assert torch.equal(images(pipeline), wanted)
