"""The whole loop in one call: the result of stepping, whatever runs it, and one graph where there are graphs."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

pytest.importorskip("triton")

import harmonica_rt as hrt
from harmonica_rt.cuda_graphs import CaptureFailed
from harmonica_rt.loop import LOOPS, trajectory

from .conftest import Calls, assert_close, make_dit, random_schedule, relative_error
from .emulator import Emulator

LABELS = torch.tensor([1, 2, 5, 5])  # two images, and the null label of each


def scheduler(kind: type = DDIMScheduler, steps: int = 6, **config: Any) -> Any:
    made = kind(**({"clip_sample": False} if kind is DDIMScheduler else {}), **config)
    made.set_timesteps(steps)
    return made


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def stepping(model: torch.nn.Module, sampler: Any, guidance: float, start: torch.Tensor) -> torch.Tensor:
    """The loop a user writes."""
    sampler = copy.deepcopy(sampler)
    labels = LABELS if guidance > 1 else LABELS[:2]

    def denoise(step: int, sample: torch.Tensor) -> torch.Tensor:
        return model(sample, timestep=sampler.timesteps[step].expand(len(sample)), class_labels=labels).sample

    with torch.no_grad():
        return trajectory(denoise, sampler, start, guidance)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[Emulator]:
    """Emulators made, in order; the tables of copied schedulers live on the host."""
    copies: list[Any] = []
    deepcopy = copy.deepcopy

    def spy(value: Any, *args: Any) -> Any:
        copies.append(deepcopy(value, *args))
        return copies[-1]

    def host() -> list[torch.Tensor]:
        return [value for value in vars(copies[-1]).values() if isinstance(value, torch.Tensor)] if copies else []

    monkeypatch.setattr("harmonica_rt.loop.copy.deepcopy", spy)
    made: list[Emulator] = []

    def recorder(device: torch.device) -> Emulator:
        made.append(Emulator())
        made[-1].host = host
        return made[-1]

    monkeypatch.setattr(hrt.CompiledTransformer, "_recorder", staticmethod(recorder))
    return made


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_eager_equals_stepping(kind: type, guidance: float) -> None:
    model, sampler = make_dit(in_channels=2, out_channels=2), scheduler(kind)
    schedule = random_schedule(3)
    wanted = stepping(hrt.compile(model, schedule, backend="eager"), sampler, guidance, noise())
    fast = hrt.compile(model, schedule, backend="eager")
    labels = LABELS if guidance > 1 else LABELS[:2]
    for _ in range(2):
        result = fast.trajectory(noise(), sampler, guidance, class_labels=labels)
        assert relative_error(result, wanted) < 1e-5


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_one_graph_equals_stepping(kind: type, emulated: list[Emulator]) -> None:
    model, sampler = make_dit(in_channels=2, out_channels=4), scheduler(kind)
    schedule = random_schedule(3)
    eager = hrt.compile(model, schedule, backend="eager")
    fast = hrt.compile(model, schedule, backend="cudagraph")
    for seed in range(3):
        result = fast.trajectory(noise(seed), sampler, 1.5, class_labels=LABELS)
        assert relative_error(result, stepping(eager, sampler, 1.5, noise(seed))) < 1e-5
        kept = result.clone()
        labels = LABELS.roll(1)
        other = fast.trajectory(noise(9), sampler, 1.5, class_labels=labels)
        assert torch.equal(result, kept), "a result survives the next replay"
        assert not torch.equal(other, result)
    (emulator,) = emulated
    *steps, rows, loop = emulator.graphs
    assert len(steps) == schedule.steps
    assert loop.replays == 6, "one launch a trajectory"
    assert rows.replays == 6, "and one for its modulation rows"
    assert [graph.replays for graph in steps] == [0] * 6
    fast.uncompile()
    assert all(not graph.ops for emulator in emulated for graph in emulator.graphs)


def test_steps_and_loops_take_turns(emulated: list[Emulator]) -> None:
    model, sampler = make_dit(in_channels=2, out_channels=2), scheduler()
    fast = hrt.compile(model, random_schedule(3), backend="cudagraph")
    looped = fast.trajectory(noise(), sampler, 1.5, class_labels=LABELS)
    assert relative_error(stepping(fast, sampler, 1.5, noise()), looped) < 1e-5
    assert torch.equal(fast.trajectory(noise(), sampler, 1.5, class_labels=LABELS), looped)
    fast.trajectory(noise(), sampler, 2.5, class_labels=LABELS)
    (emulator,) = emulated
    assert len(emulator.graphs) == 6 + 1 + 2, "another guidance scale is another graph, in the same memory pool"


def test_few_loops_are_kept(emulated: list[Emulator]) -> None:
    """A loop is a graph of all steps: a sweep of guidance scales must not fill the card."""
    fast = hrt.compile(make_dit(in_channels=2, out_channels=2), random_schedule(3), backend="cudagraph")
    scales = [1.5, 2.0, 2.5, 3.0]
    for scale in (*scales, 1.5, 3.5):
        fast.trajectory(noise(), scheduler(), scale, class_labels=LABELS)
    loops = emulated[0].graphs[6 + 1 :]
    assert len(loops) == LOOPS + 1
    assert [bool(loop.ops) for loop in loops] == [True, False, True, True, True], "2.0 was the least recently used"
    assert loops[0].replays == 2


def test_the_scheduler_is_left_as_it_was() -> None:
    model, sampler = make_dit(in_channels=2, out_channels=2), scheduler(DPMSolverMultistepScheduler)
    before = {name: value for name, value in vars(sampler).items() if not isinstance(value, torch.Tensor)}
    hrt.compile(model, random_schedule(3), backend="eager").trajectory(noise(), sampler, class_labels=LABELS[:2])
    assert {name: value for name, value in vars(sampler).items() if not isinstance(value, torch.Tensor)} == before


@pytest.mark.parametrize(
    ("sampler", "match"),
    [
        (lambda: scheduler(DDPMScheduler), r"deterministic scheduler of .*DDIMScheduler.*, got DDPMScheduler"),
        (lambda: scheduler(UniPCMultistepScheduler), "got UniPCMultistepScheduler"),
        (
            lambda: scheduler(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
            r"got DPMSolverMultistepScheduler with sde-dpmsolver\+\+",
        ),
        (lambda: scheduler(steps=5), "the schedule has 6 steps, but DDIMScheduler has 5 timesteps"),
    ],
)
def test_samplers_that_cannot_be_captured(sampler: Any, match: str) -> None:
    fast = hrt.compile(make_dit(in_channels=2, out_channels=2), random_schedule(3), backend="eager")
    with pytest.raises(ValueError, match=match):
        fast.trajectory(noise(), sampler(), class_labels=LABELS[:2])


def test_timesteps_of_ones_own_are_refused() -> None:
    sampler = scheduler()
    sampler.timesteps = sampler.timesteps + 1
    fast = hrt.compile(make_dit(in_channels=2, out_channels=2), random_schedule(3), backend="eager")
    with pytest.raises(ValueError, match=r"expected timesteps that DDIMScheduler\.set_timesteps\(6\) gives"):
        fast.trajectory(noise(), sampler, class_labels=LABELS[:2])


def test_a_capture_that_fails_names_the_step(emulated: list[Emulator], monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = scheduler()
    fast = hrt.compile(make_dit(in_channels=2, out_channels=2), random_schedule(3), backend="cudagraph")
    fast.trajectory(noise(), sampler, class_labels=LABELS[:2])

    def full(self: Emulator, launch: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Emulator, "capture", full)
    with pytest.raises(CaptureFailed, match="OutOfMemoryError: CUDA out of memory"):
        fast.trajectory(noise(), sampler, 1.5, class_labels=LABELS)
    monkeypatch.undo()


def test_another_scheduler_config_is_another_graph(emulated: list[Emulator]) -> None:
    """Same class, timesteps and guidance, other noise levels: a graph's constants would be stale."""
    model, schedule = make_dit(in_channels=2, out_channels=2), random_schedule(3)
    eager = hrt.compile(model, schedule, backend="eager")
    fast = hrt.compile(model, schedule, backend="cudagraph")
    for sampler in (scheduler(), scheduler(beta_end=0.05), scheduler(prediction_type="v_prediction")):
        result = fast.trajectory(noise(), sampler, 1.5, class_labels=LABELS)
        assert relative_error(result, stepping(eager, sampler, 1.5, noise())) < 1e-5
    fast.trajectory(noise(), scheduler(), 1.5, class_labels=LABELS)
    assert len(emulated[0].graphs) == 6 + 1 + 3, "steps, modulation rows, and a loop for each config"


