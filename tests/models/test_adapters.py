"""What holds for every adapter of the large models: the same tests of all, by their cases.

DiT and PixArt, whose blocks are fused, have theirs in `test_dit.py` and `test_pixart.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import harmonica_rt as hrt
from bench.by_hand.block_reuse import TrunkReuse
from bench.measure.launches import CountLaunches
from harmonica_rt.branch_engine import BranchRun
from harmonica_rt.models import ADAPTERS, UnsupportedModelError, adapt, layout_of
from tests.conftest import BACKENDS, assert_close, relative_error
from tests.emulator import Emulator
from tests.test_trunk import mixed

from .adapter_cases import STEPS, TIMES, Calls, Case, as_loaded, by_module, each, full
from .test_flux import FLUX
from .test_ltx import LTX
from .test_qwen import QWEN
from .test_sd3 import SD3
from .test_wan import WAN

CASES = {"flux": FLUX, "ltx": LTX, "qwen": QWEN, "sd3": SD3, "wan": WAN}


def of_all(names: Callable[[Case], Any] | None = None, among: Callable[[Case], bool] = lambda case: True) -> Any:
    """Parametrises `case`, and `name` among what `names` has of each."""
    chosen = {adapter: case for adapter, case in CASES.items() if among(case)}
    if names is None:
        return pytest.mark.parametrize("case", chosen.values(), ids=chosen)
    found = list(each(chosen, names))
    return pytest.mark.parametrize(("case", "name"), [f[1:] for f in found], ids=[f[0] for f in found])


@pytest.fixture(params=[*BACKENDS, "cudagraph"])
def any_backend(request: pytest.FixtureRequest) -> str:
    """Graphs are emulated."""
    if request.param == "cudagraph":
        pytest.importorskip("triton")
    return request.param


def compiled(model: torch.nn.Module, schedule: hrt.Schedule, backend: str = "eager") -> Any:
    fast = hrt.compile(model, schedule, backend=backend)
    fast._recorder = lambda device: Emulator()
    return fast


def few(values: tuple[int, ...], backend: str) -> tuple[int, ...]:
    """Of what makes other code the last alone where code is compiled, which takes seconds a piece."""
    return values[-1:] if backend == "inductor" else values


def test_every_adapter_of_calls_has_a_case() -> None:
    assert {case.model.__name__ for case in CASES.values()} == ADAPTERS.keys() - {
        "DiTTransformer2DModel",
        "PixArtTransformer2DModel",
    }


@pytest.mark.parametrize("backend", BACKENDS)
@of_all(lambda case: case.kinds)
def test_a_full_run_equals_diffusers(case: Case, name: str, backend: str) -> None:
    model = case.make(**case.kinds[name])
    fast = compiled(model, full(model), backend)
    for options in case.options:
        calls = Calls(case, model, **options)
        assert_close(calls.run(fast), calls.run(model), 1e-5)


def halves(case: Case) -> list[tuple[str, bool]]:
    """Names of dtypes, and whether a part is kept in float32 as diffusers loads it."""
    loaded = (False, True) if case.model._keep_in_fp32_modules else (False,)
    return [(str(dtype).removeprefix("torch."), part) for dtype in case.dtypes for part in loaded]


@pytest.mark.parametrize("backend", BACKENDS)
@of_all(halves)
def test_half_precision_is_as_near_to_float32_as_diffusers(case: Case, name: tuple[str, bool], backend: str) -> None:
    dtype, part = getattr(torch, name[0]), name[1]
    model, exact = case.make(**case.half), case.make(**case.half)
    model = as_loaded(model, dtype) if part else model.to(dtype)
    exact.load_state_dict(model.state_dict())
    calls = Calls(case, model, dtype=dtype)
    fast = compiled(model, full(model), backend)
    for ours, theirs, right in zip(calls.run(fast), calls.run(model), calls.in_float32().run(exact)):
        assert ours.dtype == theirs.dtype == dtype
        assert relative_error(ours.float(), right) <= 1.5 * relative_error(theirs.float(), right) + 1e-3


@of_all()
@settings(max_examples=25)
@given(
    data=st.data(),
    seed=st.integers(0, 10**6),
    order=st.sampled_from([0, 1, 2]),
    learned=st.booleans(),
    batch=st.integers(1, 3),
    text=st.integers(1, 7),
)
def test_random_schedules_equal_reuse_at_module_level(
    case: Case, data: st.DataObject, seed: int, order: int, learned: bool, batch: int, text: int
) -> None:
    model = case.make(**case.variants[seed % len(case.variants)])
    options = data.draw(st.sampled_from(case.options))
    calls = Calls(case, model, batch, text, data.draw(case.sizes), seed, **options)
    schedule = case.schedule(model, seed, order, learned)
    wanted = by_module(model, schedule, calls)
    fast = compiled(model, schedule)
    assert_close(calls.run(fast), wanted, 2e-5)
    assert_close(calls.run(fast), wanted, 2e-5)


@of_all()
def test_backends_and_weights_per_channel(case: Case, any_backend: str) -> None:
    model = case.make(**case.variants[-1])
    for order in few((0, 1, 2), any_backend):
        schedule, rng = case.schedule(model, order, order, learned=True), np.random.default_rng(order)
        channels = 0.2 * rng.normal(size=(*schedule.weights.shape, case.width)).astype(np.float32)
        schedule = schedule.replace(channels=np.where(schedule.weights[..., None] != 0, channels, np.float32(0)))
        fast = compiled(model, schedule, any_backend)
        for text in few((5, 3), any_backend):
            calls = Calls(case, model, text=text)
            wanted = by_module(model, schedule, calls)
            for _ in range(2):
                assert_close(calls.run(fast), wanted, 3e-5)


@of_all(among=lambda case: case.trunk)
@pytest.mark.parametrize("carry", ["none", "one", "any"])
def test_the_trunk_beside_branches(case: Case, carry: str, any_backend: str) -> None:
    """Its stream is both segments, across all lists."""
    model = case.make(**case.variants[-1])
    for order in few((0, 1, 2), any_backend):
        schedule = mixed(model, 4 + order, STEPS, order, carry, channels=order > 0)
        assert schedule.trunk.any()
        calls = Calls(case, model, text=5 - order)
        reuse = TrunkReuse(model, schedule)
        wanted = calls.run(reuse)
        reuse.remove()
        fast = compiled(model, schedule, any_backend)
        for _ in range(2):
            assert_close(calls.run(fast), wanted, 3e-5)


@of_all()
def test_two_contexts_keep_values_of_their_own(case: Case) -> None:
    """Guidance: two calls a step, with texts of two lengths."""
    model = case.make()
    schedule = case.schedule(model, 1)
    cond = Calls(case, model, text=5, seed=1, **case.options[0])
    uncond = Calls(case, model, text=2, seed=2, **case.options[-1])
    wanted = by_module(model, schedule, cond), by_module(model, schedule, uncond)
    fast = compiled(model, schedule)
    for _ in range(2):
        got: tuple[list[Tensor], list[Tensor]] = ([], [])
        for step in range(STEPS):
            for name, calls, outputs in (("cond", cond, got[0]), ("uncond", uncond, got[1])):
                with fast.cache_context(name):
                    outputs.append(calls.call(fast, step))
        for ours, theirs in zip(got, wanted):
            assert_close(ours, theirs, 2e-5)


@pytest.mark.parametrize("told", ["the model's", "the sampler's"])
@of_all()
def test_rows_of_coming_steps_are_filled_at_once(case: Case, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward may be called with a thousandth of a sampler's timesteps; one's own loop may tell the model's."""
    model = case.make()
    calls, filled = Calls(case, model), []
    own = [calls.arguments(step)["timestep"][0].item() for step in range(STEPS)]
    schedule = case.schedule(model, 3, timesteps=own)
    fast = compiled(model, schedule)
    step = BranchRun.step

    def known(self: BranchRun, i: int, call: Any, timestep: float, known: tuple[float, ...]) -> Any:
        return step(self, i, call, timestep, known if told == "the model's" else tuple(TIMES.tolist()))

    monkeypatch.setattr(BranchRun, "step", known)
    calls.run(fast)
    (plan,) = fast._plans.values()
    modulate = plan.adapter.modulate
    plan.adapter.modulate = lambda t, *rest: (filled.append(len(t)), modulate(t, *rest))
    calls.samples = calls.samples.flip(1)
    calls.given["encoder_hidden_states"] = calls.given["encoder_hidden_states"].flip(1)
    assert_close(calls.run(fast), by_module(model, schedule, calls), 2e-5)
    assert filled == [STEPS]


