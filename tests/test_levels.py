"""Levels blocks and output: what they give, what they cost, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

import harmonica_rt as hrt
from bench.by_hand.block_reuse import BlockReuse
from harmonica_rt.layout import split_evenly

from .conftest import Calls, TextCalls, assert_close, make_dit, make_pixart

MAKERS: dict[str, Callable[..., nn.Module]] = {"dit": make_dit, "pixart": make_pixart}


def calls_for(model: nn.Module, steps: int, **options: Any) -> Any:
    return Calls(steps, **options) if "DiT" in type(model).__name__ else TextCalls(model, steps, **options)


def random_blocks(model: nn.Module, seed: int, steps: int, groups: int, order: int, carry: str) -> hrt.Schedule:
    """Random groups reused, at some steps the output, with random weights and carries."""
    rng = np.random.default_rng(seed)
    plain = hrt.Schedule.full(model, steps, level="blocks", groups=groups, order=order)
    output = rng.random(steps) < 0.2
    output[0] = False
    compute = (rng.random(plain.compute.shape) < 0.5) & ~output[:, None, None]
    compute[0] = True
    schedule = plain.replace(compute=compute, output=output)
    carries = {"none": 0.0, "one": 1.0, "any": rng.normal(0.5, 0.5, compute.shape)}[carry]
    reused = ~compute & ~output[:, None, None]
    return schedule.replace(
        weights=schedule.weights * rng.normal(1.0, 0.3, schedule.weights.shape),
        output_weights=schedule.output_weights,
        carry=np.where(reused, carries, 0.0),
    )


def expected(model: nn.Module, schedule: hrt.Schedule, calls: Any) -> list[torch.Tensor]:
    oracle = BlockReuse(model, schedule)
    try:
        outputs = calls.run(oracle)
        reused = ~schedule.compute.reshape(schedule.steps, -1) & ~schedule.output[:, None]
        assert (oracle.computed, oracle.reused) == (schedule.compute.sum(), reused.sum())
        assert oracle.outputs_reused == schedule.output.sum()
    finally:
        oracle.remove()
    return outputs


@hypothesis_settings(max_examples=30)
@given(
    st.integers(0, 2**16), st.sampled_from(list(MAKERS)), st.integers(2, 7), st.integers(1, 5), st.integers(1, 4),
    st.integers(0, 2), st.sampled_from(["none", "one", "any"]), st.integers(1, 3),
)  # fmt: skip
def test_any_schedule_of_blocks_equals_the_oracle(
    seed: int, kind: str, steps: int, layers: int, groups: int, order: int, carry: str, batch: int
) -> None:
    model = MAKERS[kind](layers, seed=seed)
    schedule = random_blocks(model, seed, steps, groups, order, carry)
    calls = calls_for(model, steps, batch=batch, seed=seed)
    fast = hrt.compile(model, schedule, backend="eager")
    wanted = expected(model, schedule, calls)
    assert_close(calls.run(fast), wanted, 1e-4)
    assert_close(calls.run(fast), wanted, 1e-4)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("level", ["blocks", "output"])
def test_the_full_schedule_is_the_model_to_the_bit(kind: str, level: str) -> None:
    model = MAKERS[kind]()
    calls = calls_for(model, 4)
    fast = hrt.compile(model, hrt.Schedule.full(model, 4, level=level))
    assert_close(calls.run(fast), calls.run(model), 0.0)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("every", [2, 3])
def test_level_output_equals_the_oracle(order: int, every: int) -> None:
    model = make_dit()
    schedule = hrt.Schedule.uniform(model, 7, every, order, level="output")
    assert (schedule.level, schedule.groups, schedule.compute.shape) == ("output", (), (7, 0))
    assert schedule.cur == pytest.approx(1 - len(range(0, 7, every)) / 7)
    calls = Calls(7)
    fast = hrt.compile(model, schedule)
    assert_close(calls.run(fast), expected(model, schedule, calls), 1e-5)
    (plan,) = fast.report().plans
    assert (plan.level, plan.computed, plan.reused) == ("output", len(range(0, 7, every)), 7 - len(range(0, 7, every)))


def test_blocks_are_called_at_computed_steps_alone(dit: nn.Module) -> None:
    called = []
    for number, block in enumerate(dit.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, number=number: called.append(number))
    fast = hrt.compile(dit, hrt.Schedule.uniform(dit, 5, 2, level="blocks"))
    calls = Calls(5)
    for step in range(5):
        called.clear()
        calls.call(fast, step)
        assert called == ([0, 1, 2] if step % 2 == 0 else []), step


def test_what_a_level_costs_is_reported(dit: nn.Module) -> None:
    calls, stream = Calls(6), 2 * 16 * 16 * 4  # batch, tokens, width, bytes
    for groups, carry, slots in [(1, 0.0, 2), (1, 0.5, 4), (3, 0.0, 6), (3, None, 12)]:
        fast = hrt.compile(dit, hrt.Schedule.uniform(dit, 6, 2, level="blocks", groups=groups, carry=carry))
        calls.run(fast)
        (plan,) = fast.report().plans
        assert (plan.level, plan.slot_bytes) == ("blocks", slots * stream)
        assert (plan.computed, plan.reused, plan.steps) == (3 * groups, 3 * groups, 6)
        macs = hrt.Schedule.uniform(dit, 6, 2, level="branches").speedup(dit, 8, 8)
        assert plan.full_macs / plan.macs == pytest.approx(macs, rel=0.1)
    text = str(fast.report())
    assert "9 groups computed, 9 reused" in text
    assert "theoretical" in text


def test_the_report_says_why_no_finer_level_runs(dit: nn.Module) -> None:
    def text(model: nn.Module, **options: Any) -> str:
        return str(hrt.compile(model, hrt.Schedule.full(model, 2, **options)).report())

    assert "\nlevel branches\n" in text(dit)
    assert "level blocks, no finer one: the schedule asks for it" in text(dit, level="blocks")
    assert "level output, no finer one: the schedule asks for it" in text(dit, level="output")
    assert "level output, no finer one: Flat has no lists of blocks" in text(Flat().eval())
    dit.transformer_blocks[1].register_forward_hook(lambda *_: None)
    assert "level blocks, no finer one: transformer_blocks.1: expected no forward hooks, got some" in text(dit)


def test_macs_are_those_of_the_adapter(dit: nn.Module) -> None:
    from harmonica_rt.models import adapt

    macs = adapt(dit).macs(8, 8, 2)
    fast = hrt.compile(dit, hrt.Schedule.full(dit, 2, level="output"))
    Calls(2).run(fast)
    assert fast.report().plans[0].full_macs == 2 * (macs.fixed + 3 * sum(macs.branches))


def test_the_theory_is_what_was_counted(dit: nn.Module) -> None:
    for options in ({"level": "blocks"}, {"level": "blocks", "groups": 2}, {"level": "output"}):
        schedule = hrt.Schedule.uniform(dit, 7, 3, **options)
        fast = hrt.compile(dit, schedule)
        Calls(7).run(fast)
        (plan,) = fast.report().plans
        assert schedule.speedup(dit, 8, 8) == pytest.approx(plan.full_macs / plan.macs, rel=1e-6)


@pytest.mark.parametrize("level", ["blocks", "output", "branches"])
def test_a_run_may_enter_midway(dit: nn.Module, level: str) -> None:
    schedule = hrt.Schedule.uniform(dit, 6, 3, level=level, timesteps=Calls(6).timesteps)
    fast, calls = hrt.compile(dit, schedule, backend="eager"), Calls(6)
    outputs = calls.run(fast, first=2)
    left = hrt.compile(dit, schedule.starting_at(2), backend="eager")
    assert_close(outputs, calls.run(left, first=2), 0.0)


def test_a_run_cut_short_leaves_nothing_behind(dit: nn.Module) -> None:
    fast, calls = hrt.compile(dit, hrt.Schedule.uniform(dit, 6, 2, level="blocks")), Calls(6)
    whole = calls.run(fast)
    for stop in range(1, 6):
        for step in range(stop):
            Calls(6, seed=9).call(fast, step)
        assert_close(calls.run(fast), whole, 0.0)


def test_an_error_within_a_block_leaves_the_model_as_it_was(dit: nn.Module) -> None:
    fast, calls = hrt.compile(dit, hrt.Schedule.uniform(dit, 6, 2, level="blocks")), Calls(6)
    whole = calls.run(fast)
    calls.call(fast, 0)
    handle = dit.transformer_blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calls.call(fast, 2 - 2)
    handle.remove()
    assert all("_compiled_call_impl" not in vars(block) for block in dit.transformer_blocks)
    fast.reset()
    assert_close(calls.run(fast), whole, 0.0)


def test_what_hooks_lora_and_weights_do_is_within(dit: nn.Module) -> None:
    """Between runs anything may change: the model's own modules run."""
    calls, schedule = Calls(4), hrt.Schedule.uniform(dit, 4, 2, level="blocks")
    fast = hrt.compile(dit, schedule)
    calls.run(fast)
    dit.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda module, args, output: output * 1.5)
    dit.transformer_blocks[2].ff.net[2].weight.data.mul_(0.5)
    assert_close(calls.run(fast), expected(dit, schedule, calls), 1e-5)