def test_noise_that_wants_a_gradient_or_is_empty_is_refused() -> None:
    fast = hrt.compile(make_dit(in_channels=2, out_channels=2), random_schedule(3), backend="eager")
    with pytest.raises(RuntimeError, match="needs no gradient"):
        fast.trajectory(noise().requires_grad_(), scheduler(), class_labels=LABELS[:2])
    with pytest.raises(ValueError, match=r"at least one sample and pixel, got \[0, 2, 8, 8\]"):
        fast.trajectory(noise()[:0], scheduler(), 1.5, class_labels=LABELS[:0])


def test_graphs_and_loops_go_with_the_last_reference(emulated: list[Emulator]) -> None:
    gc.collect()
    gc.disable()
    try:
        fast = hrt.compile(make_dit(in_channels=2, out_channels=2), random_schedule(3), backend="cudagraph")
        fast.trajectory(noise(), scheduler(), 1.5, class_labels=LABELS)
        plan = weakref.ref(next(iter(fast._plans.values())))
        del fast
        assert plan() is None
    finally:
        gc.enable()


def test_calls_after_a_trajectory_are_not_held_to_its_timesteps() -> None:
    model, calls = make_dit(in_channels=2, out_channels=2), Calls(6)
    fast = hrt.compile(model, random_schedule(3), backend="eager")
    wanted = calls.run(fast)
    fast.trajectory(noise(), scheduler(), 1.5, class_labels=LABELS)
    assert_close(calls.run(fast), wanted, 0.0)
