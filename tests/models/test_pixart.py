"""The PixArt adapter against module-level reuse on diffusers' own model; what it refuses, reads and counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import harmonica_rt as hrt
from bench.by_hand.module_reuse import ModuleReuse
from harmonica_rt.models import adapt

from ..conftest import BACKENDS, TextCalls, assert_close, make_pixart, needs_compiler, random_schedule

MASKS = ("none", "mask", "bool mask", "bias")
BRANCHES = ("attn", "cross_attn", "mlp")


def schedule_for(seed: int, steps: int, layers: int, order: int = 1, reuse: float = 0.5, learned: bool = False):
    return random_schedule(seed, steps, layers, order, reuse, learned, model="PixArtTransformer2DModel")


def expected(model: torch.nn.Module, schedule: hrt.Schedule, calls: TextCalls) -> list[torch.Tensor]:
    oracle = ModuleReuse(model, schedule)
    try:
        return calls.run(oracle)
    finally:
        oracle.remove()


@hypothesis_settings(max_examples=40)
@given(
    st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2), st.booleans(), st.integers(1, 4),
    st.sampled_from([0.2, 0.5, 0.8]), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(MASKS),
)  # fmt: skip
def test_eager_equals_module_level_reuse(
    seed: int, steps: int, layers: int, order: int, learned: bool, batch: int, reuse: float, sized: bool, affine: bool,
    captions: bool, mask: str,
) -> None:  # fmt: skip
    model = make_pixart(
        layers,
        seed=seed,
        use_additional_conditions=sized,
        norm_elementwise_affine=affine,
        caption_channels=10 if captions else None,
    )
    schedule = schedule_for(seed, steps, layers, order, reuse, learned)
    calls = TextCalls(model, steps, batch, mask, seed=seed)
    fast = hrt.compile(model, schedule, backend="eager")
    assert_close(calls.run(fast), expected(model, schedule, calls), 1e-4)


@needs_compiler
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_inductor_equals_module_level_reuse(mask: str, sized: bool) -> None:
    model = make_pixart(4, use_additional_conditions=sized)
    calls = TextCalls(model, 7, 2, mask)
    for order, reuse, learned in ((0, 0.3, False), (1, 0.6, True), (2, 0.9, True)):
        schedule = schedule_for(order, 7, 4, order, reuse, learned)
        fast = hrt.compile(model, schedule, backend="inductor")
        assert_close(calls.run(fast), expected(model, schedule, calls), 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_schedule_equals_diffusers(backend: str) -> None:
    model = make_pixart(4)  # as many layers as the other inductor tests: they share what is compiled
    calls = TextCalls(model, 4)
    fast = hrt.compile(model, hrt.Schedule.full(model, 4), backend=backend)
    assert_close(calls.run(fast), calls.run(model), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("only", BRANCHES)
def test_gaps_between_any_two_branches(backend: str, only: str) -> None:
    """Gaps that end in a branch without a norm, with and without terms: one branch kind computed, or all but it."""
    model, calls = make_pixart(4), TextCalls(make_pixart(4), 4)
    compute = np.zeros((4, 4, 3), dtype=bool)
    for computed in (np.array(BRANCHES) == only, np.array(BRANCHES) != only):
        compute[:] = computed
        compute[0] = True
        schedule = schedule_for(0, 4, 4).replace(compute=compute)
        fast = hrt.compile(model, schedule, backend=backend)
        assert_close(calls.run(fast), expected(model, schedule, calls), 1e-4)


def test_text_is_encoded_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_pixart(3)
    calls = TextCalls(model, 5)
    fast = hrt.compile(model, hrt.Schedule.full(model, 5), backend="eager")
    seen: list[str] = []
    linear = torch.nn.functional.linear
    places = {id(block.attn2.to_k.weight): f"k{i}" for i, block in enumerate(model.transformer_blocks)}
    places |= {id(block.attn2.to_v.weight): f"v{i}" for i, block in enumerate(model.transformer_blocks)}
    places[id(model.caption_projection.linear_1.weight)] = "caption"

    def counted(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.extend([places[id(weight)]] if id(weight) in places else [])
        return linear(h, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    for run in (1, 2):
        calls.run(fast)
        assert {name: seen.count(name) for name in places.values()} == dict.fromkeys(places.values(), run)
    calls.run(model)
    assert seen.count("k0") == 2 + 5, "diffusers does it at every step"


def test_text_that_changes_within_a_run_is_followed() -> None:
    model, schedule = make_pixart(3), schedule_for(1, 6, 3)
    calls, other = TextCalls(model, 6), TextCalls(model, 6, seed=7)
    oracle = ModuleReuse(model, schedule)
    wanted = [(calls if step < 3 else other).call(oracle, step).detach() for step in range(6)]
    oracle.remove()
    fast = hrt.compile(model, schedule, backend="eager")
    assert_close([(calls if step < 3 else other).call(fast, step) for step in range(6)], wanted, 1e-4)


def test_another_prompt_length_gets_a_plan_of_its_own() -> None:
    model, schedule = make_pixart(3), schedule_for(1, 4, 3)
    fast = hrt.compile(model, schedule, backend="eager")
    for tokens in (5, 3, 5):
        calls = TextCalls(model, 4, tokens=tokens)
        assert_close(calls.run(fast), expected(model, schedule, calls), 1e-4)
    assert len(fast.report().plans) == 2
    short, long = TextCalls(model, 4, tokens=3), TextCalls(model, 4, tokens=5)
    short.call(fast, 0)
    with pytest.raises(ValueError, match=r"the run under way has .*3 context tokens.*, got .*5 context tokens"):
        long.call(fast, 1)


@pytest.mark.parametrize("first", [1, 3])
def test_a_run_that_enters_midway_computes_what_is_not_cached(first: int) -> None:
    """Image to image: strength below 1."""
    model, calls = make_pixart(3), TextCalls(make_pixart(3), 6)
    schedule = schedule_for(2, 6, 3, reuse=0.7).replace(timesteps=calls.timesteps)
    oracle = ModuleReuse(model, schedule.starting_at(first))
    wanted = calls.run(oracle, first)
    oracle.remove()
    fast = hrt.compile(model, schedule, backend="eager")
    assert_close(calls.run(fast, first), wanted, 1e-4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"encoder_hidden_states": torch.randn(2, 5, 9)},
            r"encoder_hidden_states: expected \[2, tokens, 10\], got \[2",
        ),
        ({"encoder_hidden_states": torch.randn(1, 5, 10)}, r"encoder_hidden_states: expected \[2, tokens, 10\], got"),
        ({"encoder_hidden_states": None}, r"encoder_hidden_states: expected \[2, tokens, 10\], got NoneType"),
        (
            {"encoder_hidden_states": torch.randn(2, 5, 10).half()},
            r"the sample's dtype, torch.float32, got torch.float16",
        ),
        ({"encoder_attention_mask": torch.ones(2, 4)}, r"mask: expected .*\[2, 5\] or \[2, 1, 5\], got \[2, 4\]"),
        ({"encoder_attention_mask": torch.ones(2, 4, 5)}, r"mask: expected .*\[2, 5\] or \[2, 1, 5\], got \[2, 4, 5\]"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask \(of self-attention\): expected None"),
        ({"cross_attention_kwargs": {"scale": 1}}, r"cross_attention_kwargs: expected none, got \['scale'\]"),
        ({"added_cond_kwargs": None}, r"added_cond_kwargs\['resolution'\]: expected .*\[2, 2\], got NoneType"),
        (
            {"added_cond_kwargs": {"resolution": torch.ones(2, 1)}},
            r"\['resolution'\]: expected .*\[2, 2\], got \[2, 1\]",
        ),
    ],
)
def test_bad_input_is_named(change: dict, match: str) -> None:
    model = make_pixart(use_additional_conditions=True)
    calls = TextCalls(model, 2)
    fast = hrt.compile(model, hrt.Schedule.full(model, 2), backend="eager")
    arguments = {**calls.arguments, **change}
    with pytest.raises(ValueError, match=match):
        fast(calls.samples[0], timestep=torch.tensor([9, 9]), **arguments)
    calls.run(fast)  # nothing is lost


def test_other_attention_processors_are_named() -> None:
    model = make_pixart()
    model.transformer_blocks[1].attn2.processor = FusedAttnProcessor2_0()
    with pytest.raises(hrt.UnsupportedModelError, match=r"blocks\.1\.attn2: .*AttnProcessor2_0, got FusedAttn"):
        adapt(model)


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_macs_are_what_diffusers_does(layers: int, sized: bool) -> None:
    model = make_pixart(layers, use_additional_conditions=sized)
    calls = TextCalls(model, 1, batch=3)
    # torch's counter knows no CPU flash attention: the same attention as two batched products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        calls.run(model)
    macs = adapt(model).macs(None, None, 3, context=5)
    assert 2 * (macs.fixed + layers * sum(macs.branches)) == counter.get_total_flops()
