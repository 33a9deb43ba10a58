"""Offloading by accelerate's and diffusers' hooks: reused groups are not brought, and nothing stays where it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks.group_offloading import GroupOffloadingHook
from torch import nn

import harmonica_rt as hrt
from tests.conftest import assert_close, make_pixart
from tests.test_pixart_pipelines import offload

from .made import BLOCK_WAYS, STEPS, WAYS, Sampler, check, check_works, compiled, make_dit, make_flux, over
from .test_lora import latents, make_pipe

CPU = torch.device("cpu")
GROUP = {
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "blocks": {"offload_type": "block_level", "num_blocks_per_group": 2},
    "leaf": {"offload_type": "leaf_level"},
}
WHEN = {"before": True, "after": False}


def offloaded(way: dict[str, Any], before: bool, offload: Callable[[nn.Module], Any], model: Any = None) -> Any:
    model = make_flux() if model is None else model
    if before:
        offload(model)
    fast = compiled(model, way)
    if not before:
        offload(fast)
    return fast


def onloads(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[str]:
    """Names of what group offloading brings, as it does."""
    names = {id(module): name for name, module in model.named_modules()}
    seen: list[str] = []
    plain = GroupOffloadingHook.pre_forward

    def pre_forward(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(names[id(module)])
        return plain(self, module, *args, **kwargs)

    monkeypatch.setattr(GroupOffloadingHook, "pre_forward", pre_forward)
    return seen


@over(WAYS)
@over(GROUP, "group")
@over(WHEN, "before")
def test_group_offload(way: dict[str, Any], group: dict[str, Any], before: bool) -> None:
    sampler = Sampler("flux")
    wanted = sampler.run(compiled(make_flux(), way))
    fast = offloaded(way, before, lambda m: m.enable_group_offload(CPU, CPU, **group))
    assert_close(check(fast, sampler, way), wanted, 0.0)
    assert_close(check(fast, sampler, way), wanted, 0.0)


@over(WAYS)
@over(GROUP, "group")
def test_reused_groups_are_not_brought(
    way: dict[str, Any], group: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sampler = make_flux(), Sampler("flux")
    seen = onloads(monkeypatch, model)
    fast = offloaded(way, False, lambda m: m.enable_group_offload(CPU, CPU, **group), model)
    for step in range(STEPS):
        seen.clear()
        sampler.call(fast, step)
        blocks = [name for name in seen if "transformer_blocks" in name]
        assert bool(blocks) == (step % 2 == 0), step
        assert bool(seen) == (step % 2 == 0 or way["level"] == "blocks"), step


@over(WAYS)
@over(WHEN, "before")
def test_group_offload_of_a_pipeline(way: dict[str, Any], before: bool) -> None:
    schedule, pipe = hrt.Schedule.uniform(make_flux(), STEPS, **way), make_pipe()
    wanted = latents(hrt.compile(make_pipe(), schedule))
    steps = [
        lambda: pipe.enable_group_offload(CPU, CPU, "block_level", 1),
        lambda: hrt.compile(pipe, schedule),
    ]
    for do in steps if before else reversed(steps):
        do()
    assert torch.equal(latents(pipe), wanted)
    assert torch.equal(latents(pipe), wanted)


@over(WAYS)
def test_group_offload_applied_to_what_was_compiled(way: dict[str, Any]) -> None:
    fast = offloaded(way, False, lambda m: apply_group_offloading(m, CPU, CPU, num_blocks_per_group=1))
    check(fast, Sampler("flux"), way)
    assert hasattr(fast.model.transformer_blocks[0], "_diffusers_hook")


def sequential(model: nn.Module) -> None:
    """As `enable_sequential_cpu_offload`: weights are on meta but while a layer runs."""
    accelerate.cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)


@over(WAYS)
@over(WHEN, "before")
def test_sequential_offload(way: dict[str, Any], before: bool) -> None:
    sampler = Sampler("flux")
    wanted = sampler.run(compiled(make_flux(), way))
    fast = offloaded(way, before, sequential)
    assert {p.device.type for p in fast.parameters()} == {"meta"}
    assert_close(sampler.run(fast), wanted, 0.0)
    assert_close(sampler.run(fast), wanted, 0.0)
    assert {p.device.type for p in fast.parameters()} == {"meta"}
    remove_hook_from_module(fast, recurse=True)
    assert {p.device.type for p in fast.parameters()} == {"cpu"}
    assert_close(check(fast, sampler, way), wanted, 0.0)


@over(WAYS)
def test_sequential_offload_of_weights_that_belong_to_no_layer(way: dict[str, Any]) -> None:
    """PixArt's last table is the model's own: it is offloaded as the layers are."""
    fast, sampler = compiled(make_pixart(), way), Sampler("pixart")
    wanted = sampler.run(fast)
    sequential(fast)
    assert {name for name, p in fast.named_parameters() if p.device.type != "meta"} == set()
    assert_close(sampler.run(fast), wanted, 0.0)
    assert {name for name, p in fast.named_parameters() if p.device.type != "meta"} == set()


@over(BLOCK_WAYS)
def test_sequential_offload_brings_no_layer_of_a_reused_group(
    way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sampler, seen = make_flux(), Sampler("flux"), []
    fast = offloaded(way, False, sequential, model)
    names = {id(module): name for name, module in model.named_modules()}
    plain = AlignDevicesHook.pre_forward

    def pre_forward(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(names.get(id(module), ""))
        return plain(self, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", pre_forward)
    for step in range(STEPS):
        seen.clear()
        sampler.call(fast, step)
        assert any("transformer_blocks" in name for name in seen) == (step % 2 == 0), step
        assert "proj_out" in seen


class Device(ModelHook):
    """As accelerate's CpuOffload on a machine with a device: what it did, in turn."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.did.append("brought")
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.did.append("given back")
        return output


