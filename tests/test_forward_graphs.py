"""The model's own forward captured step by step, on the emulator: the same numbers, and never stale."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt.cuda_graphs import CaptureFailed

from .conftest import Calls, assert_close, make_dit, make_pixart, relative_error
from .emulator import Emulator
from .test_levels import calls_for, random_blocks


def compile_graphs(model: nn.Module, schedule: hrt.Schedule, **options: Any) -> tuple[nn.Module, list[Emulator]]:
    fast = hrt.compile(model, schedule, backend="cudagraph", **options)
    recorders: list[Emulator] = []

    def recorder(device: torch.device) -> Emulator:
        recorders.append(Emulator())
        return recorders[-1]

    fast._recorder = recorder
    return fast, recorders


@pytest.mark.parametrize("make", [make_dit, make_pixart])
@pytest.mark.parametrize("groups", [1, 3])
def test_replays_equal_launches(make: Any, groups: int) -> None:
    model = make()
    schedule = random_blocks(model, 1, 7, groups, 2, "any")
    eager = hrt.compile(model, schedule, backend="eager")
    fast, _ = compile_graphs(model, schedule)
    for seed in range(3):
        calls = calls_for(model, 7, seed=seed)
        assert_close(calls.run(fast), calls.run(eager), 1e-6)
        for step in range(4):  # a run cut short
            calls_for(model, 7, seed=90 + seed).call(fast, step)


@pytest.mark.parametrize("level", ["blocks", "output"])
def test_models_in_float64_are_captured(level: str) -> None:
    """The kernel of sums takes no float64: plain ops do that."""
    model, calls = make_dit().double(), Calls(4)
    calls.samples = calls.samples.double()
    schedule = hrt.Schedule.uniform(model, 4, 2, level=level)
    wanted = calls.run(hrt.compile(model, schedule, backend="eager"))
    fast, _ = compile_graphs(model, schedule)
    for _ in range(2):
        assert_close(calls.run(fast), wanted, 1e-12)
    assert fast.report().plans[0].backend == "cudagraph"


def test_as_many_graphs_as_distinct_steps_and_later_runs_replay() -> None:
    model, calls = make_dit(), Calls(9)
    schedule = hrt.Schedule.uniform(model, 9, 3, level="blocks")
    fast, (recorders) = compile_graphs(model, schedule)
    for _ in range(3):
        calls.run(fast)
    (recorder,) = recorders
    (plan,) = fast.report().plans
    assert plan.backend == "cudagraph"
    distinct = len(set(next(iter(fast._plans.values())).program.steps))
    assert plan.graphs == len(recorder.graphs) == distinct
    assert sum(graph.replays for graph in recorder.graphs) == 3 * 9 - 1, "the first call learns, by launches"
    assert "graphs" in str(fast.report())


def test_outputs_survive_the_next_replays() -> None:
    model, calls = make_dit(), Calls(6)
    fast, _ = compile_graphs(model, hrt.Schedule.uniform(model, 6, 2, level="blocks"))
    calls.run(fast)
    outputs = calls.run(fast)
    copies = [t.clone() for t in outputs]
    Calls(6, seed=3).run(fast)
    assert_close(outputs, copies, 0.0)


def test_a_model_that_changed_is_captured_anew() -> None:
    """Hooks, modules, numbers a module holds: a replay would not see them. Weights changed in place it does see."""
    model, calls = make_dit(), Calls(4)
    schedule = hrt.Schedule.uniform(model, 4, 2, level="blocks")
    fast, recorders = compile_graphs(model, schedule)
    block = model.transformer_blocks[1]
    block.scaling = {"adapter": 1.0}

    def scale(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * block.scaling["adapter"]

    def changed(change: Any) -> None:
        before, count = calls.run(fast), len(recorders[0].graphs)
        change()
        wanted = calls.run(hrt.compile(model, schedule, backend="eager"))
        assert relative_error(wanted[0], before[0]) > 1e-3
        assert_close(calls.run(fast), wanted, 1e-5)
        captured.append(len(recorders[0].graphs) - count)

    captured: list[int] = []
    calls.run(fast)
    changed(lambda: block.ff.register_forward_hook(scale) and block.scaling.update(adapter=0.5))
    changed(lambda: block.scaling.update(adapter=2.0))
    changed(lambda: setattr(block.ff, "net", nn.ModuleList([*block.ff.net[:2], nn.Linear(64, 16)]).eval()))
    assert all(captured), "captured anew"
    captured.clear()
    changed(lambda: block.ff.net[2].weight.data.mul_(2))
    assert captured == [0], "replays read the weights where they lie"


class Reads(nn.Module):
    """Its forward reads a value on the host, which no capture can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            sample = block(sample)
        return sample * float(timestep.max())


def test_what_cannot_be_captured_is_launched_and_said() -> None:
    model = Reads().eval()
    schedule = hrt.Schedule.uniform(model, 4, level="blocks")
    x, times = torch.randn(2, 4), [torch.tensor([t, t]) for t in (4.0, 3.0, 2.0, 1.0)]
    fast, _ = compile_graphs(model, schedule)
    fast(x, times[0])
    with pytest.raises(CaptureFailed, match=r"capture failed .* reads a device value on the host"):
        fast(x, times[1])
    fast = hrt.compile(model, schedule)  # auto; as if on CUDA
    fast._engine._captured = lambda plan: plan.capture(Emulator()) or plan
    wanted = [hrt.compile(model, schedule, backend="eager")(x, times[0])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [fast(x, t) for t in times]
    assert torch.equal(got[0], wanted[0])
    assert ["eager backend, not cudagraph" in str(w.message) for w in caught] == [True]
    assert "reads a device value" in fast.report().fallback
    assert fast.report().plans[0].backend == "eager"


def test_numbers_that_change_from_call_to_call_are_no_graphs() -> None:
    class Scaled(Reads):
        def forward(self, sample: torch.Tensor, timestep: float) -> torch.Tensor:
            return self.blocks[1](self.blocks[0](sample)) * timestep

    model = Scaled().eval()
    fast, _ = compile_graphs(model, hrt.Schedule.uniform(model, 4, level="blocks"))
    x = torch.randn(2, 4)

    def runs(count: int) -> None:
        for run in range(count):
            for t in (4.0, 3.0, 2.0, 1.0):
                fast(x, t + run / 10)

    runs(1)
    with pytest.raises(CaptureFailed, match="arguments that are no tensors change from call to call"):
        runs(9)


def test_contexts_have_graphs_of_their_own() -> None:
    model = make_dit()
    schedule = hrt.Schedule.uniform(model, 4, 2, level="blocks")
    fast, recorders = compile_graphs(model, schedule)
    eager = hrt.compile(model, schedule, backend="eager")
    calls = {"cond": Calls(4), "uncond": Calls(4, seed=1)}
    for _ in range(2):
        for step in range(4):
            for name, own in calls.items():
                with fast.cache_context(name), eager.cache_context(name):
                    assert_close([own.call(fast, step)], [own.call(eager, step)], 1e-6)
    assert len(recorders) == 2
