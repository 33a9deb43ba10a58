"""Schedules: the forecast against its formulas, speed-ups against counted FLOPs, immutability, every refusal."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.builders import spread
from harmonica_rt.decisions import Decisions
from harmonica_rt.models import adapt

from .conftest import make_dit, random_schedule

COMPUTE = np.array([[[1, 1], [1, 1]], [[1, 0], [0, 0]], [[0, 0], [0, 1]]], dtype=bool)
SEEDS = st.integers(0, 2**32 - 1)


def tiny(**changes: Any) -> Schedule:
    layout = {} if "groups" in changes else {"branches": ("a", "b")}
    return Schedule(**{"compute": COMPUTE, "model": "Tiny", **layout, **changes})


def column(computed_at: list[int], steps: int, order: int) -> np.ndarray:
    """The forecast's weights [steps, order + 1] of one branch computed at these steps."""
    compute = np.zeros((steps, 1, 1), bool)
    compute[computed_at] = True
    return Schedule(compute, model="Tiny", branches=("a",), order=order).weights[:, 0, 0]


def newest_first(compute: np.ndarray, before: int, order: int) -> list[int]:
    return [j for j in reversed(range(before)) if compute[j]][: order + 1]


# ---- builders


def test_full_computes_everything(dit: torch.nn.Module) -> None:
    schedule = Schedule.full(dit, 5)
    assert schedule.compute.shape == (5, 3, 2)
    assert schedule.compute.all()
    assert not schedule.weights.any()
    assert (schedule.model, schedule.branches, schedule.order) == ("DiTTransformer2DModel", ("attn", "mlp"), 1)
    assert (schedule.cur, schedule.note) == (0.0, "full")


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_uniform_computes_every_nth_step(dit: torch.nn.Module, every: int, order: int) -> None:
    schedule = Schedule.uniform(dit, 7, every=every, order=order, sampler="DDIMScheduler")
    expected = [i % every == 0 for i in range(7)]
    assert (schedule.compute == np.array(expected)[:, None, None]).all()
    assert (schedule.order, schedule.sampler) == (order, "DDIMScheduler")
    assert schedule.weights.shape == (7, 3, 2, order + 1)


@pytest.mark.parametrize(
    ("steps", "computed", "expected"),
    [(60, 10, [0, 7, 14, 21, 27, 33, 39, 45, 51, 57]), (20, 6, [0, 4, 8, 12, 15, 18]), (5, 1, [0])],
)
def test_so_many_steps_are_computed(dit: torch.nn.Module, steps: int, computed: int, expected: list[int]) -> None:
    schedule = Schedule.uniform(dit, steps, computed=computed, order=2)
    assert np.flatnonzero(schedule.compute.all((1, 2))).tolist() == expected
    assert not schedule.compute[~schedule.compute.all((1, 2))].any()
    assert (schedule.level, schedule.order, schedule.note) == ("blocks", 2, f"uniform, {computed} of {steps}")
    output = Schedule.uniform(dit, steps, computed=computed, level="output")
    assert np.flatnonzero(~output.output).tolist() == expected


@given(st.integers(1, 100), st.data())
def test_as_many_are_computed_as_asked_for(steps: int, data: st.DataObject) -> None:
    """Whatever their number; runs of reused steps get shorter."""
    at = np.flatnonzero(spread(steps, computed := data.draw(st.integers(1, steps))))
    assert len(at) == computed and at[0] == 0
    runs = np.diff(np.append(at, steps))
    assert (np.diff(runs) <= 0).all()


def test_full_where_all_are_computed(dit: torch.nn.Module) -> None:
    assert Schedule.uniform(dit, 5, computed=5, level="branches") == Schedule.full(dit, 5)