# ---- schedules


def test_one_group_is_the_trunk_and_more_are_lists_split_evenly() -> None:
    model = make_dit(5)
    assert hrt.Schedule.uniform(model, 4, level="blocks").groups == (("trunk", 1, ("blocks",)),)
    assert hrt.Schedule.uniform(model, 4, level="blocks", groups=3).groups == (("transformer_blocks", 3, ("blocks",)),)
    assert hrt.Schedule.uniform(model, 4, level="blocks", groups=9).groups[0].layers == 5
    assert split_evenly(5, 3) == [range(0, 2), range(2, 4), range(4, 5)]


@pytest.mark.parametrize(("guidance", "wanted"), [(None, 0.0), (1.5, 0.0), (2.9, 0.0), (3.0, 0.5), (7.5, 0.5)])
def test_a_trunk_carries_half_at_strong_guidance(dit: nn.Module, guidance: float | None, wanted: float) -> None:
    for fields in ({"level": "blocks"}, {"level": "branches", "trunk": True}):
        schedule = hrt.Schedule.uniform(dit, 4, guidance_scale=guidance, **fields)
        assert set(schedule.carry[1::2].reshape(2, -1)[:, -1].tolist()) == {wanted}
    assert not hrt.Schedule.uniform(dit, 4, order=0, level="blocks", guidance_scale=guidance).carry.any()
    several = hrt.Schedule.uniform(dit, 4, level="blocks", groups=3, guidance_scale=guidance)
    assert (several.carry[1::2] == 1).all()


