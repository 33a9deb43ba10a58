"""LTX-Video at level branches: rms norms, text read by every block, all branches the model's own calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import harmonica_rt as hrt
from bench.module_reuse import ModuleReuse
from harmonica_rt.layout import shape_of_entries
from harmonica_rt.models import UnsupportedModelError, adapt, layout_of
from tests.conftest import BACKENDS, assert_close, relative_error
from tests.emulator import Emulator
from tests.pipelines.made import MADE

STEPS = 6
TIMES = torch.linspace(1000, 130, STEPS)
WIDTH = 16
CONFIG = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3}
CONFIG |= {"cross_attention_dim": WIDTH, "caption_channels": 6}
SCALE = (0.32, 32, 32)  # the pipeline's, at 25 frames a second


def make_ltx(seed: int = 0, **config: Any) -> LTXVideoTransformer3DModel:
    torch.manual_seed(seed)
    model = LTXVideoTransformer3DModel(**{**CONFIG, **config}).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


class LTXCalls:
    """The calls of one context of a run, as LTXPipeline makes them."""

    def __init__(
        self,
        model: LTXVideoTransformer3DModel,
        batch: int = 2,
        text: int = 3,
        frames: int = 2,
        seed: int = 0,
        masked: bool = True,
    ) -> None:
        config, generator = model.config, torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(model.dtype)

        self.samples = randn(STEPS, batch, frames * 6, config.in_channels)
        kept = torch.arange(text) <= torch.arange(batch)[:, None]  # one token more in each sample
        self.arguments = {
            "encoder_hidden_states": randn(batch, text, config.caption_channels),
            "encoder_attention_mask": kept.long() if masked else None,
            "num_frames": frames,
            "height": 2,
            "width": 3,
            "rope_interpolation_scale": SCALE,
        }

    def call(self, model: Any, step: int) -> Tensor:
        sample = self.samples[step]
        with torch.no_grad():
            return model(hidden_states=sample, timestep=TIMES[step].expand(len(sample)), **self.arguments).sample

    def run(self, model: Any) -> list[Tensor]:
        return [self.call(model, step) for step in range(STEPS)]


def schedule_for(
    model: LTXVideoTransformer3DModel, seed: int, order: int = 1, learned: bool = False, **fields: Any
) -> hrt.Schedule:
    rng, groups = np.random.default_rng(seed), adapt(model).groups
    compute = rng.random((STEPS, *shape_of_entries(groups))) >= 0.5
    compute[0] = True
    schedule = hrt.Schedule(compute, model="LTXVideoTransformer3DModel", groups=groups, order=order, **fields)
    if learned:
        schedule = schedule.replace(weights=schedule.weights * rng.normal(1.0, 0.5, schedule.weights.shape))
    return schedule


def by_module(model: LTXVideoTransformer3DModel, schedule: hrt.Schedule, calls: LTXCalls) -> list[Tensor]:
    reuse = ModuleReuse(model, schedule)
    try:
        return calls.run(reuse)
    finally:
        reuse.remove()


KINDS = {
    "as published": {},
    "norms with weights": {"norm_elementwise_affine": True, "norm_eps": 1e-3},
    "other channels out": {"out_channels": 7},
    "patches": {"patch_size": 2, "patch_size_t": 3},
}
POSITIONS = {
    "scaled": {},
    "coordinates": {"num_frames": None, "height": None, "width": None, "rope_interpolation_scale": None},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_full_run_equals_diffusers(config: dict[str, Any], backend: str) -> None:
    model = make_ltx(**config)
    fast = hrt.compile(model, hrt.Schedule.full(model, STEPS, level="branches"), backend=backend)
    for masked in (True, False):
        calls = LTXCalls(model, masked=masked)
        assert_close(calls.run(fast), calls.run(model), 1e-5)


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_positions_are_the_models_to_the_last_bit(positions: dict[str, Any]) -> None:
    model = make_ltx()
    calls, adapter = LTXCalls(model, frames=3), adapt(model)
    calls.arguments |= positions
    if calls.arguments["num_frames"] is None:
        calls.arguments["video_coords"] = 50 * torch.rand(2, 3, 18)
    names = ("num_frames", "height", "width", "rope_interpolation_scale", "video_coords")
    wanted = model.rope(calls.samples[0], *(calls.arguments.get(name) for name in names))
    times = {"timestep": TIMES[:2], "return_dict": True, "attention_kwargs": None, "video_coords": None}
    read = [adapter.inputs({**times, "hidden_states": sample, **calls.arguments}) for sample in calls.samples[:2]]
    held = adapter.hold(SimpleNamespace(sample=(2, 18, 4), context=3, dtype=torch.float32, device="cpu"))
    adapter.encode(read[0].conditioning, held)
    assert torch.equal(held["cos"], wanted[0]) and torch.equal(held["sin"], wanted[1])
    assert all(a is b for a, b in zip(read[0].conditioning, read[1].conditioning))
    fast = hrt.compile(model, hrt.Schedule.full(model, STEPS, level="branches"), backend="eager")
    assert_close(calls.run(fast), calls.run(model), 1e-5)


def test_the_arguments_of_what_was_read_give_the_same_output() -> None:
    model = make_ltx()
    adapter, names = adapt(model), ("video_coords", "attention_kwargs")
    for masked in (True, False):
        calls = LTXCalls(model, masked=masked)
        wanted = calls.call(model, 0)
        given = dict.fromkeys(names) | calls.arguments | {"hidden_states": calls.samples[0], "timestep": TIMES[:2]}
        calls.arguments = adapter.arguments(adapter.inputs(given | {"return_dict": True}).conditioning)
        assert torch.equal(calls.call(model, 0), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_near_to_float32_as_diffusers(backend: str) -> None:
    model, exact = make_ltx().to(torch.bfloat16), make_ltx()
    exact.load_state_dict(model.state_dict())
    calls, truth = LTXCalls(model), LTXCalls(exact)
    truth.arguments["encoder_hidden_states"] = calls.arguments["encoder_hidden_states"].float()
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
    frames=st.integers(1, 4),
)
def test_random_schedules_equal_reuse_at_module_level(
    seed: int, order: int, learned: bool, batch: int, text: int, frames: int
) -> None:
    model = make_ltx(norm_elementwise_affine=bool(seed % 2))
    calls = LTXCalls(model, batch, text, frames, seed, masked=bool(seed % 3))
    schedule = schedule_for(model, seed, order, learned)
    wanted = by_module(model, schedule, calls)
    fast = hrt.compile(model, schedule, backend="eager")
    assert_close(calls.run(fast), wanted, 2e-5)
    assert_close(calls.run(fast), wanted, 2e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "cudagraph"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_backends_and_weights_per_channel(order: int, backend: str) -> None:
    if backend == "cudagraph":
        pytest.importorskip("triton")
    model = make_ltx()
    schedule, rng = schedule_for(model, order, order, learned=True), np.random.default_rng(order)
    channels = 0.2 * rng.normal(size=(*schedule.weights.shape, WIDTH)).astype(np.float32)
    schedule = schedule.replace(channels=np.where(schedule.weights[..., None] != 0, channels, np.float32(0)))
    fast = hrt.compile(model, schedule, backend=backend)
    fast._recorder = lambda device: Emulator()
    for text in (3, 5):
        calls = LTXCalls(model, text=text)
        wanted = by_module(model, schedule, calls)
        for _ in range(2):
            assert_close(calls.run(fast), wanted, 3e-5)


def test_diffusers_own_pipeline_runs_on_it() -> None:
    made = MADE["ltx"]
    pipe = made.make()
    model, wanted = pipe.transformer, made.call(pipe)
    pipe.transformer = hrt.compile(model, hrt.Schedule.full(model, made.steps, level="branches"), backend="eager")
    for _ in range(2):
        assert_close([made.call(pipe)], [wanted], 1e-5)
    assert len(pipe.transformer._plans) == 1


def test_two_contexts_keep_values_of_their_own() -> None:
    """Two calls a step, with texts of two lengths."""
    model = make_ltx()
    schedule = schedule_for(model, 1)
    cond, uncond = LTXCalls(model, text=5, seed=1), LTXCalls(model, text=2, seed=2, masked=False)
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


def test_rows_of_coming_steps_are_filled_at_once() -> None:
    model = make_ltx()
    schedule = schedule_for(model, 3, timesteps=TIMES.tolist())
    calls, filled = LTXCalls(model), []
    fast = hrt.compile(model, schedule, backend="eager")
    calls.run(fast)
    (plan,) = fast._plans.values()
    modulate = plan.adapter.modulate
    plan.adapter.modulate = lambda t, *rest: (filled.append(len(t)), modulate(t, *rest))
    calls.samples = calls.samples.flip(1)
    calls.arguments["encoder_hidden_states"] = calls.arguments["encoder_hidden_states"].flip(1)
    assert_close(calls.run(fast), by_module(model, schedule, calls), 2e-5)
    assert filled == [STEPS]


def test_macs_are_those_of_the_forward() -> None:
    model = make_ltx()
    calls = LTXCalls(model, batch=2, text=6, frames=4)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        calls.call(model, 0)
    adapter = adapt(model)
    macs = adapter.macs_of(SimpleNamespace(sample=(2, 24, 4), batch=2, context=6))
    assert 2 * (macs.fixed + adapter.by_entry(macs.branches).sum()) == counter.get_total_flops()
    assert adapter.macs(None, None, 1) == adapter.macs(16, 22, 1, 128)
    full = hrt.Schedule.full(model, STEPS, level="branches")
    assert full.speedup(model) == 1.0
    half = hrt.Schedule.uniform(model, STEPS, 2, level="branches")
    assert 1.5 < half.speedup(model) < 2.0
    fast = hrt.compile(model, half, backend="eager")
    calls.run(fast)
    assert 1.5 < fast.report().plans[0].full_macs / fast.report().plans[0].macs < 2.0


def test_lora_layers_stay_in_the_models_own_calls() -> None:
    peft = pytest.importorskip("peft")
    model = make_ltx()
    layers = ["to_q", "to_out.0", "net.2", "proj_in", "linear_1"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    model.eval()
    calls, schedule = LTXCalls(model), schedule_for(model, 4)
    wanted = by_module(model, schedule, calls)
    assert_close(calls.run(hrt.compile(model, schedule, backend="eager")), wanted, 2e-5)


def test_level_branches_is_taken_by_name_alone() -> None:
    model = make_ltx()
    assert layout_of(model).level == "blocks"
    (group,) = layout_of(model, "branches").groups
    assert tuple(group) == ("transformer_blocks", 3, ("attn", "cross_attn", "mlp"))


def test_a_model_with_another_norm_is_refused_by_name() -> None:
    model = make_ltx()
    model.transformer_blocks[1].norm2 = torch.nn.RMSNorm(WIDTH)
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.1\.norm2: expected a plain RMSNorm"):
        adapt(model)


REFUSED = {
    "attention_kwargs": ({"scale": 0.5}, r"attention_kwargs: expected none at level 'branches'.*'blocks'"),
    "timestep": (torch.ones(2, 12), r"timestep: expected a tensor of shape \[2\], got \[2, 12\]"),
    "hidden_states": (torch.ones(2, 12, 5), r"hidden_states: expected a tensor \[batch, tokens, 4\], got \[2, 12, 5\]"),
    "encoder_hidden_states": (torch.ones(1, 3, 6), r"encoder_hidden_states: expected .* \[2, 3, 6\], got \[1, 3, 6\]"),
    "encoder_attention_mask": (torch.ones(2, 1, 3), r"encoder_attention_mask: expected .* \[2, 3\], got \[2, 1, 3\]"),
    "num_frames": (3, r"num_frames, height, width: expected those of 12 tokens, .* got \(3, 2, 3\)"),
    "height": (None, r"num_frames, height, width: .* got \(2, None, 3\)"),
    "rope_interpolation_scale": ((torch.ones(2), 32, 32), "rope_interpolation_scale: expected three numbers, got"),
    "video_coords": (torch.ones(2, 12, 3), r"video_coords: expected a tensor of shape \[2, 3, 12\], got \[2, 12, 3\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_it_cannot_express_is_refused_by_name(name: str) -> None:
    model = make_ltx()
    calls, (value, message) = LTXCalls(model), REFUSED[name]
    fast = hrt.compile(model, hrt.Schedule.full(model, STEPS, level="branches"), backend="eager")
    arguments = {"hidden_states": calls.samples[0], "timestep": TIMES[:1].expand(2), **calls.arguments, name: value}
    with pytest.raises(ValueError, match=message):
        fast(**arguments)