@over(WAYS)
@over(WHEN, "before")
def test_a_hook_of_accelerate_runs_around_each_call(way: dict[str, Any], before: bool) -> None:
    hook = Device()
    fast = offloaded(way, before, lambda m: add_hook_to_module(m, hook))
    sampler = Sampler("flux")
    outputs = sampler.run(fast)  # learns, at level blocks by one more forward
    hook.did.clear()
    assert_close(sampler.run(fast), outputs, 0.0)
    calls = STEPS if not before or way["level"] == "blocks" else 3
    assert hook.did == ["brought", "given back"] * calls
    remove_hook_from_module(fast if not before else fast.model)
    hook.did.clear()
    assert_close(sampler.run(fast), outputs, 0.0)
    assert not hook.did


@over(WAYS)
@over(WHEN, "before")
def test_model_offload(way: dict[str, Any], before: bool) -> None:
    schedule, pipe = hrt.Schedule.uniform(make_flux(), STEPS, **way), make_pipe()
    wanted = latents(hrt.compile(make_pipe(), schedule))
    steps = [lambda: offload(pipe), lambda: hrt.compile(pipe, schedule)]
    for do in steps if before else reversed(steps):
        do()
    assert torch.equal(latents(pipe), wanted)
    moved = offload(pipe)  # diffusers puts its hooks on anew after each call
    assert torch.equal(latents(pipe), wanted)
    assert moved.count("FluxTransformer2DModel") == STEPS
    pipe.remove_all_hooks()
    assert torch.equal(latents(pipe), wanted)
    model = hrt.uncompile(pipe).transformer
    assert torch.equal(latents(pipe), latents(make_pipe()))
    assert not hasattr(model, "_hf_hook")


@pytest.mark.parametrize(
    "offload", [sequential, lambda m: apply_group_offloading(m, CPU, CPU, "leaf_level")], ids=["sequential", "group"]
)
def test_auto_is_the_level_that_takes_offloaded_models(offload: Any) -> None:
    model = make_dit()
    offload(model)
    schedule = hrt.Schedule.uniform(model, STEPS)
    assert schedule.level == "blocks"
    wanted = Sampler("dit").run(compiled(make_dit(), WAYS["trunk"]))
    assert_close(Sampler("dit").run(hrt.compile(model, schedule)), wanted, 0.0)
    with pytest.raises(hrt.UnsupportedModelError, match=r"no forward hooks, got some .*Level 'blocks' takes"):
        hrt.compile(model, hrt.Schedule.uniform(make_dit(), STEPS))


@over(WAYS)
def test_group_offload_that_is_taken_away(way: dict[str, Any]) -> None:
    sampler = Sampler("flux")
    fast = offloaded(way, True, lambda m: m.enable_group_offload(CPU, CPU, "block_level", 1))
    whole = sampler.run(fast)
    for module in fast.modules():
        if hasattr(module, "_diffusers_hook"):
            for name in ("group_offloading", "lazy_prefetch_group_offloading"):
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(name, recurse=False)
    assert_close(check(fast, sampler, way), whole, 0.0)
    check_works(copy.deepcopy(fast.model), sampler, way)
