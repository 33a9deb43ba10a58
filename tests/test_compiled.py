"""A compiled model against module-level reuse on the diffusers model, and everything that can happen between calls."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import harmonica_rt as hrt
from bench.by_hand.module_reuse import ModuleReuse

from .conftest import BACKENDS, Calls, assert_close, make_dit, needs_compiler, random_schedule


def expected(model: torch.nn.Module, schedule: hrt.Schedule, calls: Calls) -> list[torch.Tensor]:
    oracle = ModuleReuse(model, schedule)
    try:
        outputs = calls.run(oracle)
        assert (oracle.computed, oracle.reused) == (schedule.compute.sum(), (~schedule.compute).sum())
    finally:
        oracle.remove()
    return outputs


@hypothesis_settings(max_examples=40)
@given(
    st.integers(0, 2**16), st.integers(1, 7), st.integers(1, 4), st.integers(0, 2), st.booleans(), st.integers(1, 5),
    st.sampled_from([0.2, 0.5, 0.8]), st.sampled_from([(1, 8), (2, 8), (3, 4)]), st.booleans(),
)  # fmt: skip
def test_eager_equals_module_level_reuse(
    seed: int, steps: int, layers: int, order: int, learned: bool, batch: int, reuse: float, heads: tuple, affine: bool
) -> None:
    model = make_dit(layers, *heads, seed=seed, norm_elementwise_affine=affine)
    schedule = random_schedule(seed, steps, layers, order, reuse, learned)
    calls = Calls(steps, batch, seed=seed)
    fast = hrt.compile(model, schedule, backend="eager")
    assert_close(calls.run(fast), expected(model, schedule, calls), 1e-4)


@needs_compiler
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_inductor_equals_module_level_reuse(batch: int) -> None:
    model = make_dit(4)
    for order in (0, 1, 2):
        for reuse, learned in ((0.3, False), (0.6, True), (0.9, True)):
            schedule = random_schedule(order, 7, 4, order, reuse, learned)
            calls = Calls(7, batch)
            fast = hrt.compile(model, schedule, backend="inductor")
            assert_close(calls.run(fast), expected(model, schedule, calls), 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "config",
    [{}, {"activation_fn": "gelu"}, {"attention_bias": False}, {"norm_elementwise_affine": True, "norm_eps": 1e-3}],
    ids=["default", "exact gelu", "no attention bias", "affine norm"],
)
def test_full_schedule_equals_diffusers(backend: str, config: dict) -> None:
    model = make_dit(**config)
    calls = Calls(4)
    fast = hrt.compile(model, hrt.Schedule.full(model, 4), backend=backend)
    assert_close(calls.run(fast), calls.run(model), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_diffusers_itself(backend: str, dtype: torch.dtype) -> None:
    calls = Calls(4, batch=4)
    reference = calls.run(make_dit())
    model = make_dit().to(dtype)
    calls.samples = calls.samples.to(dtype)
    fast = hrt.compile(model, hrt.Schedule.full(model, 4), backend=backend)

    def rms(outputs: list[torch.Tensor]) -> float:
        assert {o.dtype for o in outputs} == {dtype}
        return torch.stack([(o - r).square().mean() for o, r in zip(outputs, reference)]).mean().sqrt().item()

    assert rms(calls.run(fast)) <= 1.2 * rms(calls.run(model))


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_do_not_drift(backend: str) -> None:
    model, schedule = make_dit(), random_schedule(3)
    fast = hrt.compile(model, schedule, backend=backend)
    first, second = Calls(6, seed=1), Calls(6, seed=2)
    once = [first.run(fast), second.run(fast)]
    again = [first.run(fast), second.run(fast)]
    for a, b in zip(once, again):
        assert_close(a, b, 0.0)
    assert_close(once[1], expected(model, schedule, second), 1e-4)


def test_nothing_is_drawn_from_a_run_cut_short(dit: torch.nn.Module) -> None:
    schedule, calls = random_schedule(4), Calls(6)
    fast = hrt.compile(dit, schedule, backend="eager")
    whole = calls.run(fast)
    for stop in range(1, 6):
        for step in range(stop):
            Calls(6, seed=9).call(fast, step)
        assert_close(calls.run(fast), whole, 0.0)


def test_outputs_survive_later_steps(dit: torch.nn.Module) -> None:
    fast, calls = hrt.compile(dit, random_schedule(4), backend="eager"), Calls(6)
    outputs = []
    copies = []
    for step in range(6):
        outputs.append(calls.call(fast, step))
        copies.append(outputs[-1].clone())
    assert_close(outputs, copies, 0.0)


def test_new_labels_within_a_run_are_followed(dit: torch.nn.Module) -> None:
    schedule, calls = random_schedule(5), Calls(6)
    fast, oracle = hrt.compile(dit, schedule, backend="eager"), ModuleReuse(dit, schedule)
    labels = [calls.labels, calls.labels.clone(), (calls.labels + 1) % 5]
    outputs, wanted = [], []
    for step in range(6):
        calls.labels = labels[step // 2]
        wanted.append(calls.call(oracle, step).detach())
    oracle.remove()
    for step in range(6):
        calls.labels = labels[step // 2]
        outputs.append(calls.call(fast, step))
    assert_close(outputs, wanted, 1e-4)


def test_labels_changed_in_place_are_followed(dit: torch.nn.Module) -> None:
    fast, calls = hrt.compile(dit, hrt.Schedule.full(dit, 3), backend="eager"), Calls(3)
    calls.call(fast, 0)
    calls.labels += 1
    calls.labels %= 5
    assert_close([calls.call(fast, 1)], [calls.call(dit, 1).detach()], 1e-5)


def test_shapes_alternate_and_the_least_recently_used_plan_goes(dit: torch.nn.Module) -> None:
    schedule = random_schedule(6)
    fast = hrt.compile(dit, schedule, backend="eager", plans=2)
    for batch, size, kept in [
        (1, 8, ["1, 8x8"]),
        (2, 8, ["1, 8x8", "2, 8x8"]),
        (1, 8, ["2, 8x8", "1, 8x8"]),
        (2, 12, ["1, 8x8", "2, 12x12"]),
        (1, 8, ["2, 12x12", "1, 8x8"]),
        (2, 8, ["1, 8x8", "2, 8x8"]),
    ]:
        calls = Calls(6, batch, size=(size, size))
        assert_close(calls.run(fast), expected(dit, schedule, calls), 1e-4)
        assert [p.shape for p in fast.report().plans] == [f"batch {shape}, float32 on cpu" for shape in kept]
    assert [(p.computed, p.reused) for p in fast.report().plans] == [
        (schedule.compute.sum(), 36 - schedule.compute.sum())
    ] * 2


def test_height_and_width_may_differ(dit: torch.nn.Module) -> None:
    """diffusers' own forward only takes squares: check that transposed patches see their own positions."""
    fast = hrt.compile(dit, hrt.Schedule.full(dit, 1), backend="eager")
    output = Calls(1, size=(4, 12)).run(fast)[0]
    assert output.shape == (2, 4, 4, 12)


