"""Stable Diffusion 3 at level branches: two segments, of which the last block reads the first and leaves it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import harmonica_rt as hrt
from bench.measure import CountLaunches
from bench.module_reuse import ModuleReuse
from harmonica_rt.models import UnsupportedModelError, adapt, layout_of
from harmonica_rt.models.base import Shape
from tests.conftest import BACKENDS, assert_close, relative_error
from tests.emulator import Emulator

STEPS = 6
TIMES = torch.linspace(1000, 130, STEPS)
WIDTH = 16
CONFIG = {"sample_size": 8, "patch_size": 2, "in_channels": 3, "out_channels": 3, "num_layers": 3}
CONFIG |= {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": WIDTH}
CONFIG |= {"joint_attention_dim": 6, "pooled_projection_dim": 5, "pos_embed_max_size": 8}


def make_sd3(seed: int = 0, **config: Any) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(**{**CONFIG, **config}).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


class SD3Calls:
    """The calls of one context of a run, as StableDiffusion3Pipeline makes them."""

    def __init__(
        self,
        model: SD3Transformer2DModel,
        batch: int = 2,
        text: int = 5,
        size: tuple[int, int] = (8, 6),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config, generator = model.config, torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.samples = randn(STEPS, batch, config.in_channels, *size)
        self.arguments = {
            "encoder_hidden_states": randn(batch, text, config.joint_attention_dim),
            "pooled_projections": randn(batch, config.pooled_projection_dim),
        }

    def call(self, model: Any, step: int) -> Tensor:
        sample = self.samples[step]
        with torch.no_grad():
            return model(hidden_states=sample, timestep=TIMES[step].expand(len(sample)), **self.arguments).sample

    def run(self, model: Any) -> list[Tensor]:
        return [self.call(model, step) for step in range(STEPS)]


def schedule_for(model: SD3Transformer2DModel, seed: int, order: int = 1, learned: bool = False) -> hrt.Schedule:
    rng = np.random.default_rng(seed)
    compute = rng.random((STEPS, len(model.transformer_blocks), 2)) >= 0.5
    compute[0] = True
    schedule = hrt.Schedule(compute, model="SD3Transformer2DModel", groups=adapt(model).groups, order=order)
    if learned:
        schedule = schedule.replace(weights=schedule.weights * rng.normal(1.0, 0.5, schedule.weights.shape))
    return schedule


def by_module(model: SD3Transformer2DModel, schedule: hrt.Schedule, calls: SD3Calls) -> list[Tensor]:
    reuse = ModuleReuse(model, schedule)
    try:
        return calls.run(reuse)
    finally:
        reuse.remove()


KINDS = {"3 medium": {}, "3.5 large": {"qk_norm": "rms_norm"}, "one block": {"num_layers": 1}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_full_run_equals_diffusers(config: dict[str, Any], backend: str) -> None:
    model = make_sd3(**config)
    calls = SD3Calls(model)
    fast = hrt.compile(model, hrt.Schedule.full(model, STEPS, level="branches"), backend=backend)
    assert_close(calls.run(fast), calls.run(model), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_diffusers(dtype: torch.dtype, backend: str) -> None:
    model, exact = make_sd3(qk_norm="rms_norm").to(dtype), make_sd3(qk_norm="rms_norm")
    exact.load_state_dict(model.state_dict())
    calls, truth = SD3Calls(model, dtype=dtype), SD3Calls(exact)
    for name, value in calls.arguments.items():
        truth.arguments[name] = value.float()
    truth.samples = calls.samples.float()
    fast = hrt.compile(model, hrt.Schedule.full(model, STEPS, level="branches"), backend=backend)
    for ours, theirs, right in zip(calls.run(fast), calls.run(model), truth.run(exact)):
        assert ours.dtype == theirs.dtype == dtype
        assert relative_error(ours.float(), right) <= 1.5 * relative_error(theirs.float(), right) + 1e-3


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    order=st.sampled_from([0, 1, 2]),
    learned=st.booleans(),
    batch=st.integers(1, 3),
    text=st.integers(1, 7),
    size=st.tuples(st.sampled_from([2, 8]), st.sampled_from([6, 14])),
)
def test_random_schedules_equal_reuse_at_module_level(
    seed: int, order: int, learned: bool, batch: int, text: int, size: tuple[int, int]
) -> None:
    model = make_sd3()
    calls, schedule = SD3Calls(model, batch, text, size, seed), schedule_for(model, seed, order, learned)
    wanted = by_module(model, schedule, calls)
    fast = hrt.compile(model, schedule, backend="eager")
    assert_close(calls.run(fast), wanted, 2e-5)
    assert_close(calls.run(fast), wanted, 2e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "cudagraph"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_backends_and_weights_per_channel(order: int, backend: str) -> None:
    if backend == "cudagraph":
        pytest.importorskip("triton")
    model = make_sd3()
    schedule, rng = schedule_for(model, order, order, learned=True), np.random.default_rng(order)
    channels = 0.2 * rng.normal(size=(*schedule.weights.shape, WIDTH)).astype(np.float32)
    schedule = schedule.replace(channels=np.where(schedule.weights[..., None] != 0, channels, np.float32(0)))
    fast = hrt.compile(model, schedule, backend=backend)
    fast._recorder = lambda device: Emulator()
    for text in (3, 5):
        calls = SD3Calls(model, text=text)
        wanted = by_module(model, schedule, calls)
        for _ in range(2):
            assert_close(calls.run(fast), wanted, 3e-5)


def test_macs_are_those_of_the_forward() -> None:
    model = make_sd3()
    calls = SD3Calls(model, batch=2, text=6, size=(8, 6))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        calls.call(model, 0)
    adapter = adapt(model)
    macs = adapter.macs_of(Shape((2, 3, 8, 6), torch.float32, torch.device("cpu"), 6))
    counted = 2 * (macs.fixed + adapter.by_entry(macs.branches).sum())
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-12)
    assert hrt.Schedule.full(model, STEPS, level="branches").speedup(model) == 1.0
    assert 1.5 < hrt.Schedule.uniform(model, STEPS, 2, level="branches").speedup(model) < 2.0


def test_launches_are_those_of_its_parts() -> None:
    model = make_sd3()
    fast = hrt.compile(model, hrt.Schedule.full(model, STEPS, level="branches"), backend="eager")
    SD3Calls(model).run(fast)
    (plan,) = fast._plans.values()
    norm, call, term = 2 + 1, 1 + 2, 2  # a segment each, but for the head's norm and what the last block gives
    assert fast.report().plans[0].launches[0] == 8 + 3 * 2 * (norm + call + term) - (1 + 1 + 1) + norm - 1
    sample = torch.zeros(plan.shape.sample)
    with torch.no_grad(), CountLaunches() as counter:
        x = plan.adapter.embed(sample, plan.buffers.held, plan.buffers.x)
        plan.adapter.finish(x, plan.shape.sample)
    assert counter.count == plan.adapter.end_launches


def test_lora_layers_stay_in_the_models_own_calls() -> None:
    peft = pytest.importorskip("peft")
    model = make_sd3()
    targets = ["to_q", "add_k_proj", "to_out.0", "net.2", "norm1.linear"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.eval()
    calls, schedule = SD3Calls(model), schedule_for(model, 4)
    wanted = by_module(model, schedule, calls)
    assert_close(calls.run(hrt.compile(model, schedule, backend="eager")), wanted, 2e-5)


def test_level_branches_is_taken_by_name_alone() -> None:
    model = make_sd3()
    assert layout_of(model).level == "blocks"
    (group,) = layout_of(model, "branches").groups
    assert tuple(group) == ("transformer_blocks", 3, ("attn", "mlp"))


def test_what_it_cannot_express_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.1: expected one attention, got two of one"):
        adapt(make_sd3(dual_attention_layers=(1,)))
    model = make_sd3()
    fast = hrt.compile(model, hrt.Schedule.full(model, STEPS, level="branches"), backend="eager")
    calls = SD3Calls(model)
    given = {"hidden_states": calls.samples[0], "timestep": TIMES[0].expand(2), **calls.arguments}
    for pattern, changed in (
        (r"skip_layers: expected none at level 'branches'.*'blocks'", {"skip_layers": [1]}),
        (r"block_controlnet_hidden_states: expected none", {"block_controlnet_hidden_states": [torch.ones(2, 12, 16)]}),
        (r"encoder_hidden_states: expected a tensor \[2, tokens, 6\]", {"encoder_hidden_states": torch.ones(1, 5, 6)}),
        (r"pooled_projections: expected a tensor of shape \[2, 5\]", {"pooled_projections": torch.ones(2, 4)}),
        (r"multiples of the patch, 2, got 8x5", {"hidden_states": calls.samples[0][..., :5]}),
    ):
        with pytest.raises(ValueError, match=pattern):
            fast(**{**given, **changed})