@of_all(lambda case: case.counted)
def test_macs_are_those_of_the_forward(case: Case, name: str) -> None:
    model = case.make(**case.counted[name])
    calls, half = Calls(case, model, text=6), hrt.Schedule.uniform(model, STEPS, 2, level="branches")
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        calls.call(model, 0)
    fast = compiled(model, half)
    calls.run(fast)
    (plan,), adapter = fast._plans.values(), adapt(model)
    macs = adapter.macs_of(plan.shape)
    branches = adapter.by_entry(macs.branches).sum()
    assert 2 * (macs.fixed + branches) == pytest.approx(counter.get_total_flops(), rel=1e-12)
    report = fast.report().plans[0]
    assert report.full_macs == pytest.approx(STEPS * (macs.fixed + branches), abs=STEPS)  # a mean of layers is rounded
    assert report.macs == pytest.approx(STEPS * (macs.fixed + branches / 2), abs=STEPS)
    assert full(model).speedup(model) == 1.0
    assert case.halved < half.speedup(model) < 2.0


@of_all()
def test_launches_are_those_of_its_parts(case: Case) -> None:
    """A call of the model's own counts as one."""
    model = case.make()
    fast = compiled(model, hrt.Schedule.uniform(model, STEPS, 2, order=0, level="branches"))
    Calls(case, model, batch=case.batch).run(fast)
    assert tuple(fast.report().plans[0].launches[:2]) == case.launches
    (plan,) = fast._plans.values()
    sample = torch.zeros(plan.shape.sample)
    with torch.no_grad(), CountLaunches() as counter:
        x = plan.adapter.embed(sample, plan.buffers.held, plan.buffers.x)
        plan.adapter.finish(x, plan.shape.sample)
    assert counter.count == plan.adapter.end_launches


