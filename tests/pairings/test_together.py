"""Several of them on one model, and what each does to captured steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import SanaTransformer2DModel
from diffusers.hooks import apply_layerwise_casting
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tests.conftest import assert_close

from .made import MODELS, WAYS, Sampler, check, check_follows, check_works, compiled, make_flux, over
from .test_conditions import residuals, with_ip_adapter
from .test_lora import HOW, adapter, captured, with_adapters

how = pytest.mark.parametrize(("build", "tolerance"), HOW.values(), ids=HOW)
CPU = torch.device("cpu")


@over(WAYS)
@how
def test_adapters_over_quantised_weights(build: Any, tolerance: float, way: dict[str, Any]) -> None:
    """As QLoRA: the adapters' weights stay plain."""
    model, sampler = make_flux(), Sampler("flux")
    quantize_(model, Int8WeightOnlyConfig())
    fast = build(model, way)
    check_follows(fast, sampler, way, lambda: fast.add_adapter(adapter(), "one"), tolerance)
    check_follows(fast, sampler, way, lambda: fast.set_adapters(["one"], [0.2]), tolerance)


@over(WAYS)
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_adapters_of_an_offloaded_model(kind: str, way: dict[str, Any]) -> None:
    model, sampler = with_adapters(), Sampler("flux")
    model.enable_group_offload(CPU, CPU, kind, 1)
    fast = compiled(model, way)
    check_follows(fast, sampler, way, lambda: fast.set_adapters(["one", "two"], [0.5, 0.5]))
    check_follows(fast, sampler, way, fast.disable_adapters)


@over(WAYS)
def test_adapters_of_compiled_blocks(way: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, sampler = with_adapters(), Sampler("flux")
    model.compile_repeated_blocks(backend="eager")
    fast = compiled(model, way)
    check_follows(fast, sampler, way, lambda: fast.set_adapters(["one"], [0.3]), 1e-6)
    check_follows(fast, sampler, way, fast.disable_adapters, 1e-6)
    torch._dynamo.reset()


@over(WAYS)
def test_casting_hooks_under_adapters_and_autocast(way: dict[str, Any]) -> None:
    model, sampler = with_adapters(), Sampler("flux")
    apply_layerwise_casting(
        model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=["norm", "lora", "pos_embed"]
    )
    fast = check_works(model, sampler, way)
    with torch.autocast("cpu", torch.bfloat16):
        check(fast, sampler, way)


@over(WAYS)
@how
def test_ip_adapter_controlnet_and_a_scale_in_one_call(build: Any, tolerance: float, way: dict[str, Any]) -> None:
    model, image = with_ip_adapter(), torch.randn(2, 1, 6)
    model.add_adapter(adapter(), "one")

    def given(step: int) -> dict[str, Any]:
        own = residuals(step) if step < 3 else {}
        return {**own, "joint_attention_kwargs": {"ip_adapter_image_embeds": [image], "scale": 0.5}}

    fast, sampler = build(model, way), Sampler("flux", each=given)
    first = check(fast, sampler, way, tolerance)
    assert_close(check(fast, sampler, way, tolerance), first, tolerance)
    check_follows(fast, sampler, way, lambda: fast.set_adapters(["one"], [3.0]), tolerance)


def make_sana() -> SanaTransformer2DModel:
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=8,
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.add_adapter(adapter(), "one")
    return model.eval()


@over(WAYS)
@how
def test_a_scale_in_attention_kwargs(
    build: Any, tolerance: float, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sana's, as most newer models have it."""
    monkeypatch.setitem(MODELS, "sana", make_sana)
    fast = build(make_sana(), way)
    runs = []
    for scale in (0.2, 3.0, 0.2):
        sampler = Sampler("sd3", each=lambda _, scale=scale: {"attention_kwargs": {"scale": scale}})
        del sampler.fixed["pooled_projections"]
        runs.append(check(fast, sampler, way, tolerance))
    assert_close(runs[2], runs[0], tolerance)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(runs[1], runs[0], 1e-2)


class Brings(ModelHook):
    """As model offloading on a machine with a device: weights are elsewhere in each run, and gone after it."""

    def __init__(self) -> None:
        self.brought = False

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.brought:
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()
            self.brought = True
        return args, kwargs


@over(WAYS)
@over({"before": True, "after": False}, "before")
def test_captured_steps_of_a_model_whose_weights_are_brought(way: dict[str, Any], before: bool) -> None:
    """Each run captures anew: graphs of the last one read where the weights were."""
    model, sampler, hook = make_flux(), Sampler("flux"), Brings()
    if before:
        add_hook_to_module(model, hook)
    fast = captured(model, way)
    if not before:
        add_hook_to_module(fast, hook)
    for factor in (1.0, 2.0, 0.5):
        model.proj_out.weight.data = model.proj_out.weight.data * factor
        for parameter in model.parameters():  # as the hook's offload leaves them
            parameter.data = parameter.data.clone()
        hook.brought = False
        old = [p.data for p in model.parameters()]
        got = sampler.run(fast)
        for t in old:
            t.fill_(torch.nan)
        wanted = sampler.run(compiled(model, way, backend="eager"))
        assert_close(got, wanted, 1e-5)
        assert_close(sampler.run(fast), wanted, 1e-5)
