"""Flux at level branches: joint attention over [text, image] segments, by the model's own calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import harmonica_rt as hrt
from bench.block_reuse import TrunkReuse
from bench.module_reuse import ModuleReuse
from harmonica_rt.branch_engine import BranchRun
from harmonica_rt.layout import count_entries
from harmonica_rt.models import UnsupportedModelError, adapt, layout_of
from tests.conftest import BACKENDS, assert_close, relative_error
from tests.emulator import Emulator
from tests.test_trunk import mixed

STEPS = 6
TIMES = torch.linspace(1000, 130, STEPS)  # a sampler's
CONFIG = {"patch_size": 1, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8}
CONFIG |= {"num_attention_heads": 2, "joint_attention_dim": 6, "pooled_projection_dim": 5, "axes_dims_rope": (2, 2, 4)}


def make_flux(seed: int = 0, **config: Any) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(**{**CONFIG, **config}).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


class FluxCalls:
    """The calls of one context of a run, as FluxPipeline makes them."""

    def __init__(
        self, model: FluxTransformer2DModel, batch: int = 2, text: int = 3, rows: int = 3, seed: int = 0
    ) -> None:
        config, tokens, generator = model.config, 4 * rows, torch.Generator().manual_seed(seed)
        on = {"dtype": model.dtype}

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(**on)

        self.samples = randn(STEPS, batch, tokens, config.in_channels)
        image_ids = torch.zeros(tokens, 3)
        image_ids[:, 1], image_ids[:, 2] = torch.arange(tokens) // 4, torch.arange(tokens) % 4
        self.arguments = {
            "encoder_hidden_states": randn(batch, text, config.joint_attention_dim),
            "pooled_projections": randn(batch, config.pooled_projection_dim),
            "img_ids": image_ids,
            "txt_ids": torch.zeros(text, 3),
        }
        if config.guidance_embeds:
            self.arguments["guidance"] = torch.full((batch,), 3.5, **on)

    def call(self, model: Any, step: int) -> Tensor:
        sample = self.samples[step]
        time = TIMES[step].expand(len(sample)).to(sample.dtype) / 1000
        with torch.no_grad():
            return model(hidden_states=sample, timestep=time, **self.arguments).sample

    def run(self, model: Any) -> list[Tensor]:
        return [self.call(model, step) for step in range(STEPS)]


def schedule_for(
    model: FluxTransformer2DModel, seed: int, order: int = 1, learned: bool = False, **fields: Any
) -> hrt.Schedule:
    rng, groups = np.random.default_rng(seed), adapt(model).groups
    compute = rng.random((STEPS, count_entries(groups))) >= 0.5
    compute[0] = True
    schedule = hrt.Schedule(compute, model="FluxTransformer2DModel", groups=groups, order=order)
    if learned:
        schedule = schedule.replace(weights=schedule.weights * rng.normal(1.0, 0.5, schedule.weights.shape))
    return schedule


def by_module(model: FluxTransformer2DModel, schedule: hrt.Schedule, calls: FluxCalls) -> list[Tensor]:
    reuse = ModuleReuse(model, schedule)
    try:
        return calls.run(reuse)
    finally:
        reuse.remove()


KINDS = {
    "schnell": {},
    "dev": {"guidance_embeds": True},
    "single blocks alone": {"num_layers": 0},
    "joint blocks alone": {"num_single_layers": 0},
    "Fill": {"in_channels": 12, "out_channels": 8},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_full_run_equals_diffusers(config: dict[str, Any], backend: str) -> None:
    model = make_flux(**config)
    calls = FluxCalls(model)
    fast = hrt.compile(model, hrt.Schedule.full(model, STEPS, level="branches"), backend=backend)
    assert_close(calls.run(fast), calls.run(model), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_near_to_float32_as_diffusers(backend: str) -> None:
    model, exact = make_flux(guidance_embeds=True), make_flux(guidance_embeds=True)
    model.to(torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    calls, truth = FluxCalls(model), FluxCalls(exact)
    for name, value in calls.arguments.items():
        truth.arguments[name] = value.float()
    truth.samples = calls.samples.float()
    fast = hrt.compile(model, hrt.Schedule.full(model, STEPS, level="branches"), backend=backend)
    for ours, theirs, right in zip(calls.run(fast), calls.run(model), truth.run(exact)):
        assert relative_error(ours.float(), right) <= 1.5 * relative_error(theirs.float(), right) + 1e-3


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    order=st.sampled_from([0, 1, 2]),
    learned=st.booleans(),
    batch=st.integers(1, 3),
    text=st.integers(1, 7),
    rows=st.integers(1, 4),
)
def test_random_schedules_equal_reuse_at_module_level(
    seed: int, order: int, learned: bool, batch: int, text: int, rows: int
) -> None:
    model = make_flux(guidance_embeds=bool(seed % 2))
    calls, schedule = FluxCalls(model, batch, text, rows, seed), schedule_for(model, seed, order, learned)
    wanted = by_module(model, schedule, calls)
    fast = hrt.compile(model, schedule, backend="eager")
    assert_close(calls.run(fast), wanted, 2e-5)
    assert_close(calls.run(fast), wanted, 2e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "cudagraph"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_backends_and_weights_per_channel(order: int, backend: str) -> None:
    if backend == "cudagraph":
        pytest.importorskip("triton")
    model = make_flux(guidance_embeds=True)
    schedule, rng = schedule_for(model, order, order, learned=True), np.random.default_rng(order)
    channels = 0.2 * rng.normal(size=(*schedule.weights.shape, 16)).astype(np.float32)
    schedule = schedule.replace(channels=np.where(schedule.weights[..., None] != 0, channels, np.float32(0)))
    fast = hrt.compile(model, schedule, backend=backend)
    fast._recorder = lambda device: Emulator()
    for text in (3, 5):
        calls = FluxCalls(model, text=text)
        wanted = by_module(model, schedule, calls)
        for _ in range(2):
            assert_close(calls.run(fast), wanted, 3e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "cudagraph"])
@pytest.mark.parametrize("carry", ["none", "one", "any"])
def test_the_trunk_beside_branches(carry: str, backend: str) -> None:
    """Its stream is both segments, across both lists."""
    if backend == "cudagraph":
        pytest.importorskip("triton")
    model = make_flux(guidance_embeds=True)
    for order in range(3):
        schedule = mixed(model, 4 + order, STEPS, order, carry, channels=order == 1)
        assert schedule.trunk.any()
        calls = FluxCalls(model, text=2 + order)
        reuse = TrunkReuse(model, schedule)
        wanted = calls.run(reuse)
        reuse.remove()
        fast = hrt.compile(model, schedule, backend=backend)
        fast._recorder = lambda device: Emulator()
        for _ in range(2):
            assert_close(calls.run(fast), wanted, 3e-5)


def test_two_contexts_keep_values_of_their_own() -> None:
    """True CFG: two calls a step, with texts of two lengths."""
    model = make_flux()
    schedule = schedule_for(model, 1)
    cond, uncond = FluxCalls(model, text=5, seed=1), FluxCalls(model, text=2, seed=2)
    wanted = by_module(model, schedule, cond), by_module(model, schedule, uncond)
    fast = hrt.compile(model, schedule, backend="eager")
    for _ in range(2):
        got: tuple[list[Tensor], list[Tensor]] = ([], [])
        for step in range(STEPS):
            for name, calls, outputs in (("cond", cond, got[0]), ("uncond", uncond, got[1])):
                with fast.cache_context(name):
                    outputs.append(calls.call(fast, step))
        for ours, theirs in zip(got, wanted):
            assert_close(ours, theirs, 2e-5)


@pytest.mark.parametrize("scale", [1, 1000])
def test_rows_of_coming_steps_are_filled_at_once(scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is called with a thousandth of a sampler's timesteps; a loop of one's own may tell the model's."""
    model = make_flux()
    schedule = schedule_for(model, 3).replace(timesteps=(TIMES / 1000).tolist())
    calls, filled = FluxCalls(model), []
    fast = hrt.compile(model, schedule, backend="eager")
    step = BranchRun.step

    def told(self: BranchRun, i: int, call: Any, timestep: float, known: tuple[float, ...]) -> Any:
        return step(self, i, call, timestep, tuple(TIMES.tolist()) if scale == 1000 else known)

    monkeypatch.setattr(BranchRun, "step", told)
    calls.run(fast)
    (plan,) = fast._plans.values()
    modulate = plan.adapter.modulate
    plan.adapter.modulate = lambda t, *rest: (filled.append(len(t)), modulate(t, *rest))
    wanted = by_module(model, schedule, calls)
    assert_close(calls.run(fast), wanted, 2e-5)
    assert filled == [STEPS]


