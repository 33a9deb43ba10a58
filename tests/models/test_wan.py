"""Wan at level branches: a clip's tokens, text read by cross-attention, rows in float32 whatever the model's dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
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
WIDTH = 24
CONFIG = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 3, "text_dim": 6}
CONFIG |= {"freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32}
IMAGE = {"image_dim": 5, "added_kv_proj_dim": WIDTH}


def make_wan(seed: int = 0, **config: Any) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**{**CONFIG, **config}).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def as_loaded(model: WanTransformer3DModel, dtype: torch.dtype) -> WanTransformer3DModel:
    """In `dtype`, but for what `from_pretrained` keeps in float32."""
    for name, p in model.named_parameters():
        if not any(part in name.split(".") for part in model._keep_in_fp32_modules):
            p.data = p.data.to(dtype)
    return model


class WanCalls:
    """The calls of one context of a run, as the Wan pipelines make them."""

    def __init__(
        self,
        model: WanTransformer3DModel,
        batch: int = 2,
        text: int = 5,
        size: tuple[int, int, int] = (3, 4, 6),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config, generator = model.config, torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.samples = randn(STEPS, batch, config.in_channels, *size)
        self.arguments = {"encoder_hidden_states": randn(batch, text, config.text_dim)}
        if config.image_dim is not None:  # the model's attention takes the last 512 states for text
            self.arguments["encoder_hidden_states"] = randn(batch, 512, config.text_dim)
            both = 1 if config.pos_embed_seq_len is None else 2
            self.arguments["encoder_hidden_states_image"] = randn(both * batch, 7, config.image_dim)

    def call(self, model: Any, step: int) -> Tensor:
        sample = self.samples[step]
        with torch.no_grad():
            return model(hidden_states=sample, timestep=TIMES[step].expand(len(sample)), **self.arguments).sample

    def run(self, model: Any) -> list[Tensor]:
        return [self.call(model, step) for step in range(STEPS)]


def schedule_for(
    model: WanTransformer3DModel, seed: int, order: int = 1, learned: bool = False, **fields: Any
) -> hrt.Schedule:
    rng, groups = np.random.default_rng(seed), adapt(model).groups
    compute = rng.random((STEPS, len(model.blocks), 3)) >= 0.5
    compute[0] = True
    schedule = hrt.Schedule(compute, model="WanTransformer3DModel", groups=groups, order=order)
    if learned:
        schedule = schedule.replace(weights=schedule.weights * rng.normal(1.0, 0.5, schedule.weights.shape))
    return schedule


def by_module(model: WanTransformer3DModel, schedule: hrt.Schedule, calls: WanCalls) -> list[Tensor]:
    reuse = ModuleReuse(model, schedule)
    try:
        return calls.run(reuse)
    finally:
        reuse.remove()


KINDS = {
    "text to video": {},
    "image to video": IMAGE,
    "first and last frame": IMAGE | {"pos_embed_seq_len": 14},
    "2.2, image to video": {"in_channels": 9},
    "no norm before cross-attention": {"cross_attn_norm": False},
    "patches over frames": {"patch_size": (3, 2, 1)},
    "out_channels left out": {"out_channels": None},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_full_run_equals_diffusers(config: dict[str, Any], backend: str) -> None:
    model = make_wan(**config)
    calls = WanCalls(model)
    fast = hrt.compile(model, hrt.Schedule.full(model, STEPS, level="branches"), backend=backend)
    assert_close(calls.run(fast), calls.run(model), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loaded", [True, False], ids=["some of it kept in float32", "all of it"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_diffusers(dtype: torch.dtype, loaded: bool, backend: str) -> None:
    model, exact = make_wan(**IMAGE), make_wan(**IMAGE)
    model = as_loaded(model, dtype) if loaded else model.to(dtype)
    exact.load_state_dict(model.state_dict())
    calls, truth = WanCalls(model, dtype=dtype), WanCalls(exact)
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
    size=st.tuples(st.integers(1, 4), st.sampled_from([2, 6]), st.sampled_from([2, 4])),
)
def test_random_schedules_equal_reuse_at_module_level(
    seed: int, order: int, learned: bool, batch: int, text: int, size: tuple[int, int, int]
) -> None:
    model = make_wan(cross_attn_norm=bool(seed % 2))
    calls, schedule = WanCalls(model, batch, text, size, seed), schedule_for(model, seed, order, learned)
    wanted = by_module(model, schedule, calls)
    fast = hrt.compile(model, schedule, backend="eager")
    assert_close(calls.run(fast), wanted, 2e-5)
    assert_close(calls.run(fast), wanted, 2e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "cudagraph"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_backends_and_weights_per_channel(order: int, backend: str) -> None:
    if backend == "cudagraph":
        pytest.importorskip("triton")
    model = make_wan()
    schedule, rng = schedule_for(model, order, order, learned=True), np.random.default_rng(order)
    channels = 0.2 * rng.normal(size=(*schedule.weights.shape, WIDTH)).astype(np.float32)
    schedule = schedule.replace(channels=np.where(schedule.weights[..., None] != 0, channels, np.float32(0)))
    fast = hrt.compile(model, schedule, backend=backend)
    fast._recorder = lambda device: Emulator()
    for text in (3, 5):
        calls = WanCalls(model, text=text)
        wanted = by_module(model, schedule, calls)
        for _ in range(2):
            assert_close(calls.run(fast), wanted, 3e-5)


def test_two_contexts_keep_values_of_their_own() -> None:
    """Guidance: two calls a step, with texts of two lengths."""
    model = make_wan()
    schedule = schedule_for(model, 1)
    cond, uncond = WanCalls(model, text=5, seed=1), WanCalls(model, text=2, seed=2)
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


@pytest.mark.parametrize("config", [{}, IMAGE], ids=["text", "text and an image"])
def test_macs_are_those_of_the_forward(config: dict[str, Any]) -> None:
    model = make_wan(**config)
    calls = WanCalls(model, batch=2, text=6)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        calls.call(model, 0)
    adapter, context = adapt(model), 512 + 7 if config else 6
    macs = adapter.macs_of(Shape((2, 4, 3, 4, 6), torch.float32, torch.device("cpu"), context))
    assert 2 * (macs.fixed + adapter.by_entry(macs.branches).sum()) == counter.get_total_flops()
    assert hrt.Schedule.full(model, STEPS, level="branches").speedup(model) == 1.0
    half = hrt.Schedule.uniform(model, STEPS, 2, level="branches")
    assert 1.9 < half.speedup(model) < 2.0
    fast = hrt.compile(model, half, backend="eager")
    calls.run(fast)
    plan = fast.report().plans[0]
    assert plan.full_macs == STEPS * (macs.fixed + adapter.by_entry(macs.branches).sum())
    assert plan.macs < plan.full_macs


def test_launches_are_those_of_its_parts() -> None:
    model = make_wan()
    fast = hrt.compile(model, hrt.Schedule.uniform(model, STEPS, 2, order=0, level="branches"), backend="eager")
    WanCalls(model).run(fast)
    computed, reused = fast.report().plans[0].launches[:2]
    ends, norm, call, term = 4, 2, 2, 1
    assert computed == ends + 3 * 3 * (norm + call + term) + norm
    assert reused == ends + 3 * 3 * term + norm
    (plan,) = fast._plans.values()
    sample = torch.zeros(plan.shape.sample)
    with torch.no_grad(), CountLaunches() as counter:
        x = plan.adapter.embed(sample, out=plan.buffers.x)
        plan.adapter.finish(x, plan.shape.sample)
    assert counter.count == ends


def test_lora_layers_stay_in_the_models_own_calls() -> None:
    peft = pytest.importorskip("peft")
    model = make_wan()
    targets = ["to_q", "to_out.0", "ffn.net.2", "time_proj"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.eval()
    calls, schedule = WanCalls(model), schedule_for(model, 4)
    wanted = by_module(model, schedule, calls)
    assert_close(calls.run(hrt.compile(model, schedule, backend="eager")), wanted, 2e-5)


def test_level_branches_is_taken_by_name_alone() -> None:
    model = make_wan()
    assert layout_of(model).level == "blocks"
    (group,) = layout_of(model, "branches").groups
    assert tuple(group) == ("blocks", 3, ("attn", "cross_attn", "ffn"))


def test_only_what_diffusers_keeps_in_float32_may_be_of_another_dtype() -> None:
    model = as_loaded(make_wan(), torch.bfloat16)
    full = hrt.Schedule.full(model, STEPS, level="branches")
    hrt.compile(model, full, backend="eager")
    model.proj_out.float()
    with pytest.raises(ValueError, match=r"expected parameters of one dtype on one device.*bfloat16.*float32"):
        hrt.compile(model, full, backend="eager")
    model = as_loaded(make_wan(), torch.bfloat16)
    model.blocks[1].norm2.half()
    with pytest.raises(ValueError, match=r"expected parameters of one dtype on one device.*bfloat16.*float16"):
        hrt.compile(model, full, backend="eager")
    model = make_wan()
    model.blocks[1].norm2.to("meta")
    with pytest.raises(ValueError, match=r"expected parameters of one dtype on one device.*cpu.*meta"):
        hrt.compile(model, full, backend="eager")


def test_what_it_cannot_express_is_refused_by_name() -> None:
    model = make_wan()
    model.blocks[1].norm3 = torch.nn.LayerNorm(WIDTH, elementwise_affine=False)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.norm3: expected a plain FP32LayerNorm"):
        adapt(model)
    model = make_wan()
    fast = hrt.compile(model, hrt.Schedule.full(model, STEPS, level="branches"), backend="eager")
    calls = WanCalls(model)
    sample, given = calls.samples[0], calls.arguments
    time = TIMES[0].expand(2)

    def refused(pattern: str, sample: Tensor = sample, timestep: Tensor = time, **more: Any) -> None:
        with pytest.raises(ValueError, match=pattern):
            fast(hidden_states=sample, timestep=timestep, **{**given, **more})

    refused(r"timestep: expected one a sample, \[2\].*got one a token, \[2, 18\].*'blocks'", timestep=torch.ones(2, 18))
    refused(r"timestep: expected a tensor of shape \[2\]", timestep=torch.ones(3))
    refused(r"attention_kwargs: expected none at level 'branches'.*'blocks'", attention_kwargs={"scale": 0.5})
    refused(r"hidden_states: expected \[batch, 4, frames, height, width\], got \[2, 4, 4, 6\]", sample=sample[:, :, 0])
    refused(r"multiples of the patch, \(1, 2, 2\), got \(3, 4, 5\)", sample=sample[..., :5])
    refused("encoder_hidden_states_image: expected None", encoder_hidden_states_image=torch.ones(2, 7, 5))
    refused(r"encoder_hidden_states: expected a tensor \[2, tokens, 6\]", encoder_hidden_states=torch.ones(1, 5, 6))