def test_the_carry_is_0_for_one_group_and_1_for_more_unless_told(dit: nn.Module) -> None:
    reused = [1, 3]
    for groups, carry, wanted in [(1, None, 0.0), (3, None, 1.0), (1, 0.5, 0.5), (3, 0.0, 0.0)]:
        schedule = hrt.Schedule.uniform(dit, 4, level="blocks", groups=groups, carry=carry)
        assert set(schedule.carry[reused].ravel()) == {wanted}
        assert not schedule.carry[[0, 2]].any()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("carry", [0.0, 0.25])
def test_schedules_of_blocks_are_files_text_and_pictures(
    dit: nn.Module, tmp_path: Path, groups: int, carry: float
) -> None:
    schedule = random_blocks(dit, 3, 6, groups, 2, "any") if carry else hrt.Schedule.uniform(
        dit, 6, level="blocks", groups=groups, carry=carry
    )  # fmt: skip
    schedule.save(tmp_path / "s.json")
    assert hrt.Schedule.load(tmp_path / "s.json") == schedule
    assert ("trunk" if groups == 1 else "transformer_blocks") in str(schedule)
    schedule.plot(tmp_path / "s.png")
    output = hrt.Schedule.uniform(dit, 6, 3, level="output", order=2)
    output.save(tmp_path / "o.json")
    assert hrt.Schedule.load(tmp_path / "o.json") == output
    output.plot(tmp_path / "o.png")
    assert "output" in str(output)


def test_several_groups_are_views_by_name() -> None:
    groups = [("double", 2, ("attn", "mlp")), ("single", 3, ("block",))]
    compute = np.ones((4, 7), dtype=bool)
    compute[2, [1, 5]] = False
    schedule = hrt.Schedule(compute, model="M", groups=groups)
    assert schedule.compute.shape == (4, 7)
    assert schedule["double"].shape == (4, 2, 2)
    assert schedule["single"].shape == (4, 3, 1)
    assert np.argwhere(~schedule["double"]).tolist() == [[2, 0, 1]]
    assert np.argwhere(~schedule["single"]).tolist() == [[2, 1, 0]]
    assert schedule.cur_by_branch == pytest.approx({"double.attn": 0, "double.mlp": 1 / 8, "single": 1 / 12})
    with pytest.raises(KeyError, match=r"expected one of \('double', 'single'\)"):
        schedule["triple"]
    assert "double.mlp" in str(schedule)