def test_macs_are_those_of_the_forward() -> None:
    model = make_flux(guidance_embeds=True)
    calls = FluxCalls(model, batch=1, text=6, rows=4)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        calls.call(model, 0)
    adapter = adapt(model)
    macs = adapter.macs_of(SimpleNamespace(sample=(1, 16, 8), batch=1, context=6))
    assert 2 * (macs.fixed + adapter.by_entry(macs.branches).sum()) == counter.get_total_flops()
    full = hrt.Schedule.full(model, STEPS, level="branches")
    assert full.speedup(model) == 1.0
    half = hrt.Schedule.uniform(model, STEPS, 2, level="branches")
    assert 1.5 < half.speedup(model) < 2.0
    fast = hrt.compile(model, half, backend="eager")
    calls.run(fast)
    assert 1.5 < fast.report().plans[0].full_macs / fast.report().plans[0].macs < 2.0


def test_lora_layers_stay_in_the_models_own_calls() -> None:
    peft = pytest.importorskip("peft")
    model = make_flux()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0", "proj_mlp"], init_lora_weights=False))
    model.eval()
    calls, schedule = FluxCalls(model), schedule_for(model, 4)
    wanted = by_module(model, schedule, calls)
    assert_close(calls.run(hrt.compile(model, schedule, backend="eager")), wanted, 2e-5)