@pytest.mark.parametrize("first", [1, 3, 5])
def test_a_run_that_enters_midway_computes_what_is_not_cached(dit: torch.nn.Module, first: int) -> None:
    calls = Calls(6)
    schedule = random_schedule(7, order=2, learned=True).replace(timesteps=calls.timesteps)
    rest = schedule.starting_at(first)
    tail = Calls(6)
    tail.samples, tail.timesteps = calls.samples[first:], calls.timesteps[first:]
    fast = hrt.compile(dit, schedule, backend="eager")
    assert_close(calls.run(fast, first), expected(dit, rest, tail), 1e-4)
    fast.reset()
    assert_close(calls.run(fast), expected(dit, schedule, calls), 1e-4)


# ---- weights


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_weights_follow_load_state_dict(backend: str) -> None:
    model, other, calls = make_dit(seed=1), make_dit(seed=2), Calls(3)
    fast = hrt.compile(model, hrt.Schedule.full(model, 3), backend=backend)
    calls.run(fast)
    attn = model.transformer_blocks[0].attn1
    storages = {p.weight.untyped_storage().data_ptr() for p in (attn.to_q, attn.to_k, attn.to_v)}
    assert len(storages) == 1, "query, key and value share one storage: no second copy"
    plan = fast.report().plans
    fast.load_state_dict(other.state_dict())
    assert_close(calls.run(fast), calls.run(other), 1e-5)
    assert fast.report().plans == plan, "weights changed in place need no new plan"


@pytest.mark.parametrize("assign", [True, False])
def test_weights_in_new_storage_are_seen(assign: bool) -> None:
    model, other, calls = make_dit(seed=1), make_dit(seed=2), Calls(3)
    fast = hrt.compile(model, hrt.Schedule.full(model, 3), backend="eager")
    calls.run(fast)
    if assign:
        model.load_state_dict(other.state_dict(), assign=True)
    else:
        model.transformer_blocks[1].ff = other.transformer_blocks[1].ff
    wanted = calls.run(model)
    assert_close(calls.run(fast), wanted, 1e-5)


