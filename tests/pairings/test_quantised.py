"""Quantised: torchao's tensors, diffusers' GGUF layers, packed layers as bitsandbytes has them, casting hooks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import gguf
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)

import harmonica_rt as hrt
from harmonica_rt.cuda_graphs import CaptureFailed
from tests.conftest import assert_close
from tests.emulator import Emulator

from .made import BLOCK_MODELS, MODELS, STEPS, WAYS, Sampler, check, check_follows, check_works, compiled, over
from .test_lora import captured


class Packed4bit(nn.Linear):
    """As bitsandbytes' Linear4bit: two weights a byte, [n / 2, 1], a scale a row; made plain within the forward."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        scale = plain.weight.data.abs().amax(1, keepdim=True) / 7
        codes = (plain.weight.data / scale).round().add(8).to(torch.uint8).flatten()
        packed = (codes[::2] << 4 | codes[1::2]).unsqueeze(1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias
        self.quant_state = {"scale": scale, "shape": plain.weight.shape}

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.cat([self.weight >> 4, self.weight & 15], 1).flatten().view(self.quant_state["shape"])
        weight = (codes.to(x.dtype) - 8) * self.quant_state["scale"].to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def gguf_linear(plain: nn.Linear) -> GGUFLinear:
    kind = gguf.GGMLQuantizationType.Q8_0
    data = torch.from_numpy(gguf.quants.quantize(plain.weight.data.numpy(), kind))
    made = GGUFLinear(plain.in_features, plain.out_features, plain.bias is not None, compute_dtype=torch.float32)
    made.weight = GGUFParameter(data, quant_type=kind)
    made.bias = plain.bias
    return made


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module], width: int = 32) -> None:
    """Linears of the blocks, as quantisers replace them; `width`: what their inputs are a multiple of."""
    count = 0
    for _, blocks in list(model.named_children()):
        for module in list(blocks.modules()) if isinstance(blocks, nn.ModuleList) else []:
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and child.in_features % width == 0:
                    setattr(module, name, make(child).eval())
                    count += 1
    assert count >= 6


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "torchao int8": lambda model: quantize_(model, Int8WeightOnlyConfig()),
    "torchao int4": lambda model: quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "torchao fp8": lambda model: quantize_(model, Float8WeightOnlyConfig()),
    "torchao int8 both": lambda model: quantize_(model, Int8DynamicActivationInt8WeightConfig()),
    "gguf": lambda model: replace_linears(model, gguf_linear),
    "4 bits": functools.partial(replace_linears, make=Packed4bit, width=1),
}
kinds = pytest.mark.parametrize("quantise", KINDS.values(), ids=KINDS)


def wide(name: str) -> nn.Module:
    """Blocks whose widths are multiples of what GGUF packs together."""
    options = {"dit": {"head_dim": 16}, "pixart": {"head_dim": 16}}.get(name, {})
    return MODELS[name](**options)


@over(WAYS)
@kinds
@pytest.mark.parametrize("name", ["flux", "dit"])
def test_quantised_before(name: str, quantise: Any, way: dict[str, Any]) -> None:
    model = wide(name)
    quantise(model)
    fast = check_works(model, Sampler(name), way)
    assert fast.report().plans[0].full_macs is None or fast.report().plans[0].full_macs > 0


@over(WAYS)
@kinds
def test_quantised_after(quantise: Any, way: dict[str, Any]) -> None:
    fast = compiled(wide("flux"), way)
    check_follows(fast, Sampler("flux"), way, lambda: quantise(fast))


@over(WAYS)
@kinds
def test_captured_and_quantised_after(quantise: Any, way: dict[str, Any]) -> None:
    fast = captured(wide("flux"), way)
    check_follows(fast, Sampler("flux"), way, lambda: quantise(fast.model), 1e-5)
    check(fast, Sampler("flux", seed=1), way, 1e-5)


@kinds
def test_quantised_models_are_moved_copied_and_loaded(quantise: Any) -> None:
    model, way, sampler = wide("flux"), WAYS["trunk"], Sampler("flux")
    quantise(model)
    fast = compiled(model, way)
    whole = sampler.run(fast)
    fast.to("cpu")
    fast.load_state_dict(fast.state_dict())
    assert_close(check(fast, sampler, way), whole, 0.0)
    if quantise is not KINDS["gguf"]:  # diffusers' GGUFParameter cannot be copied
        assert_close(sampler.run(copy.deepcopy(fast)), whole, 0.0)


@pytest.mark.parametrize("quantise", [*KINDS.values(), lambda model: model.enable_layerwise_casting()])
@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_auto_is_the_level_that_takes_quantised_models(name: str, quantise: Any) -> None:
    model, plain = wide(name), wide(name)
    quantise(model)
    schedule = hrt.Schedule.uniform(model, STEPS)
    assert schedule.level == "blocks"
    check(hrt.compile(model, schedule), Sampler(name), WAYS["trunk"])
    for refused in (
        lambda: hrt.Schedule.uniform(model, STEPS, level="branches"),
        lambda: hrt.compile(model, hrt.Schedule.uniform(plain, STEPS)),
    ):
        with pytest.raises(hrt.UnsupportedModelError, match=r"expected .*, got .*Level 'blocks' takes such a model"):
            refused()


# ---- weights stored in fp8, cast around each layer's call


@over(WAYS)
@pytest.mark.parametrize("name", [*BLOCK_MODELS, "unet"])
def test_layerwise_casting(name: str, way: dict[str, Any]) -> None:
    if name == "unet" and way["level"] == "blocks":
        return
    model = MODELS[name]()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(p.dtype is torch.float8_e4m3fn for p in model.parameters())
    check_works(model, Sampler(name), way)


@over(WAYS)
def test_layerwise_casting_after(way: dict[str, Any]) -> None:
    fast = compiled(MODELS["flux"](), way)
    check_follows(fast, Sampler("flux"), way, lambda: fast.enable_layerwise_casting(compute_dtype=torch.float32))
    fast = compiled(MODELS["flux"](), way)
    apply = functools.partial(apply_layerwise_casting, fast, torch.float8_e4m3fn, torch.float32)
    check_follows(fast, Sampler("flux"), way, lambda: apply(skip_modules_pattern=["norm", "pos_embed"]))


@over(WAYS)
def test_casting_hooks_move_the_weights_and_are_no_graphs(way: dict[str, Any]) -> None:
    """A captured forward would read the weights where they were."""
    model = MODELS["flux"]()
    model.enable_layerwise_casting(compute_dtype=torch.float32)
    fast = captured(model, way)
    with pytest.raises(CaptureFailed, match=r"weights where they are, got one that moved some"):
        Sampler("flux").run(fast)
    fast = compiled(model, way)  # auto, as if on CUDA
    fast._engine._captured = lambda plan: plan.capture(Emulator()) or plan
    with pytest.warns(UserWarning, match="runs its eager backend, not cudagraph: expected a forward that leaves"):
        check(fast, Sampler("flux"), way)
    check(fast, Sampler("flux"), way)