def test_a_compiled_model_stands_for_its_model(dit: torch.nn.Module) -> None:
    fast = hrt.compile(dit, Schedule.full(dit, 4), backend="eager")
    assert Schedule.uniform(fast, 4) == Schedule.uniform(dit, 4)
    assert Schedule.uniform(fast, 4).speedup(fast) == Schedule.uniform(dit, 4).speedup(dit)


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "2"])
def test_builders_refuse_counts_that_are_none(dit: torch.nn.Module, wrong: object) -> None:
    got = re.escape(repr(wrong))
    with pytest.raises(ValueError, match=rf"steps: expected a positive integer, got {got}"):
        Schedule.full(dit, wrong)
    with pytest.raises(ValueError, match=rf"every: expected a positive integer, got {got}"):
        Schedule.uniform(dit, 4, every=wrong)
    with pytest.raises(ValueError, match=rf"computed: expected a positive integer, got {got}"):
        Schedule.uniform(dit, 4, computed=wrong)


def test_uniform_refuses_what_says_two_things(dit: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="every: expected none beside computed, 3, got 2"):
        Schedule.uniform(dit, 6, 2, computed=3)
    with pytest.raises(ValueError, match="computed: expected at most 6, as many as there are steps, got 7"):
        Schedule.uniform(dit, 6, computed=7)


# ---- the forecast


def test_order_0_repeats_the_last_value() -> None:
    assert column([0, 2], 5, 0).tolist() == [[0], [1], [0], [1], [1]]


def test_order_1_follows_its_formula_and_starts_as_order_0() -> None:
    weights = column([0, 3, 4], 8, 1)
    assert weights[[0, 3, 4]].tolist() == [[0, 0]] * 3
    assert weights[[1, 2]].tolist() == [[1, 0]] * 2
    for i in (5, 6, 7):
        w = (i - 4) / (4 - 3)
        assert weights[i].tolist() == [1 + w, -w]
    assert column([0, 3], 5, 1)[4].tolist() == [1 + 1 / 3, -1 / 3]


def test_order_2_drops_to_the_values_there_are() -> None:
    weights = column([0, 2, 4], 6, 2)
    assert weights[1].tolist() == [1, 0, 0]
    assert weights[3].tolist() == [1.5, -0.5, 0]
    assert weights[5].tolist() == [1.875, -1.25, 0.375]


@given(SEEDS, st.integers(0, 2), st.integers(2, 14))
def test_forecast_weights_are_those_of_the_interpolating_polynomial(seed: int, order: int, steps: int) -> None:
    schedule = random_schedule(seed, steps, 2, order, reuse=0.6)
    for i, layer, b in np.argwhere(~schedule.compute):
        nodes = newest_first(schedule.compute[:, layer, b], i, order)
        expected = np.zeros(order + 1)
        for k in range(len(nodes)):
            expected[k] = np.polyval(np.polyfit(nodes, np.eye(len(nodes))[k], len(nodes) - 1), i)
        np.testing.assert_allclose(schedule.weights[i, layer, b], expected, rtol=1e-8, atol=1e-8)
    assert not schedule.weights[schedule.compute].any()
    assert not np.signbit(schedule.weights[schedule.weights == 0]).any()


# ---- value semantics


def test_attributes_cannot_be_changed() -> None:
    schedule = tiny()
    for name in (*Decisions.__slots__, "anything"):
        with pytest.raises(AttributeError, match=rf"immutable: use schedule.replace\({name}="):
            setattr(schedule, name, None)
        with pytest.raises(AttributeError, match="immutable"):
            delattr(schedule, name)
    assert schedule == tiny()


@pytest.mark.parametrize("name", ["compute", "weights"])
def test_arrays_cannot_be_changed_not_even_on_purpose(name: str) -> None:
    for schedule in (tiny(), pickle.loads(pickle.dumps(tiny())), copy.deepcopy(tiny())):
        with pytest.raises(ValueError, match="read-only"):
            getattr(schedule, name)[0] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            getattr(schedule, name).setflags(write=True)


def test_arrays_are_copies_of_the_callers() -> None:
    compute, weights = COMPUTE.copy(), tiny().weights * 2
    schedule = tiny(compute=compute, weights=weights)
    compute[1:], weights[:] = True, 0
    assert schedule == tiny(weights=tiny().weights * 2)


