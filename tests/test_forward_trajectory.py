"""The whole loop as one graph at levels blocks and output: the result of stepping, from one launch an image."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import harmonica_rt as hrt
from harmonica_rt.cuda_graphs import CaptureFailed
from harmonica_rt.loop import LOOPS

from .conftest import make_dit, relative_error
from .emulator import Emulator
from .test_forward_graphs import Reads
from .test_levels import random_blocks
from .test_trajectory import LABELS, emulated, noise, scheduler, stepping

__all__ = ["emulated"]  # a fixture
LEVELS: dict[str, Any] = {
    "one group": lambda model: random_blocks(model, 1, 6, 1, 2, "any"),
    "three groups": lambda model: random_blocks(model, 2, 6, 3, 2, "any"),
    "output": lambda model: hrt.Schedule.uniform(model, 6, 2, level="output"),
}


def blocks(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    return hrt.compile(model, hrt.Schedule.uniform(model, 6, 2, level="blocks"), backend="cudagraph", **options)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_one_graph_equals_stepping(kind: type, level: str, emulated: list[Emulator]) -> None:
    model, sampler = make_dit(in_channels=2, out_channels=4), scheduler(kind)
    schedule = LEVELS[level](model)
    eager = hrt.compile(model, schedule, backend="eager")
    fast = hrt.compile(model, schedule, backend="cudagraph")
    for seed in range(3):
        result = fast.trajectory(noise(seed), sampler, 1.5, class_labels=LABELS)
        assert relative_error(result, stepping(eager, sampler, 1.5, noise(seed))) < 1e-5
        kept = result.clone()
        other = fast.trajectory(noise(9), sampler, 1.5, class_labels=LABELS.roll(1))
        assert torch.equal(result, kept), "a result survives the next replay"
        assert not torch.equal(other, result)
    (emulator,) = emulated
    (loop,) = emulator.graphs
    assert loop.replays == 6, "one launch a trajectory, and no graph of a step"
    fast.uncompile()
    assert not loop.ops


def test_steps_and_loops_take_turns(emulated: list[Emulator]) -> None:
    """In plans of their own, unless steps ask for tuples too."""
    fast, sampler = blocks(make_dit(in_channels=2, out_channels=2)), scheduler()
    looped = fast.trajectory(noise(), sampler, 1.5, class_labels=LABELS)
    for _ in range(2):
        assert relative_error(stepping(fast, sampler, 1.5, noise()), looped) < 1e-5
        assert torch.equal(fast.trajectory(noise(), sampler, 1.5, class_labels=LABELS), looped)


def test_few_loops_are_kept_in_one_pool(emulated: list[Emulator]) -> None:
    fast = blocks(make_dit(in_channels=2, out_channels=2))
    for scale in (1.5, 2.0, 2.5, 3.0, 1.5, 3.5):
        fast.trajectory(noise(), scheduler(), scale, class_labels=LABELS)
    (emulator,) = emulated
    assert len(emulator.graphs) == LOOPS + 1
    assert [bool(loop.ops) for loop in emulator.graphs] == [True, False, True, True, True]


def test_loops_go_with_their_plan(emulated: list[Emulator]) -> None:
    fast = blocks(make_dit(in_channels=2, out_channels=2), plans=1)
    fast.trajectory(noise(), scheduler(), 1.5, class_labels=LABELS)
    fast.trajectory(noise()[:1], scheduler(), 1.5, class_labels=LABELS[1:3])
    (evicted,), (kept,) = (emulator.graphs for emulator in emulated)
    assert kept.ops and not evicted.ops


def test_graphs_and_loops_go_with_the_last_reference(emulated: list[Emulator]) -> None:
    gc.collect()
    gc.disable()
    try:
        fast = blocks(make_dit(in_channels=2, out_channels=2))
        fast.trajectory(noise(), scheduler(), 1.5, class_labels=LABELS)
        plan = weakref.ref(next(iter(fast._plans.values())))
        del fast
        assert plan() is None
    finally:
        gc.enable()


def test_a_model_that_changed_is_captured_anew(emulated: list[Emulator]) -> None:
    model, sampler = make_dit(in_channels=2, out_channels=2), scheduler()
    fast = blocks(model)
    before = fast.trajectory(noise(), sampler, 1.5, class_labels=LABELS)
    model.transformer_blocks[1].ff.register_forward_hook(lambda module, args, output: output * 0.5)
    after = fast.trajectory(noise(), sampler, 1.5, class_labels=LABELS)
    eager = hrt.compile(model, fast.schedule, backend="eager")
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, stepping(eager, sampler, 1.5, noise())) < 1e-5
    assert [bool(loop.ops) for loop in emulated[0].graphs] == [False, True]


def test_arguments_that_are_no_tensors_are_part_of_a_loop(emulated: list[Emulator]) -> None:
    class Scaled(Reads):
        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, scale: float = 1.0, return_dict: bool = False
        ) -> Any:
            return (self.blocks[1](self.blocks[0](sample)) * scale + 1e-3 * timestep.view(-1, 1),)

    model, start = Scaled().eval(), torch.randn(2, 4)
    fast = blocks(model)
    eager = hrt.compile(model, fast.schedule, backend="eager")
    for scale in (1.0, 0.5, 1.0):
        result = fast.trajectory(start, scheduler(), scale=scale)
        assert relative_error(result, eager.trajectory(start, scheduler(), scale=scale)) < 1e-5
    assert len(emulated[0].graphs) == 2
    for scale in (1.1, 1.2, 1.3, 1.4):
        fast.trajectory(start, scheduler(), scale=scale)
    (plan,) = fast._plans.values()
    assert len(plan.graphs._inputs) == LOOPS, "static copies go with the loops that read them"


def test_what_cannot_be_captured_is_said(emulated: list[Emulator]) -> None:
    class Tuple(Reads):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False) -> Any:
            return (1e-3 * super().forward(sample, timestep),)

    model, start = Tuple().eval(), torch.randn(2, 4)
    fast = blocks(model)
    with pytest.raises(CaptureFailed, match="reads a device value on the host"):
        fast.trajectory(start, scheduler())
    wanted = hrt.compile(model, fast.schedule, backend="eager").trajectory(start, scheduler())
    auto = hrt.compile(model, fast.schedule)  # as if on CUDA
    auto._engine._captured = lambda plan: plan.capture(Emulator()) or plan
    with pytest.warns(UserWarning, match="eager backend, not cudagraph"):
        assert torch.equal(auto.trajectory(start, scheduler()), wanted)
    assert "reads a device value" in auto.report().fallback
