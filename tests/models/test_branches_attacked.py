"""Level branches of the models whose blocks are called: changes between runs, and calls that no model takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel, SD3Transformer2DModel, WanTransformer3DModel
from peft import LoraConfig
from torch import nn

import harmonica_rt as hrt
from bench.by_hand.module_reuse import ModuleReuse
from tests.conftest import BACKENDS, assert_close, relative_error
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


@pytest.mark.parametrize("backend", [*BACKENDS, "cudagraph"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_adapters_is_followed(change: Callable[[nn.Module], object], backend: str) -> None:
    """A graph and a compiled call have baked in a LoRA's scale, and whether it runs at all."""
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [gguf_linear, Packed4bit], ids=["gguf", "4 bits"])
def test_packed_weights_run_in_the_models_own_calls(make: Callable[[nn.Linear], nn.Module], backend: str) -> None:
    model, sampler = MODELS["flux"](), Sampler("flux")
    replace_linears(model, make)
    fast = compiled(model, backend)
    assert_close(sampler.run(fast), wanted(model, fast.schedule, sampler), 2e-5)


TEXT = {"encoder_hidden_states": torch.zeros(2, 5, 8)}
POOLED = {"pooled_projections": torch.zeros(2, 6)}
GRID = {"encoder_attention_mask": None, "num_frames": 1, "height": 4, "width": 4, "rope_interpolation_scale": (1, 1, 1)}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
CALLS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "flux": (
        MODELS["flux"],
        {"hidden_states": torch.zeros(2, 16, 4), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
        | TEXT
        | POOLED,
    ),
    "sd3": (
        lambda: SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=8, caption_projection_dim=32, pooled_projection_dim=6, pos_embed_max_size=8,
        ),
        {"hidden_states": torch.zeros(2, 4, 8, 8), **TEXT, **POOLED},
    ),
    "wan": (
        lambda: WanTransformer3DModel(
            in_channels=4, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=16, **HEADS
        ),
        {"hidden_states": torch.zeros(2, 4, 1, 4, 4), **TEXT},
    ),
    "ltx": (
        lambda: LTXVideoTransformer3DModel(
            in_channels=4, cross_attention_dim=32, num_layers=2, caption_channels=8, **HEADS
        ),
        {"hidden_states": torch.zeros(2, 16, 4), **TEXT, **GRID},
    ),
}  # fmt: skip


def call(name: str, **changes: Any) -> None:
    make, arguments = CALLS[name]
    fast = compiled(make().eval(), "eager")
    with torch.no_grad():
        fast(**{"timestep": torch.full((2,), 500.0), **arguments, **changes})


@pytest.mark.parametrize("name", CALLS)
def test_another_dtype_than_the_samples_is_refused_by_name(name: str) -> None:
    call(name)
    for given in CALLS[name][1].keys() & {"encoder_hidden_states", "pooled_projections"}:
        for dtype in (torch.float64, torch.bfloat16, torch.long):
            with pytest.raises(ValueError, match=f"hidden_states, {given}: expected one dtype, got torch.float32 and"):
                call(name, **{given: CALLS[name][1][given].to(dtype)})


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_a_timestep_a_token_is_refused_with_the_level_that_takes_it(name: str) -> None:
    with pytest.raises(ValueError, match=r"timestep: expected .*\[2\].*\[2, 16\].*level 'blocks' takes it"):
        call(name, timestep=torch.full((2, 16), 500.0))


def test_a_clip_beyond_wans_positions_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"at most 16 patches a side \(rope_max_seq_len\), got \(17, 2, 2\)"):
        call("wan", hidden_states=torch.zeros(2, 4, 17, 4, 4))


def test_a_trunk_beside_branches_needs_the_level_by_name() -> None:
    with pytest.raises(ValueError, match="level='branches' has a trunk beside its branches"):
        hrt.Schedule.uniform(MODELS["flux"](), 4, trunk=True)