CHANGES = {
    "compute": np.ones_like(COMPUTE),
    "weights": tiny().weights * 1.5,
    "order": 2,
    "model": "Other",
    "groups": [("transformer_blocks", 2, ("a", "c"))],
    "sampler": "DDIMScheduler",
    "timesteps": (3.0, 2.0, 1.0),
    "log_snr": (3.0, 2.0, 1.0),
    "guidance_scale": 1.5,
    "note": "by hand",
}


def test_equal_in_every_field_or_not_at_all() -> None:
    assert set(CHANGES) == set(Decisions.__slots__) - {
        *("output", "output_weights", "output_channels", "channels", "forecast", "level", "carry")
    }
    schedules = [tiny(), *(tiny().replace(**{name: value}) for name, value in CHANGES.items())]
    again = [tiny(), *(tiny(**{name: value}) for name, value in CHANGES.items())]
    for i, schedule in enumerate(schedules):
        assert [schedule == other for other in again] == [i == j for j in range(len(again))]
        assert hash(schedule) == hash(again[i])
    assert len({*schedules, *again}) == len(schedules)
    assert tiny() != "Tiny"


def test_the_same_bytes_in_another_shape_are_another_schedule() -> None:
    compute = np.ones((2, 6, 1), bool)
    assert Schedule(compute, model="M", branches=("a",)) != Schedule(
        compute.reshape(3, 4, 1), model="M", branches=("a",)
    )


@given(SEEDS, st.integers(0, 2), st.booleans())
def test_pickles_and_copies_are_equal(seed: int, order: int, learned: bool) -> None:
    schedule = random_schedule(seed, order=order, learned=learned).replace(
        sampler="S", timesteps=range(6), guidance_scale=4, note="n"
    )
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(schedule, protocol)) == schedule
    assert copy.copy(schedule) == copy.deepcopy(schedule) == schedule
    assert copy.copy(schedule).learned == schedule.learned


# ---- replace


def test_replace_keeps_learned_weights_only_with_their_plan() -> None:
    learned = random_schedule(1, learned=True)
    assert learned.learned
    kept = learned.replace(note="tuned", guidance_scale=2)
    np.testing.assert_array_equal(kept.weights, learned.weights)
    assert (kept.note, kept.guidance_scale) == ("tuned", 2.0)
    for change in ({"order": 2}, {"compute": np.ones_like(learned.compute)}, {"weights": None}):
        assert not learned.replace(**change).learned
    assert learned.replace(order=2).weights.shape[-1] == 3


def test_replace_drops_timesteps_that_no_longer_fit() -> None:
    schedule = tiny(timesteps=[3, 2, 1])
    assert schedule.replace(compute=COMPUTE[:2]).timesteps is None
    assert schedule.replace(compute=np.ones_like(COMPUTE)).timesteps == (3.0, 2.0, 1.0)
    assert schedule.replace(compute=COMPUTE[:2], timesteps=[3, 1]).timesteps == (3.0, 1.0)


def test_replace_validates() -> None:
    with pytest.raises(TypeError, match=r"unknown field 'steps', expected one of \['branches', .*'weights'\]"):
        tiny().replace(steps=4)
    with pytest.raises(TypeError, match="compute: expected dtype bool, got int64"):
        tiny().replace(compute=3)
    with pytest.raises(ValueError, match=r"expected shape \[steps, layers, 3 branches\], got \[3, 2, 2\]"):
        tiny().replace(branches=("a", "b", "c"))


# ---- entering midway


