"""What may become of a model at level branches between runs: adapters, packed weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from torch import nn

import harmonica_rt as hrt
from bench.module_reuse import ModuleReuse
from tests.conftest import assert_close, relative_error
from tests.emulator import Emulator
from tests.pairings.made import MODELS, STEPS, Sampler
from tests.pairings.test_quantised import Packed4bit, gguf_linear, replace_linears


def wanted(model: nn.Module, schedule: hrt.Schedule, sampler: Sampler) -> list[torch.Tensor]:
    reuse = ModuleReuse(model, schedule)
    try:
        return sampler.run(reuse)
    finally:
        reuse.remove()


def compiled(model: nn.Module, backend: str) -> nn.Module:
    fast = hrt.compile(model, hrt.Schedule.uniform(model, STEPS, 2, level="branches"), backend=backend)
    fast._recorder = lambda device: Emulator()
    return fast


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "scale": lambda model: model.set_adapters(["one"], [0.3]),
    "other": lambda model: model.set_adapter("two"),
    "disabled": lambda model: model.disable_adapters(),
    "fused": lambda model: model.fuse_lora(lora_scale=2.0),
}


@pytest.mark.parametrize("backend", ["eager", "cudagraph"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_adapters_is_followed(change: Callable[[nn.Module], object], backend: str) -> None:
    """A graph has baked in a LoRA's scale, and whether it runs at all."""
    if backend == "cudagraph":
        pytest.importorskip("triton")
    model, sampler = MODELS["flux"](), Sampler("flux")
    for name in ("one", "two"):
        targets = ["to_q", "add_v_proj", "proj_mlp", "norm1.linear"]
        model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False), name)
    model.set_adapters(["one"], [1.0])
    fast = compiled(model.eval(), backend)
    before = sampler.run(fast)
    plans = [*fast._plans.values()]
    assert_close(sampler.run(fast), before, 1e-5)
    assert [*fast._plans.values()] == plans, "nothing is made anew while nothing changes"
    change(fast)
    after = sampler.run(fast)
    assert_close(after, wanted(model, fast.schedule, sampler), 2e-5)
    assert relative_error(after[0], before[0]) > 1e-3


@pytest.mark.parametrize("make", [gguf_linear, Packed4bit], ids=["gguf", "4 bits"])
def test_packed_weights_run_in_the_models_own_calls(make: Callable[[nn.Linear], nn.Module]) -> None:
    model, sampler = MODELS["flux"](), Sampler("flux")
    replace_linears(model, make)
    fast = compiled(model, "eager")
    assert_close(sampler.run(fast), wanted(model, fast.schedule, sampler), 2e-5)
