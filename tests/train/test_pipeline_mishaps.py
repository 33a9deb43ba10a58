"""What goes wrong while a pipeline learns: said in words, and the pipeline is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import harmonica_rt as hrt
from harmonica_rt.train import learn as learning
from harmonica_rt.train.contexts import every
from harmonica_rt.train.pipeline_task import PipelineTask

from ..pipelines.folders import text_flux, text_pixart
from ..pipelines.images import z_image
from ..pipelines.parts import TEXT, noise

SMALL = {"num_inference_steps": 4, "height": 16, "width": 16, "max_sequence_length": 8}
FEW = {"target_speedup": 1.5, "iterations": 1, "batch": 2, "validation": 2, "channels": False}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "TRIAL", 1)
    monkeypatch.setattr(PipelineTask, "held_out", 2)
    monkeypatch.setattr("harmonica_rt.train.pipeline_task.POWERS", ())


def state_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """All that learning could leave behind on parts that others have too."""
    seen: dict[str, Any] = {"cudnn": torch.backends.cuda.cudnn_sdp_enabled(), "gradients": torch.is_grad_enabled()}
    for name, part in pipe.components.items():
        seen[name] = id(part)
        for path, module in part.named_modules() if isinstance(part, nn.Module) else ():
            hooks = len(module._forward_hooks), len(module._forward_pre_hooks), type(getattr(module, "_hf_hook", None))
            seen[f"{name}.{path}"] = hooks, module.training
        for path, own in part.named_parameters() if isinstance(part, nn.Module) else ():
            seen[f"{name}.{path}"] = own.device, own.requires_grad, own.grad is None
    return seen


class MishapError(Exception):
    pass


def mishap(*_: Any) -> bool:
    raise MishapError


@pytest.mark.parametrize("level", ["auto", "output"])
@pytest.mark.parametrize("told", ["on_memory", "on_progress", "on_better", "stopped", "within"])
def test_an_error_midway_leaves_the_pipeline_as_it_was(told: str, level: str) -> None:
    pipe = text_flux()
    for number, parameter in enumerate(pipe.transformer.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt

    if told == "within":
        pipe.transformer.register_forward_pre_hook(interrupt)
    before, more = state_of(pipe), {} if told == "within" else {told: mishap}
    with pytest.raises((MishapError, KeyboardInterrupt)):
        hrt.learn(pipe, ["a cat", "a dog"], level=level, **more, **FEW | {"iterations": 9}, **SMALL)
    assert state_of(pipe) == before


@pytest.mark.parametrize("contexts", ["shared", "own"])
def test_stopped_at_once_it_has_learned_nothing(contexts: str) -> None:
    more = {"contexts": contexts, "true_cfg_scale": 2.0, "negative_prompt": "", "stopped": lambda: True}
    schedules = hrt.learn(text_flux(), ["a cat", "a dog"], level="output", **more, **FEW, **SMALL)
    assert all("ended early after" in own.note for own in every(schedules))


def test_model_offload_is_back_where_it_was() -> None:
    pipe = text_flux()
    pipe.enable_model_cpu_offload(device="cpu")
    before, hooks = state_of(pipe), len(pipe._all_hooks)
    assert hrt.learn(pipe, ["a cat"], level="output", **FEW, **SMALL).steps == 4
    with pytest.raises(MishapError):
        hrt.learn(pipe, ["a cat"], level="output", on_memory=mishap, **FEW, **SMALL)
    assert state_of(pipe) == before and len(pipe._all_hooks) == hooks > 0


def sequential(pipe: DiffusionPipeline) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")


def group(pipe: DiffusionPipeline) -> None:
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "block_level", 1)


@pytest.mark.parametrize("offload", [sequential, group])
def test_offloading_within_the_denoiser_is_refused(offload: Callable[[DiffusionPipeline], None]) -> None:
    pipe = text_flux()
    offload(pipe)
    before = state_of(pipe)
    error = rf"expected a transformer whose weights stay .*, got {offload.__name__} offloading"
    with pytest.raises(ValueError, match=error):
        hrt.learn(pipe, ["a cat"], **FEW, **SMALL)
    assert state_of(pipe) == before


def reads_a_value(module: nn.Module, args: tuple[Any, ...]) -> None:
    assert args[0].sum().item() < 1e9


@pytest.mark.parametrize("level", ["auto", "output"])
def test_memory_that_cannot_be_counted_is_said_and_learning_goes_on(level: str) -> None:
    pipe, told = text_flux(), []
    pipe.transformer.time_text_embed.register_forward_pre_hook(reads_a_value)
    with pytest.warns(UserWarning, match=r"memory was not counted: DataDependentOutputException: .* \(--accumulate\)"):
        schedule = hrt.learn(pipe, ["a cat"], level=level, on_memory=told.append, **FEW, **SMALL)
    assert "learned on the end error" in schedule.note and not told


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"checkpointing": "x"}, r"checkpointing: expected one of \('auto', 'none', 'steps', 'blocks'\), got 'x'"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
        ({"accumulate": 3}, "batch: expected a multiple of 3 parts, got 2"),
        ({"validation": 0}, "validation: expected at least 1, got 0"),
    ],
    ids=str,
)
def test_refused_before_anything_runs(given: dict[str, Any], error: str) -> None:
    pipe = text_flux()
    for part in (pipe.text_encoder, pipe.transformer):
        part.register_forward_pre_hook(mishap)
    with pytest.raises(ValueError, match=error):
        hrt.learn(pipe, ["a cat"], **FEW | given, **SMALL)


# ---- schedules to go on from


def test_schedules_that_cannot_go_on_are_refused() -> None:
    pipe = text_flux()
    start = hrt.Schedule.uniform(pipe.transformer, 4, every=2, level="blocks")
    wide = start.replace(channels=np.zeros((*start.compute.shape, 3, 4), dtype=np.float32))
    guided = {"true_cfg_scale": 2.0, "negative_prompt": "a dog"}
    for init, error, more in (
        ({}, r"init: expected a Schedule, or one by context, got \{\}", {}),
        ("s.json", "init: expected a Schedule, or one by context, got 's.json'", {}),
        (wide, "channels: expected True beside an init with weights per channel, got False", {}),
        ({"cond": start, "uncond": start.replace(order=0, weights=None)}, "one order .*, got 1 and 0", guided),
    ):
        before = state_of(pipe)
        with pytest.raises((TypeError, ValueError), match=error):
            hrt.learn(pipe, ["a cat"], init=init, **more, **FEW | {"target_speedup": None}, **SMALL)
        assert state_of(pipe) == before


# ---- features in place of prompts


def without_encoders(pipe: DiffusionPipeline) -> DiffusionPipeline:
    for name in pipe.components:
        if name.startswith(("text_encoder", "tokenizer")):
            setattr(pipe, name, None)
    return pipe


@pytest.mark.parametrize("batch", [1, 4])
def test_features_and_their_masks_need_no_text_encoder(batch: int) -> None:
    pipe = text_pixart()
    with torch.no_grad():
        states, mask, null, null_mask = pipe.encode_prompt("a cat", max_sequence_length=8)
    features = {"prompt_embeds": states, "prompt_attention_mask": mask, "negative_prompt": None}
    features |= {"negative_prompt_embeds": null, "negative_prompt_attention_mask": null_mask}
    more = {**SMALL, **features, **FEW, "batch": batch, "use_resolution_binning": False}
    assert hrt.learn(without_encoders(pipe), level="blocks", **more).level == "blocks"


def test_features_of_several_prompts_and_texts_without_an_encoder_are_refused() -> None:
    pipe = without_encoders(text_flux())
    embeds = {"prompt_embeds": torch.zeros(4, 8, 12), "pooled_prompt_embeds": torch.zeros(4, 10)}
    for run in (hrt.learn, lambda *args, **more: hrt.compare(args[0], "output:2", *args[1:], **more)):
        with pytest.raises(ValueError, match=r"prompt_embeds: expected those of one prompt, .*, got \[4, 8, 12"):
            run(pipe, **embeds, **SMALL)
        with pytest.raises(ValueError, match=r"expected none, and prompt_embeds=.* without a text encoder, got 'a"):
            run(pipe, ["a cat"], **SMALL)


def test_features_that_are_lists() -> None:
    """Z-Image's, a tensor a prompt; its groups cannot carry."""
    features = {"prompt_embeds": [noise(5, TEXT, seed=1)], "negative_prompt_embeds": [noise(3, TEXT, seed=2)]}
    call = {name: value for name, value in SMALL.items() if name != "max_sequence_length"}
    schedule = hrt.learn(z_image(), **features, **FEW | {"channels": None, "batch": 4}, **call)
    assert schedule.level == "blocks" and not schedule.carry.any() and schedule.channels is not None