@given(SEEDS, st.integers(1, 10), st.integers(0, 2), st.booleans(), st.data())
def test_entering_midway_keeps_weights_whose_values_are_the_same(
    seed: int, steps: int, order: int, learned: bool, data: st.DataObject
) -> None:
    schedule = random_schedule(seed, steps, 2, order, reuse=0.6, learned=learned)
    if learned:
        keep = np.random.default_rng(seed).random(schedule.weights.shape) < 0.8
        schedule = schedule.replace(weights=schedule.weights * keep)
    schedule = schedule.replace(sampler="S", timesteps=range(steps), note="n")
    start = data.draw(st.integers(0, steps - 1))
    late = schedule.starting_at(start)
    if start == 0:
        assert late is schedule
    assert late.compute[0].all()
    np.testing.assert_array_equal(late.compute[1:], schedule.compute[start + 1 :])
    assert (late.sampler, late.note, late.order) == ("S", "n", order)
    assert late.timesteps == schedule.timesteps[start:]
    forecast = late.replace(weights=None).weights
    for i, layer, b in np.argwhere(~late.compute):
        old, weights = schedule.compute[:, layer, b].copy(), schedule.weights[start + i, layer, b]
        before = newest_first(old, start + i, order)
        old[:start], old[start] = False, True
        now = newest_first(old, start + i, order)
        used = np.flatnonzero(weights)
        same = start == 0 or all(k < len(now) and now[k] == before[k] for k in used)
        expected = weights if same else forecast[i, layer, b]
        np.testing.assert_array_equal(late.weights[i, layer, b], expected)
    assert late.learned <= schedule.learned, "a forecast stays one"


@pytest.mark.parametrize("step", [3, -1, 1.0, True, None, "1"])
def test_entering_at_a_step_there_is_not(step: object) -> None:
    with pytest.raises(ValueError, match=rf"expected a step from 0 to 2, got {re.escape(repr(step))}"):
        tiny().starting_at(step)


# ---- statistics


def test_utilisation_is_the_reused_part() -> None:
    schedule = tiny()
    assert (schedule.steps, schedule.layers) == (3, 2)
    assert schedule.cur == 1 - 6 / 12
    assert schedule.cur_by_branch == pytest.approx({"a": 3 / 6, "b": 3 / 6})
    skewed = tiny(compute=COMPUTE | np.array([True, False]))
    assert skewed.cur == pytest.approx(3 / 12)
    assert skewed.cur_by_branch == {"a": 0.0, "b": 0.5}


def test_learned_means_other_than_the_forecast() -> None:
    schedule = tiny()
    assert not schedule.learned
    assert not tiny(weights=schedule.weights).learned
    nudged = schedule.weights.copy()
    nudged[2, 0, 0, 0] = np.nextafter(nudged[2, 0, 0, 0], np.inf)
    assert tiny(weights=nudged).learned