def test_level_branches_is_taken_by_name_alone() -> None:
    model = make_flux()
    assert layout_of(model).level == "blocks"
    assert [tuple(group) for group in layout_of(model, "branches").groups] == [
        ("transformer_blocks", 2, ("attn", "mlp")),
        ("single_transformer_blocks", 2, ("block",)),
    ]


def test_what_it_cannot_express_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="got float16"):
        adapt(make_flux().half())
    model = make_flux()
    calls = FluxCalls(model)
    fast = hrt.compile(model, hrt.Schedule.full(model, STEPS, level="branches"), backend="eager")
    calls.arguments["controlnet_block_samples"] = [torch.zeros(2, 12, 16)]
    with pytest.raises(ValueError, match=r"controlnet_block_samples: expected none at level 'branches'.*'blocks'"):
        calls.call(fast, 0)
    del calls.arguments["controlnet_block_samples"]
    calls.arguments["guidance"] = torch.ones(2)
    with pytest.raises(ValueError, match="guidance: expected None"):
        calls.call(fast, 0)
    del calls.arguments["guidance"]
    calls.arguments["txt_ids"] = torch.zeros(9, 3)
    with pytest.raises(ValueError, match=r"txt_ids: expected a tensor of shape \[3, 3\]"):
        calls.call(fast, 0)


def test_launches_count_a_call_of_the_models_own_as_one() -> None:
    model = make_flux()
    fast = hrt.compile(model, hrt.Schedule.uniform(model, STEPS, 2, order=0, level="branches"), backend="eager")
    FluxCalls(model).run(fast)
    computed, reused = fast.report().plans[0].launches[:2]
    ends, head = 3, 3  # the head's norm has rows alike for both segments, but a term of a pair of gates is two launches
    joint = 2 * (1 + 2)  # two calls, each copied a segment
    joint_gaps = 2 * (2 + 1) + 2 * 2  # norms over both segments, terms over both
    single = 1 + 1 + 2 + 1
    assert computed == ends + 2 * (joint + joint_gaps) + 2 * single + head - 1
    assert reused == ends + 2 * 4 + 2 + head - 1