@of_all()
def test_lora_layers_stay_in_the_models_own_calls(case: Case) -> None:
    peft = pytest.importorskip("peft")
    model = case.make()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=list(case.lora), init_lora_weights=False))
    model.eval()
    calls, schedule = Calls(case, model), case.schedule(model, 4)
    assert_close(calls.run(compiled(model, schedule)), by_module(model, schedule, calls), 2e-5)


@of_all()
def test_level_branches_is_taken_by_name_alone(case: Case) -> None:
    model = case.make()
    assert layout_of(model).level == "blocks"
    assert [tuple(group) for group in layout_of(model, "branches").groups] == case.layout


def read(adapter: Any, calls: Calls, step: int) -> Any:
    parameters = inspect.signature(calls.case.model.forward).parameters.items()
    return adapter.inputs({name: p.default for name, p in parameters if name != "self"} | calls.arguments(step))


@of_all()
def test_the_arguments_of_what_was_read_give_the_same_output(case: Case) -> None:
    model = case.make(**case.variants[-1])
    adapter = adapt(model)
    for options in case.options:
        calls = Calls(case, model, **options)
        wanted = calls.call(model, 0)
        calls.given = adapter.arguments(read(adapter, calls, 0).conditioning)
        assert torch.equal(calls.call(model, 0), wanted)


@of_all()
def test_conditioning_is_the_same_objects_at_every_step(case: Case) -> None:
    """Off the CPU others would have the run encoded anew."""
    model = case.make(**case.variants[-1])
    calls, adapter = Calls(case, model), adapt(model)
    first, second = (read(adapter, calls, step).conditioning for step in range(2))
    assert len(first) == len(second) and all(a is b for a, b in zip(first, second))


@of_all(lambda case: case.refused_models)
def test_a_model_it_cannot_express_is_refused_by_name(case: Case, name: str) -> None:
    make, message = case.refused_models[name]
    with pytest.raises(UnsupportedModelError, match=message):
        adapt(make())


@of_all(lambda case: case.refused_calls)
def test_a_call_it_cannot_express_is_refused_by_name(case: Case, name: str) -> None:
    model = case.make()
    changed, message = case.refused_calls[name]
    with pytest.raises(ValueError, match=message):
        compiled(model, full(model))(**{**Calls(case, model).arguments(0), **changed})