# ---- refusals


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"level": "layers"}, ValueError, r"level: expected one of \('auto', 'branches', 'blocks', 'output'\)"),
    ({"level": "output", "groups": 2}, ValueError, "groups: expected 1 at level output, got 2"),
    ({"level": "branches", "carry": 0.5}, ValueError, "carry: expected none at level branches, got 0.5"),
    ({"level": "blocks", "groups": 0}, ValueError, "groups: expected a positive integer, got 0"),
    ({"level": "blocks", "carry": float("nan")}, ValueError, "carry: expected a finite number, got nan"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_builders_name_both_sides(
    dit: nn.Module, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hrt.Schedule.uniform(dit, 4, **options)


class Flat(nn.Module):
    """A denoiser without lists of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.layer(sample) * timestep.view(-1, 1)


class Leaky(nn.Module):
    """Its output is the first block's as well as the last one's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.blocks:
            sample = block(sample) + timestep.view(-1, 1)
            kept.append(sample.sin())
        return sample + kept[0]


def test_a_model_without_blocks_has_level_output(dit: nn.Module) -> None:
    model = Flat().eval()
    assert hrt.Schedule.uniform(model, 4).level == "output"
    with pytest.raises(hrt.UnsupportedModelError, match="Flat has no lists of blocks: expected level 'output'"):
        hrt.Schedule.uniform(model, 4, level="blocks")
    fast = hrt.compile(model, hrt.Schedule.uniform(model, 4))
    x = torch.randn(2, 4)
    outputs = [fast(x, torch.tensor([t, t])) for t in (4.0, 3.0, 2.0, 1.0)]
    assert torch.equal(outputs[1], outputs[0])
    assert torch.allclose(outputs[3], 1.5 * outputs[2] - 0.5 * outputs[0])


def test_an_output_that_depends_on_more_than_the_trunk_is_refused_at_the_first_call() -> None:
    model = Leaky().eval()
    fast = hrt.compile(model, hrt.Schedule.uniform(model, 4))
    with pytest.raises(hrt.UnsupportedModelError, match=r"nothing but the streams after trunk.* level 'output' takes"):
        fast(torch.randn(2, 4), torch.tensor([4.0, 4.0]))


def test_a_schedule_of_other_groups_or_of_another_model_is_refused(dit: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"groups of {'transformer_blocks': 5}, but .* have blocks {.*: 3}"):
        hrt.compile(dit, hrt.Schedule.uniform(make_dit(5), 4, level="blocks", groups=5))
    with pytest.raises(ValueError, match="model expected DiTTransformer2DModel, got Flat"):
        hrt.compile(dit, hrt.Schedule.uniform(Flat().eval(), 4))
    with pytest.raises(ValueError, match="expected a model in eval mode"):
        hrt.compile(make_dit().train(), hrt.Schedule.uniform(dit, 4, level="blocks"))


def test_a_carry_wants_the_stream_among_the_first_blocks_arguments() -> None:
    class Widens(Leaky):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                sample = torch.cat([block(sample), timestep.view(-1, 1)], 1)[:, :4]
            return sample

    model = Widens().eval()
    model.blocks[0] = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).eval()
    fast = hrt.compile(model, hrt.Schedule.uniform(model, 4, carry=0.5, level="blocks"))
    with pytest.raises(
        hrt.UnsupportedModelError, match=r"a stream \[2, 4\] float32 as it returns, got \[2, 3\] float32"
    ):
        fast(torch.randn(2, 3), torch.tensor([4.0, 4.0]))


def test_two_threads_on_one_model_are_refused(dit: nn.Module) -> None:
    """Two compiled models may share one model, in turn."""
    schedule, calls = hrt.Schedule.uniform(dit, 4, level="blocks"), Calls(4)
    one, other = hrt.compile(dit, schedule), hrt.compile(dit, schedule)
    assert_close(calls.run(one), calls.run(other), 0.0)
    handle = dit.transformer_blocks[1].register_forward_pre_hook(lambda *_: calls.call(other, 0))
    with pytest.raises(RuntimeError, match="concurrent use: this model is already running"):
        calls.call(one, 0)
    handle.remove()
