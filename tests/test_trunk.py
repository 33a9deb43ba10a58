"""The trunk as an entry beside branches: schedule, files, lowering and every backend, against reuse by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import harmonica_rt as hrt
from bench.by_hand.block_reuse import TrunkReuse
from bench.measure.launches import CountLaunches
from bench.models.reference import load_pipeline
from bench.models.schedule_specs import parse_schedule
from harmonica_rt.forecast import history
from harmonica_rt.lowering import lower
from harmonica_rt.program import STREAM, Step

from .conftest import BACKENDS, Calls, TextCalls, assert_close, make_dit, make_pixart, relative_error
from .emulator import Emulator

MAKERS: dict[str, Callable[..., nn.Module]] = {"dit": make_dit, "pixart": make_pixart}
WIDTH = {"DiTTransformer2DModel": 16, "FluxTransformer2DModel": 16, "PixArtTransformer2DModel": 24}
WIDTH |= {"QwenImageTransformer2DModel": 16}


def calls_for(model: nn.Module, steps: int, **options: Any) -> Any:
    return Calls(steps, **options) if "DiT" in type(model).__name__ else TextCalls(model, steps, **options)


def mixed(
    model: nn.Module, seed: int = 0, steps: int = 8, order: int = 1, carry: str = "any", channels: bool = False
) -> hrt.Schedule:
    """Branches, the trunk and the output reused at random, with random weights."""
    rng = np.random.default_rng(seed)
    plain = hrt.Schedule.full(model, steps, level="branches", trunk=True, order=order)
    output, trunk = rng.random((2, steps)) < [[0.15], [0.4]]
    output[0] = trunk[0] = False
    compute = rng.random(plain.compute.shape) < 0.6
    compute[:, -1] = True
    compute[output] = False
    compute[trunk] = False
    compute[0] = True
    schedule = plain.replace(compute=compute, output=output)
    reused = ~compute & ~schedule.left_alone
    carries = {"none": 0.0, "one": 1.0, "any": rng.normal(0.5, 0.5, steps)}[carry]
    fields: dict[str, Any] = {"carry": np.zeros(compute.shape)}
    fields["carry"][:, -1] = np.where(schedule.trunk, carries, 0.0)
    if carry != "one":  # with the forecast's, terms of weight 1
        fields["weights"] = schedule.weights * rng.normal(1.0, 0.3, schedule.weights.shape)
        fields["output_weights"] = schedule.output_weights
    if channels:
        exists = np.concatenate([history(compute, order) >= 0, np.zeros((*compute.shape, 1), bool)], -1)
        exists[:, -1, -1] = carry != "none"
        exists &= reused[..., None]
        exists &= rng.random(compute.shape)[..., None] < 0.8
        fields["channels"] = rng.normal(0, 0.2, (*exists.shape, WIDTH[schedule.model])) * exists[..., None]
    return schedule.replace(**fields)


def expected(model: nn.Module, schedule: hrt.Schedule, calls: Any) -> list[torch.Tensor]:
    oracle = TrunkReuse(model, schedule)
    try:
        outputs = calls.run(oracle)
        reused = ~schedule.compute & ~schedule.left_alone
        assert (oracle.computed, oracle.reused) == (schedule.compute.sum(), reused.sum())
        assert oracle.outputs_reused == schedule.output.sum()
    finally:
        oracle.remove()
    return outputs


def doubled(calls: Any) -> Any:
    """The same calls in float64."""
    twin = copy.copy(calls)
    twin.samples = calls.samples.double()
    if isinstance(calls, TextCalls):
        floats = {k: v for k, v in calls.arguments.items() if torch.is_tensor(v) and v.is_floating_point()}
        twin.arguments = calls.arguments | {k: v.double() for k, v in floats.items()}
    return twin


def errors(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [relative_error(a, e) for a, e in zip(actual, exact, strict=True)]


@hypothesis_settings(max_examples=60)
@given(
    st.integers(0, 2**16), st.sampled_from(list(MAKERS)), st.integers(2, 9), st.integers(1, 4), st.integers(0, 2),
    st.sampled_from(["none", "one", "any"]), st.booleans(), st.integers(1, 3),
)  # fmt: skip
def test_any_schedule_equals_the_oracle(
    seed: int, kind: str, steps: int, layers: int, order: int, carry: str, channels: bool, batch: int
) -> None:
    """To 1e-5 of the oracle in float64, where reuse by hand in float32 is itself that close to it."""
    model = MAKERS[kind](layers, seed=seed)
    schedule = mixed(model, seed, steps, order, carry, channels)
    calls = calls_for(model, steps, batch=batch, seed=seed)
    fast = hrt.compile(model, schedule, backend="eager")
    by_hand = expected(model, schedule, calls)
    exact = expected(copy.deepcopy(model).double(), schedule, doubled(calls))
    allowed = [max(1e-5, 3 * rounding) for rounding in errors(by_hand, exact)]
    for _ in range(2):
        for step, (error, most) in enumerate(zip(errors(calls.run(fast), exact), allowed)):
            assert error <= most, f"step {step}: relative error {error:.2e} above {most:.2e}"


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("carry", ["none", "one", "any"])
def test_inductor_equals_the_oracle(kind: str, carry: str, backend: str) -> None:
    model = MAKERS[kind]()
    for order in range(3):
        schedule = mixed(model, order, order=order, carry=carry, channels=order == 1)
        calls = calls_for(model, 8)
        fast, wanted = hrt.compile(model, schedule, backend=backend), expected(model, schedule, calls)
        for _ in range(2):
            assert_close(calls.run(fast), wanted, 2e-5)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("carry", ["none", "one", "any"])
def test_captured_steps_equal_the_oracle(kind: str, carry: str) -> None:
    pytest.importorskip("triton")
    model = MAKERS[kind]()
    for order in range(3):
        schedule = mixed(model, order, order=order, carry=carry, channels=order == 1)
        fast, calls = hrt.compile(model, schedule, backend="cudagraph"), calls_for(model, 8)
        fast._recorder = Emulator
        wanted = expected(model, schedule, calls)
        for _ in range(2):
            assert_close(calls.run(fast), wanted, 2e-5)
        assert fast.report().plans[0].graphs == lower(schedule).distinct_steps


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_run_leaves_nothing_in_what_is_not_read(dit: nn.Module, backend: str) -> None:
    """A step without carry reads neither the sample nor the stream that was, though both be NaN."""
    schedule = hrt.Schedule.uniform(dit, 4, 2, level="branches", trunk=True, timesteps=Calls(4).timesteps)
    fast, calls = hrt.compile(dit, schedule, backend=backend), Calls(4)
    wanted = calls.run(fast)
    calls.samples[1::2] = torch.nan
    (plan,) = fast._plans.values()
    for step in range(4):
        with torch.no_grad():
            assert torch.equal(calls.call(fast, step), wanted[step])
        plan.buffers.x.fill_(torch.nan)


# ---- what it costs


@pytest.mark.parametrize(
    ("order", "carry", "slots"),
    [(0, 0.0, 1), (1, 0.0, 2), (2, 0.0, 3), (0, 0.5, 3), (1, 1.0, 5)],  # with a carry the stream before it now, too
)
def test_slots_are_the_streams_alive(dit: nn.Module, order: int, carry: float, slots: int) -> None:
    schedule = hrt.Schedule.uniform(dit, 12, 3, order, level="branches", trunk=True, carry=carry)
    program = lower(schedule)
    within = 1  # a computed branch's value, until the next Gap
    history = slots - (carry != 0) - (1 + (carry != 0)) + within  # of the computed step, before its own are kept
    assert program.slots == max(slots, history)
    for i, step in enumerate(program.steps):
        assert isinstance(step, Step)
        assert step.embeds == (i % 3 == 0 or carry != 0)
        assert (step.after is not None) == (i % 3 == 0)
        assert (step.before is not None) == (carry != 0)
        assert (step.gaps[0].start == STREAM) == (i % 3 == 0 and carry == 0)
        if i % 3:
            assert step.body == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reused_step_is_the_ends_and_one_gap(dit: nn.Module, backend: str) -> None:
    for carry, order in ((0.0, 0), (0.5, 1)):
        schedule = hrt.Schedule.uniform(dit, 6, 2, order, level="branches", trunk=True, carry=carry)
        fast, calls = hrt.compile(dit, schedule, backend=backend), Calls(6)
        calls.run(fast)
        plan = fast.report().plans[0]
        ends = 4 if carry else 2  # without a carry the sample is not embedded
        terms = 5 if carry else 1  # values of the stream after and before the trunk, and the stream before it now
        gap = {"eager": terms + 2 + (carry != 0), "inductor": 1}[backend]
        assert plan.launches[5] == ends + gap
        assert (plan.computed, plan.reused) == (3 * 7, 3 * 7)
        theory = schedule.speedup(dit, 8, 8)
        assert theory == pytest.approx(plan.full_macs / plan.macs, rel=1e-6)
        assert 1.5 < theory < 2


@pytest.mark.parametrize("carry", ["none", "one", "any"])
def test_launches_are_as_reported(carry: str) -> None:
    model, calls = make_dit(), Calls(8)
    schedule = mixed(model, 1, carry=carry).replace(timesteps=calls.timesteps)
    fast = hrt.compile(model, schedule, backend="eager")
    calls.run(fast)
    (plan,) = fast._plans.values()
    counted = []
    for step in range(8):
        with CountLaunches() as counter, torch.no_grad():
            plan.run(step, calls.samples[step])
        counted.append(counter.count)
    assert tuple(counted) == fast.report().plans[0].launches


def test_theory_is_that_of_one_group_of_blocks(dit: nn.Module) -> None:
    branches = hrt.Schedule.uniform(dit, 7, 3, level="branches", trunk=True)
    assert branches.speedup(dit) == pytest.approx(hrt.Schedule.uniform(dit, 7, 3, level="blocks").speedup(dit))


def test_it_gives_what_one_group_of_blocks_does() -> None:
    for make in MAKERS.values():
        model = make()
        for carry in (0.0, 0.5, 1.0):
            same = {"steps": 6, "every": 2, "carry": carry}
            calls = calls_for(model, 6)
            beside = hrt.Schedule.uniform(model, level="branches", trunk=True, **same)
            alone = hrt.Schedule.uniform(model, level="blocks", **same)
            outputs = [calls.run(hrt.compile(model, each, backend="eager")) for each in (beside, alone)]
            assert_close(*outputs, 1e-5)


# ---- the schedule


def test_a_schedule_that_never_reuses_it_is_the_one_without(dit: nn.Module) -> None:
    plain = hrt.Schedule.uniform(dit, 5, 2)
    compute = np.concatenate([plain.compute.reshape(5, -1), np.ones((5, 1), bool)], 1)
    beside = hrt.Schedule.full(dit, 5, level="branches", trunk=True).replace(compute=compute)
    assert not beside.trunk.any()
    assert lower(beside).steps == lower(plain).steps
    assert beside.speedup(dit) == plain.speedup(dit)


def test_what_uniform_makes(dit: nn.Module) -> None:
    schedule = hrt.Schedule.uniform(dit, 5, 2, trunk=True, carry=0.25)
    assert schedule.groups == (("transformer_blocks", 3, ("attn", "mlp")), ("trunk", 1, ("blocks",)))
    assert schedule.trunk.tolist() == [False, True, False, True, False]
    assert schedule["trunk"].shape == (5, 1, 1)
    assert schedule.carry[:, -1].tolist() == [0, 0.25, 0, 0.25, 0]
    assert not schedule.carry[:, :-1].any()
    assert not schedule.weights[:, :-1].any(), "branches are left alone"
    assert schedule.cur == pytest.approx(2 / 5)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("carry", ["none", "any"])
def test_round_trip(carry: str, channels: bool, tmp_path: Path) -> None:
    model = make_dit()
    schedule = mixed(model, 3, carry=carry, channels=channels)
    assert schedule.trunk.any() and (~schedule.compute[:, :-1] & ~schedule.left_alone[:, :-1]).any()
    path = tmp_path / ("s.safetensors" if channels else "s.json")
    schedule.save(path)
    assert hrt.Schedule.load(path) == schedule
    schedule.plot(tmp_path / "s.png")


def test_a_file_has_rows_of_the_trunk_alone_where_it_is_reused(dit: nn.Module, tmp_path: Path) -> None:
    schedule = hrt.Schedule.uniform(dit, 9, 3, level="branches", trunk=True, carry=0.5)
    channels = np.zeros((*schedule.compute.shape, 3, 16), dtype=np.float32)
    channels[schedule.trunk, -1, 0] = 0.1
    schedule = schedule.replace(channels=channels)
    schedule.save(tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", framework="numpy") as file:
        assert file.get_tensor("channels").shape == (6, 3, 16)
    assert hrt.Schedule.load(tmp_path / "s.safetensors") == schedule


def test_text(dit: nn.Module) -> None:
    text = str(hrt.Schedule.uniform(dit, 4, 2, level="branches", trunk=True, carry=0.5))
    assert "4 steps x 3 transformer_blocks x attn/mlp + trunk, order 1 (forecast, carry 0.5), CUR 50.0 %" in text
    assert "(# compute, . reuse, - trunk reused)" in text
    rows = [line.split() for line in text.splitlines()[-4:]]
    assert rows[2:] == [["2", "###", "###", "#"], ["3", "---", "---", "."]]


@pytest.mark.parametrize("seed", range(6))
def test_another_number_of_steps(seed: int) -> None:
    model = make_dit()
    schedule = mixed(model, seed, steps=10)
    for steps in (4, 10, 15, 30):
        other = schedule.between(steps)
        assert other.steps == steps
        assert not other.compute[other.trunk].any()
        assert other.trunk.sum() == pytest.approx(schedule.trunk.sum() * steps / 10, abs=1.5)
        own = set(schedule.carry[schedule.trunk, -1])
        assert set(other.carry[other.trunk, -1]) <= (own if steps == 10 else {0.0})  # it fits the learned weights
        assert not other.carry[:, :-1].any()
        guided = schedule.replace(guidance_scale=4.5).between(steps)
        assert set(guided.carry[guided.trunk, -1]) <= (own if steps == 10 else {0.5 if schedule.order else 0.0})


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("first", range(1, 8))
def test_entering_midway(kind: str, first: int) -> None:
    model = MAKERS[kind]()
    calls = calls_for(model, 8)
    schedule = mixed(model, 3, channels=True).replace(timesteps=calls.timesteps)
    late = schedule.starting_at(first)
    assert late.compute[0].all()
    part = copy.copy(calls)
    part.samples, part.timesteps = calls.samples[first:], calls.timesteps[first:]
    fast = hrt.compile(model, schedule, backend="eager")
    assert_close(calls.run(fast, first), expected(model, late, part), 2e-5)


def test_other_entries_computed(dit: nn.Module) -> None:
    schedule = hrt.Schedule.uniform(dit, 6, 2, level="branches", trunk=True, carry=0.5)
    compute = schedule.compute.copy()
    compute[3] = True
    compute[4, 1] = False
    moved = schedule.replace(compute=compute)
    assert moved.trunk.tolist() == [False, True, False, False, False, True]
    assert moved.carry[:, -1].tolist() == [0, 0.5, 0, 0, 0, 0.5]
    assert not moved.learned, "unlearned stays unlearned"


def change(schedule: hrt.Schedule, name: str, where: tuple[int, ...], value: float) -> dict[str, np.ndarray]:
    array = getattr(schedule, name).copy()
    array[where] = value
    return {name: array}


@pytest.mark.parametrize(
    ("name", "where", "value", "match"),
    [
        ("compute", (1, 2), True, "compute: step 1 reuses the trunk: expected no branch computed there, got 1"),
        ("compute", (0, -1), False, "compute: step 0 must compute every branch"),
        ("weights", (1, 2, 0), 1.0, "weights: expected 0 where the trunk is reused, got 1.0 at step 1, entry 2"),
        ("weights", (1, -1, 1), 1.0, "weights: value 1 .0 = newest. does not exist yet at step 1, entry 6"),
        ("carry", (1, 0), 1.0, "carry: expected 0 of a branch, got 1"),
        ("carry", (2, -1), 1.0, "carry: expected 0 where a branch is computed, got 1.0 at step 2, entry 6"),
        ("channels", (1, 0, 0), 1.0, "channels: expected 0 where the trunk is reused"),
        ("channels", (3, 0, 2), 1.0, "channels: expected 0 for the carry of a branch .value 2."),
    ],
)
def test_refusals(dit: nn.Module, name: str, where: tuple[int, ...], value: float, match: str) -> None:
    compute = np.ones((4, 7), bool)
    compute[1] = compute[3, 0] = False
    schedule = hrt.Schedule.full(dit, 4, level="branches", trunk=True).replace(compute=compute)
    schedule = schedule.replace(channels=np.zeros((4, 7, 3, 16)))
    with pytest.raises(ValueError, match=match):
        schedule.replace(**change(schedule, name, where, value))


def test_where_it_cannot_stand(dit: nn.Module) -> None:
    for level in ("blocks", "output"):
        with pytest.raises(ValueError, match=f"trunk: expected False at level {level}, .*got True"):
            hrt.Schedule.full(dit, 3, level=level, trunk=True)
    for groups in ([("trunk", 1, ("blocks",))], [("trunk", 1, ("blocks",)), ("transformer_blocks", 2, ("a",))]):
        with pytest.raises(ValueError, match=r"groups: expected \('trunk', 1, \('blocks',\)\) behind others, got"):
            hrt.Schedule(np.ones((3, 3), bool), model="Tiny", groups=groups)
    with pytest.raises(ValueError, match="layers expected 3, got 4"):
        hrt.compile(dit, hrt.Schedule.full(make_dit(4), 3, level="branches", trunk=True))


@pytest.mark.parametrize("spec", ["trunk:2", "trunk:3:2:carry=0.5"])
def test_specs(spec: str) -> None:
    pipeline = load_pipeline("dit-s-2", layers=2, size=8)
    schedule = parse_schedule(spec, pipeline, 6)
    every, order, carry = (2, 1, 0.0) if spec == "trunk:2" else (3, 2, 0.5)
    like = hrt.Schedule.uniform(pipeline.transformer, 6, every, order, level="branches", trunk=True, carry=carry)
    assert schedule.replace(sampler=None, timesteps=None) == like
    with pytest.raises(ValueError, match=r"schedule: expected full, .*trunk:N.*got 'trunk:2:groups=3'"):
        parse_schedule("trunk:2:groups=3", pipeline, 6)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_one_group_of_blocks_moves_beside_the_branches(name: str, channels: bool) -> None:
    """To the same result."""
    model, rng = MAKERS[name](), np.random.default_rng(3)
    plan = hrt.Schedule.uniform(model, 7, 2, 2, level="blocks", carry=0.5, sampler="DDIMScheduler", note="mine")
    plan = plan.replace(weights=plan.weights * rng.normal(1, 0.2, plan.weights.shape))
    if channels:
        reused = ~plan.compute[..., None, None]
        drawn = rng.normal(0, 0.05, (*plan.compute.shape, 4, WIDTH[plan.model])).astype(np.float32)
        exists = np.concatenate([plan.weights != 0, plan.carry[..., None] != 0], axis=-1)
        plan = plan.replace(channels=np.where(reused & exists[..., None], drawn, 0))
    moved, calls = plan.beside_branches(model), calls_for(model, 7)
    assert (moved.trunk == ~plan.compute[:, 0, 0]).all() and moved.note == "mine"
    assert (moved.sampler, moved.order, moved.cur) == (plan.sampler, plan.order, plan.cur)
    expected = calls.run(hrt.compile(model, plan, backend="eager"))
    assert_close(calls.run(hrt.compile(model, moved, backend="eager")), expected, 1e-4)
    with pytest.raises(ValueError, match="at level output, or blocks with one group, got level branches"):
        moved.beside_branches(model)
    other = make_dit() if name == "pixart" else make_pixart()
    with pytest.raises(ValueError, match=f"expected a model of {plan.model}, got {type(other).__name__}"):
        plan.beside_branches(other)