def test_a_cast_model_is_planned_anew() -> None:
    model, calls = make_dit(), Calls(3)
    fast = hrt.compile(model, hrt.Schedule.full(model, 3), backend="eager")
    single = calls.run(fast)
    fast.to(torch.float64).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch.bfloat16 on cpu, got torch.float32 on cpu"):
        calls.run(fast)
    calls.samples = calls.samples.bfloat16()
    assert_close([o.float() for o in calls.run(fast)], single, 6e-2)


def test_two_compiled_models_share_one_set_of_weights(dit: torch.nn.Module) -> None:
    calls = Calls(6)
    schedules = [random_schedule(1), random_schedule(2)]
    both = [hrt.compile(dit, schedule, backend="eager") for schedule in schedules]
    pointers = None
    for _ in range(2):
        for fast, schedule in zip(both, schedules):
            assert_close(calls.run(fast), expected(dit, schedule, calls), 1e-4)
        now = [p.data_ptr() for p in dit.parameters()]
        assert pointers in (None, now), "the second does not move what the first has joined"
        pointers = now


def test_the_model_saves_as_if_never_compiled(dit: torch.nn.Module, tmp_path: object) -> None:
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    fast, calls = hrt.compile(dit, random_schedule(1), backend="eager"), Calls(6)
    wanted = calls.run(dit)
    calls.run(fast)
    assert list(fast.state_dict()) == list(before)
    fast.save_pretrained(tmp_path)
    loaded = type(dit).from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert_close(calls.run(loaded), wanted, 0.0)


# ---- the model's face


def test_it_looks_like_the_model(dit: torch.nn.Module) -> None:
    fast = hrt.compile(dit, random_schedule(1))
    assert inspect.signature(fast.forward) == inspect.signature(dit.forward)
    assert fast.config is dit.config
    assert (fast.dtype, fast.device) == (dit.dtype, dit.device)
    assert fast.model is dit
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in dit.named_parameters()]
    assert isinstance(fast, torch.nn.Module)
    assert not fast.training
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing


def test_ways_to_call(dit: torch.nn.Module) -> None:
    calls = Calls(1)
    fast = hrt.compile(dit, hrt.Schedule.full(dit, 1), backend="eager")
    sample, timestep = calls.samples[0], torch.full((2,), calls.timesteps[0])
    by_name = calls.run(fast)[0]
    by_place = fast(sample, timestep, calls.labels, None, False)
    assert isinstance(by_place, tuple)
    with torch.inference_mode():
        inference = fast(sample.clone(), timestep, calls.labels).sample
    plain = fast(sample, timestep, calls.labels)
    assert type(plain) is type(dit(sample, timestep, calls.labels))
    assert not plain.sample.requires_grad
    assert_close([by_place[0], inference.clone(), plain.sample], [by_name] * 3, 0.0)


def test_uncompile_gives_the_model_back(dit: torch.nn.Module) -> None:
    fast = hrt.compile(dit, random_schedule(1))
    assert hrt.uncompile(fast) is dit
    assert fast.uncompile() is dit
    assert hrt.uncompile(dit) is dit
    again = hrt.compile(fast, random_schedule(2))
    assert again.model is dit


def test_an_unchanged_model_is_checked_once(dit: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at a whole model takes longer than a step: a run looks only whether it is still the one that was seen."""
    from harmonica_rt import branch_engine

    fast = hrt.compile(dit, random_schedule(0), backend="eager")
    calls, looked = Calls(6), []
    calls.run(fast)
    for name in ("adapt_at_branches", "check_model"):
        check = getattr(branch_engine, name)
        monkeypatch.setattr(branch_engine, name, lambda *args, check=check: looked.append(1) or check(*args))
    calls.run(fast)
    assert not looked
    block = dit.transformer_blocks[1]
    block.ff.net[2].weight.data = block.ff.net[2].weight.data * 2
    again = calls.run(fast)
    assert len(looked) == 2
    assert_close(again, calls.run(hrt.compile(dit, random_schedule(0), backend="eager")), 1e-6)
    for change in (
        lambda: block.attn1.register_forward_hook(lambda *_: None),
        lambda: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
    ):
        handle = change()
        with pytest.raises(hrt.UnsupportedModelError, match="expected no forward hooks"):
            calls.call(fast, 0)
        handle.remove()
    dit.transformer_blocks[0].norm3 = torch.nn.Identity()
    with pytest.raises(hrt.UnsupportedModelError, match=r"transformer_blocks.0.norm3: expected a plain LayerNorm"):
        calls.call(fast, 0)
