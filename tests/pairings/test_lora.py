"""LoRA by peft, before and after compile: the next run uses what the adapters have become, launched or captured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import nn

import harmonica_rt as hrt
from tests.conftest import assert_close, make_pixart
from tests.emulator import Emulator

from .made import BLOCK_WAYS, MODELS, STEPS, WAYS, Sampler, check, check_follows, check_works, compiled, make_flux, over

TARGETS = ["to_q", "to_k", "to_v", "add_q_proj", "proj_mlp"]
SCALED = {"flux": "joint_attention_kwargs", "sd3": "joint_attention_kwargs", "unet": "cross_attention_kwargs"}


def adapter(rank: int = 2) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=3, target_modules=TARGETS, init_lora_weights=False)


def with_adapters(name: str = "flux") -> nn.Module:
    model = MODELS[name]()
    for adapter_name in ("one", "two"):
        inject_adapter_in_model(adapter(), model, adapter_name)  # PixArt has no add_adapter
    if isinstance(model, PeftAdapterMixin):
        model._hf_peft_config_loaded = True
        model.set_adapters(["one"], [1.0])
    return model


def files(folder: Path, seed: int, rank: int = 2) -> Path:
    """A LoRA as it is published."""
    model = make_flux()
    torch.manual_seed(seed)
    model.add_adapter(adapter(rank), "x")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    layers = get_peft_model_state_dict(model, adapter_name="x")
    FluxPipeline.save_lora_weights(folder / str(seed), transformer_lora_layers=layers)
    return folder / str(seed)


def captured(model: nn.Module, way: dict[str, Any]) -> nn.Module:
    fast = compiled(model, way, backend="cudagraph")
    fast._recorder = Emulator
    return fast


HOW: dict[str, tuple[Callable[[nn.Module, dict[str, Any]], nn.Module], float]] = {
    "launched": (compiled, 0.0),
    "captured": (captured, 1e-5),
}
how = pytest.mark.parametrize(("build", "tolerance"), HOW.values(), ids=HOW)


@over(WAYS)
@pytest.mark.parametrize("name", ["flux", "sd3", "pixart"])
def test_adapters_added_before(name: str, way: dict[str, Any]) -> None:
    check_works(with_adapters(name), Sampler(name), way)


def test_adapters_of_a_unet() -> None:
    check_works(with_adapters("unet"), Sampler("unet"), WAYS["output"])


@over(WAYS)
@how
def test_an_adapter_added_after(build: Any, tolerance: float, way: dict[str, Any]) -> None:
    fast = build(make_flux(), way)
    check_follows(fast, Sampler("flux"), way, lambda: fast.add_adapter(adapter(), "one"), tolerance)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "weights": lambda model: model.set_adapters(["one"], [0.3]),
    "both": lambda model: model.set_adapters(["one", "two"], [0.5, -0.7]),
    "other": lambda model: model.set_adapter("two"),
    "disabled": lambda model: model.disable_adapters(),
    "deleted": lambda model: model.delete_adapters("one"),
    "unloaded": lambda model: model.unload_lora(),
    "fused": lambda model: model.fuse_lora(lora_scale=2.0),
    "in place": lambda model: [p.data.mul_(2) for n, p in model.named_parameters() if "lora_B.one" in n],
}


@over(WAYS)
@how
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_adapters_is_followed(build: Any, tolerance: float, way: dict[str, Any], change: Any) -> None:
    fast = build(with_adapters(), way)
    check_follows(fast, Sampler("flux"), way, lambda: change(fast), tolerance)


@over(WAYS)
@how
def test_what_was_disabled_or_fused_comes_back(build: Any, tolerance: float, way: dict[str, Any]) -> None:
    fast, sampler = build(with_adapters(), way), Sampler("flux")
    whole = sampler.run(fast)
    fast.disable_adapters()
    sampler.run(fast)
    check_follows(fast, sampler, way, fast.enable_adapters, tolerance)
    assert_close(sampler.run(fast), whole, tolerance)
    fast.fuse_lora()
    assert_close(check(fast, sampler, way, tolerance), whole, 1e-4)
    fast.unfuse_lora()
    assert_close(check(fast, sampler, way, tolerance), whole, 1e-4)


@over(WAYS)
@how
@pytest.mark.parametrize("name", SCALED)
def test_a_scale_among_the_arguments(name: str, build: Any, tolerance: float, way: dict[str, Any]) -> None:
    if name == "unet" and way["level"] != "output":
        with pytest.raises(hrt.UnsupportedModelError, match="no lists of blocks: expected level 'output'"):
            compiled(MODELS[name](), way)
        return
    fast = build(with_adapters(name), way)
    samplers = [Sampler(name, each=lambda _, s=s: {SCALED[name]: {"scale": s}}) for s in (0.3, 1.7, 0.3)]
    runs = [check(fast, sampler, way, tolerance) for sampler in samplers]
    assert_close(runs[2], runs[0], tolerance)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(runs[1], runs[0], 1e-2)


@over(WAYS)
def test_a_scale_that_changes_from_step_to_step(way: dict[str, Any]) -> None:
    check_works(
        with_adapters(), Sampler("flux", each=lambda step: {"joint_attention_kwargs": {"scale": 1 - step / STEPS}}), way
    )


# ---- as a pipeline's user does it


def make_pipe(model: nn.Module | None = None) -> FluxPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, None, None, None, None, None, make_flux() if model is None else model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: FluxPipeline, scale: float | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 5, 8, generator=generator), torch.randn(1, 6, generator=generator)
    return pipe(
        prompt_embeds=embeds[0], pooled_prompt_embeds=embeds[1], height=64, width=64, num_inference_steps=STEPS,
        generator=generator, output_type="latent", joint_attention_kwargs=scale and {"scale": scale},
    ).images  # fmt: skip


def check_pipe(fast: FluxPipeline, way: dict[str, Any], **options: Any) -> torch.Tensor:
    """What `fast` makes is what a pipeline compiled just now makes of the same model."""
    model = fast.transformer.model
    schedule = hrt.Schedule.uniform(model, STEPS, **way)
    got = latents(fast, **options)
    assert torch.equal(got, latents(hrt.compile(make_pipe(model), schedule, backend="eager"), **options))
    assert not torch.equal(got, latents(make_pipe(model), **options))
    full = hrt.compile(make_pipe(model), hrt.Schedule.full(model, STEPS, **way))
    assert torch.equal(latents(full, **options), latents(make_pipe(model), **options))
    return got


@over(WAYS)
def test_lora_weights_of_a_pipeline(way: dict[str, Any], tmp_path: Path) -> None:
    pipe = make_pipe()
    pipe.load_lora_weights(files(tmp_path, 1), adapter_name="one")
    hrt.compile(pipe, hrt.Schedule.uniform(pipe.transformer, STEPS, **way))
    seen = [check_pipe(pipe, way)]
    pipe.load_lora_weights(files(tmp_path, 2, rank=4), adapter_name="two")
    for change in (
        lambda: None,
        lambda: pipe.set_adapters(["one", "two"], [0.5, 0.5]),
        lambda: pipe.fuse_lora(),
        lambda: (pipe.unfuse_lora(), pipe.delete_adapters("two")),
        lambda: pipe.disable_lora(),
        lambda: (pipe.enable_lora(), pipe.set_adapters("one", 2.0)),
    ):
        change()
        seen.append(check_pipe(pipe, way))
        assert not torch.equal(seen[-1], seen[-2])
    seen.append(check_pipe(pipe, way, scale=0.4))
    pipe.unload_lora_weights()
    without = latents(hrt.compile(make_pipe(), pipe.transformer.schedule))
    assert_close([check_pipe(pipe, way)], [without], 1e-5)  # fusing and unfusing rounds


@over(WAYS)
@how
def test_a_hotswap(build: Any, tolerance: float, way: dict[str, Any], tmp_path: Path) -> None:
    pipe, sampler = make_pipe(), Sampler("flux")
    pipe.load_lora_weights(files(tmp_path, 1), adapter_name="one")
    fast = build(pipe.transformer, way)
    pipe.transformer = fast
    swap = lambda: pipe.load_lora_weights(files(tmp_path, 2), adapter_name="one", hotswap=True)  # noqa: E731
    check_follows(fast, sampler, way, swap, tolerance)


# ---- levels


def test_auto_is_the_level_that_takes_adapters() -> None:
    model = make_pixart()
    assert hrt.Schedule.uniform(model, STEPS).level == "branches"
    fine = hrt.compile(model, hrt.Schedule.uniform(model, STEPS), backend="eager")
    Sampler("pixart").run(fine)
    inject_adapter_in_model(adapter(), model, "one")
    schedule = hrt.Schedule.uniform(model, STEPS)
    assert schedule.level == "blocks"
    check(hrt.compile(model, schedule), Sampler("pixart"), WAYS["trunk"])
    for refused in (
        lambda: hrt.Schedule.uniform(model, STEPS, level="branches"),
        lambda: hrt.compile(model, hrt.Schedule.uniform(make_pixart(), STEPS, level="branches")),
        lambda: Sampler("pixart").run(fine),
    ):
        with pytest.raises(hrt.UnsupportedModelError, match=r"attn1.to_q: .*peft.*Level 'blocks' takes"):
            refused()


@over(WAYS)
def test_a_model_that_peft_wraps_is_run_as_what_it_wraps(way: dict[str, Any]) -> None:
    """As for PixArt, which diffusers loads no adapters into."""
    wrapped, sampler = get_peft_model(make_pixart(), adapter()), Sampler("pixart")
    assert hrt.Schedule.uniform(wrapped, STEPS).level == "blocks"
    schedule = hrt.Schedule.uniform(wrapped, STEPS, **way)
    assert schedule == hrt.Schedule.uniform(make_pixart(), STEPS, **way)
    fast = check_works(wrapped.eval(), sampler, way)
    with fast.disable_adapter():
        without = check(fast, sampler, way)
    assert_close(without, sampler.run(compiled(make_pixart(), way)), 0.0)
    torch.manual_seed(1)  # another one than the first
    fast.add_adapter("two", adapter())
    check_follows(fast, sampler, way, lambda: fast.set_adapter("two"))
    fast.merge_adapter()
    check(fast, sampler, way)


@over(BLOCK_WAYS)
def test_dropout_of_an_adapter_in_training_mode_is_refused(way: dict[str, Any]) -> None:
    model = make_flux()
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS, lora_dropout=0.5), "one")
    with pytest.raises(ValueError, match=r"eval mode, got .*lora_dropout.one in training mode"):
        compiled(model, way)
    check_works(model.eval(), Sampler("flux"), way)


@over(WAYS)
@how
def test_a_change_midway_leaves_nothing_of_before_to_the_next_run(
    build: Any, tolerance: float, way: dict[str, Any]
) -> None:
    """As a callback makes it; of a captured run half the graphs are from before it."""
    model, sampler = with_adapters(), Sampler("flux")
    fast = build(model, way)
    for step in range(STEPS):
        if step == 3:
            fast.set_adapters(["two"], [0.6])
        sampler.call(fast, step)
    check(fast, sampler, way, tolerance)
    check(fast, sampler, way, tolerance)