def counted_flops(model: torch.nn.Module, size: int, batch: int) -> int:
    """Flops of the diffusers forward; plain attention, since torch has no formula for its fused one on CPU."""
    sample, ones = torch.randn(batch, 2, size, size), torch.ones(batch, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(sample, timestep=ones, class_labels=ones)
    return counter.get_total_flops()


def without(model: torch.nn.Module, computed: np.ndarray) -> torch.nn.Module:
    """A copy in which the branches not `computed` [layers, branches] put out zeros."""
    model = copy.deepcopy(model)
    for layer, branch in np.argwhere(~computed):
        block = model.transformer_blocks[layer]
        (block.attn1, block.ff)[branch].forward = lambda h, *_, **__: torch.zeros_like(h)
    return model


MODELS = [
    {},
    {"heads": 3, "head_dim": 4, "patch_size": 4},
    {"layers": 1, "attention_bias": False, "out_channels": 3, "norm_elementwise_affine": True},
]


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize(("size", "batch"), [(8, 1), (16, 3)])
def test_macs_are_half_the_flops_that_torch_counts(config: dict, size: int, batch: int) -> None:
    model = make_dit(**config)
    macs = adapt(model).macs(size, size, batch)
    assert 2 * (macs.fixed + adapt(model).layers * sum(macs.branches)) == counted_flops(model, size, batch)


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("size", [8, 16])
def test_speedup_is_the_ratio_of_flops_that_torch_counts(config: dict, size: int) -> None:
    model = make_dit(**config)
    schedule = random_schedule(3, 5, len(model.transformer_blocks), reuse=0.6)
    counted = sum(counted_flops(without(model, step), size, 1) for step in schedule.compute)
    expected = 5 * counted_flops(model, size, 1) / counted
    assert expected > 1.1
    assert schedule.speedup(model, size, size) == pytest.approx(expected, rel=1e-12)
    assert schedule.speedup(model, size, size, batch=7) == pytest.approx(expected, rel=1e-12)
    assert (schedule.speedup(model) == schedule.speedup(model, size, size)) == (size == 8), "sample_size is 8"
    assert Schedule.full(model, 5).speedup(model, size) == 1.0


def test_speedup_of_an_oblong_counts_its_tokens(dit: torch.nn.Module) -> None:
    """diffusers' own forward takes squares only, so by the shape: 16x4 and 8x8 are 16 tokens each."""
    schedule = random_schedule(3)
    assert schedule.speedup(dit, 16, 4) == schedule.speedup(dit, 4, 16) == schedule.speedup(dit, 8, 8)
    assert schedule.speedup(dit, 16) == schedule.speedup(dit, 16, 8) != schedule.speedup(dit, 8, 8)


def test_speedup_refuses_another_model(dit: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="layers expected 3, got 2"):
        random_schedule(0, layers=2).speedup(dit)
    with pytest.raises(ValueError, match="model expected DiTTransformer2DModel, got Tiny"):
        tiny().speedup(dit)
    with pytest.raises(ValueError, match="multiples of the patch, 2, got 7x8"):
        random_schedule(0).speedup(dit, height=7)


# ---- text


def test_repr_is_one_line() -> None:
    line = "<Schedule Tiny: 3 steps x 2 layers x a/b, order {}, CUR 50.0 %>"
    assert repr(tiny()) == line.format("1 (forecast)")
    assert repr(tiny(order=0)) == line.format("0 (plain reuse)")
    assert repr(tiny(weights=tiny().weights * 2)) == line.format("1 (learned weights)")


def test_str_draws_the_plan() -> None:
    schedule = tiny(branches=("a", "cross"), sampler="DDIMScheduler", guidance_scale=1.5, note="by hand")
    assert str(schedule).splitlines() == [
        "Schedule Tiny: 3 steps x 2 layers x a/cross, order 1 (forecast), CUR 50.0 %",
        "CUR by branch: a 50.0 %, cross 50.0 %",
        "DDIMScheduler, guidance 1.5, by hand",
        "step  a   cross  (# compute, . reuse)",
        "   0  ##  ##",
        "   1  #.  ..",
        "   2  ..  .#",
    ]
    assert len(str(tiny()).splitlines()) == 6


# ---- refusals

W = tiny().weights


def at(place: tuple[int, ...], value: float) -> np.ndarray:
    weights = W.copy()
    weights[place] = value
    return weights


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"compute": COMPUTE.astype(int)}, TypeError, "compute: expected dtype bool, got int64"),
        ({"compute": COMPUTE[0]}, ValueError, "compute: expected shape [steps, layers, 2 branches], got [2, 2]"),
        ({"compute": COMPUTE[..., :1]}, ValueError, "expected shape [steps, layers, 2 branches], got [3, 2, 1]"),
        ({"compute": COMPUTE[:0]}, ValueError, "expected shape [steps, layers, 2 branches], got [0, 2, 2]"),
        ({"compute": COMPUTE[:, :0]}, ValueError, "expected shape [steps, layers, 2 branches], got [3, 0, 2]"),
        ({"compute": COMPUTE[1:]}, ValueError, "step 0 must compute every branch, but layer 0, branch 1 is reused"),
        ({"model": None}, TypeError, "model: expected a str, got NoneType"),
        ({"note": 3}, TypeError, "note: expected a str, got int"),
        ({"sampler": b"x"}, TypeError, "sampler: expected a str, got bytes"),
        ({"branches": "ab"}, TypeError, "branches: expected a sequence of names, got 'ab'"),
        ({"branches": ()}, TypeError, "branches: expected a sequence of names, got ()"),
        ({"branches": ("a", "")}, TypeError, "branches: expected a sequence of names, got ('a', '')"),
        ({"branches": ["a", 1]}, TypeError, "branches: expected a sequence of names, got ['a', 1]"),
        ({"branches": None}, TypeError, "branches: expected a sequence of names, got None"),
        ({"branches": np.array(["a", "b"])}, TypeError, "branches: expected a sequence of names, got array(["),
        ({"branches": ["a", "a"]}, ValueError, "branches: expected distinct names, got ('a', 'a')"),
        ({"order": 3}, ValueError, "order: expected one of (0, 1, 2), got 3"),
        ({"order": -1}, ValueError, "order: expected one of (0, 1, 2), got -1"),
        ({"order": True}, ValueError, "order: expected one of (0, 1, 2), got True"),
        ({"order": np.True_}, ValueError, "order: expected one of (0, 1, 2), got np.True_"),
        ({"order": 1.0}, ValueError, "order: expected one of (0, 1, 2), got 1.0"),
        ({"order": np.array([1, 2])}, ValueError, "order: expected one of (0, 1, 2), got array([1, 2])"),
        ({"weights": W.astype(int)}, TypeError, "weights: expected a float dtype, got int64"),
        ({"weights": "x"}, TypeError, "weights: expected a float dtype, got <U1"),
        ({"weights": W[..., :1]}, ValueError, "expected shape [3, 2, 2, 2] for order 1, got [3, 2, 2, 1]"),
        ({"weights": W, "order": 2}, ValueError, "expected shape [3, 2, 2, 3] for order 2, got [3, 2, 2, 2]"),
        ({"weights": at((2, 0, 1, 0), math.nan)}, ValueError, "finite numbers, got nan at step 2, layer 0, branch 1"),
        ({"weights": at((1, 1, 0, 0), -math.inf)}, ValueError, "finite numbers, got -inf at step 1, layer 1, branch 0"),
        ({"weights": at((2, 1, 1, 0), 0.5)}, ValueError, "expected 0 where a branch is computed, got 0.5 at step 2,"),
        ({"weights": at((1, 0, 1, 1), 0.5)}, ValueError, "value 1 (0 = newest) does not exist yet at step 1, layer 0"),
        ({"weights": at((1, 0, 1, 1), 0.5)}, ValueError, "branch 1: expected 0, got 0.5"),
        ({"timesteps": [3, 2]}, ValueError, "timesteps: expected 3 (one a step), got 2"),
        ({"timesteps": [3, 2, "1"]}, TypeError, "timesteps: expected a number, got str"),
        ({"timesteps": [3, 2, True]}, TypeError, "timesteps: expected a number, got bool"),
        ({"timesteps": [3, 2, math.nan]}, ValueError, "timesteps: expected a finite number, got nan"),
        ({"timesteps": 5}, TypeError, "timesteps: expected a sequence of numbers, got int"),
        ({"guidance_scale": "1.5"}, TypeError, "guidance_scale: expected a number, got str"),
        ({"guidance_scale": False}, TypeError, "guidance_scale: expected a number, got bool"),
        ({"guidance_scale": math.inf}, ValueError, "guidance_scale: expected a finite number, got inf"),
        ({"guidance_scale": 10**400}, ValueError, "guidance_scale: expected a finite number, got inf"),
    ],
)
def test_what_is_wrong_is_named_beside_what_was_expected(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        tiny(**changes)


def test_numpy_numbers_are_numbers() -> None:
    schedule = tiny(order=np.int64(2), timesteps=np.array([3, 2, 1]), guidance_scale=np.float32(1.5))
    assert schedule == tiny(order=2, timesteps=[3, 2, 1], guidance_scale=1.5)
    assert type(schedule.order) is int
    assert {type(t) for t in schedule.timesteps} == {float}
