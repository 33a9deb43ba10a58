"""Every denoiser class of diffusers, as its pipeline calls it: at level blocks or output, against reuse by hand."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers.models.transformers
import diffusers.models.unets
import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import Schedule
from tests.conftest import relative_error
from tests.models.by_hand import ByHand, Run, blocks_of, learned, outputs_by_hand, replaced, run, tensors
from tests.models.denoisers import CANNOT_RUN, DENOISERS, NOT_DENOISERS, STEPS, Denoiser

OUTPUT_ONLY = {name for name in DENOISERS if "UNet" in name}
WITH_BLOCKS = [name for name in DENOISERS if name not in OUTPUT_ONLY]
NOTHING_TO_CARRY = {  # what comes out of the trunk is no stream that goes into it: text blocks first, or both joined
    "AuraFlowTransformer2DModel",
    "BriaFibo2Transformer2DModel",
    "BriaFiboTransformer2DModel",
    "ChromaTransformer2DModel",
    "Flux2Transformer2DModel",
    "Flux3Transformer2DModel",
    "HiDreamImageTransformer2DModel",
    "Kandinsky5Transformer3DModel",
    "Kandinsky6Transformer3DModel",
    "LatteTransformer3DModel",
    "Lumina2Transformer2DModel",
    "ZImageTransformer2DModel",
}
READ_BETWEEN = {"RFD4ProteinaTransformer"}  # modules that are no blocks read what a block within a group returns


def model_classes() -> set[str]:
    """The model classes defined in diffusers' folders of transformers and UNets, by name."""
    names = set()
    for package in (diffusers.models.transformers, diffusers.models.unets):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for name, value in vars(module).items():
                if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == info.name:
                    names.add(name)
    return names


def times(denoiser: Denoiser, model: nn.Module) -> list[float]:
    """The timesteps of a run, as the model is given them; none if it has no argument of that name."""
    calls = [denoiser.call(model, step) for step in range(STEPS)]
    found = [call.get("timestep", call.get("t", call.get("timesteps"))) for call in calls]
    return [float(t.max()) for t in found if t is not None]


def compiled(denoiser: Denoiser, model: nn.Module, schedule: Schedule) -> nn.Module:
    """`model` on `schedule`, which has the timesteps where they rise."""
    known = times(denoiser, model)
    if known and known[0] < known[-1]:
        schedule = schedule.replace(timesteps=known)
    return hrt.compile(model, schedule, backend="eager")


def run_again(denoiser: Denoiser, model: nn.Module, fast: nn.Module) -> list[Run]:
    """Another run; calls without a timestep are counted, so that its start must be told."""
    if not times(denoiser, model):
        fast.reset()
    return run(denoiser, model, fast)


def trunk_of(model: nn.Module) -> list[list[nn.Module]]:
    """All blocks, as one group; a schedule of several groups names their lists."""
    names = [group.name for group in Schedule.full(model, STEPS, level="blocks", groups=2).groups]
    return [[block for blocks in blocks_of(model, names).values() for block in blocks]]


def assert_same(actual: list[Run], expected: list[Run]) -> None:
    for step, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert all(torch.equal(x, y) for x, y in zip(a, e, strict=True)), f"step {step} differs"


def assert_close(actual: list[Run], expected: list[Run], tolerance: float = 1e-5) -> None:
    for step, (a, e) in enumerate(zip(actual, expected, strict=True)):
        for x, y in zip(a, e, strict=True):
            assert x.dtype == y.dtype
            assert relative_error(x, y) <= tolerance, f"step {step}: {relative_error(x, y):.1e} above {tolerance:.0e}"


def test_no_class_is_forgotten() -> None:
    listed = [*DENOISERS, *NOT_DENOISERS, *CANNOT_RUN]
    assert len(listed) == len(set(listed))
    assert set(listed) == model_classes()
    levels = Counter(Schedule.full(denoiser.make(), STEPS).level for denoiser in DENOISERS.values())
    assert levels["output"] == len(OUTPUT_ONLY)
    print(f"{len(DENOISERS)} denoisers: {dict(levels)}; {len(NOT_DENOISERS)} others, {len(CANNOT_RUN)} cannot run here")


@pytest.mark.parametrize("name", DENOISERS)
def test_runs(name: str) -> None:
    denoiser = DENOISERS[name]
    model = denoiser.make()
    first, again, second = run(denoiser, model, model, [0, 0, 1])
    assert first and all(t.isfinite().all() for t in first + second)
    assert_same([first], [again])
    assert not any(torch.equal(a, b) for a, b in zip(first, second))
    assert all(parameter.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", DENOISERS)
def test_full_is_the_model_itself_and_the_output_can_be_reused(name: str) -> None:
    denoiser = DENOISERS[name]
    model = denoiser.make()
    plain = run(denoiser, model, model)
    for level in ("output",) if name in OUTPUT_ONLY else ("output", "blocks"):
        full = Schedule.full(model, STEPS, level=level)
        assert_same(run(denoiser, model, compiled(denoiser, model, full)), plain)

    schedule = Schedule.uniform(model, STEPS, every=3, level="output")
    assert_close(run(denoiser, model, compiled(denoiser, model, schedule)), outputs_by_hand(schedule, plain))


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_trunk(name: str, tmp_path: Path) -> None:
    """One group: the streams after the last block; at reused steps no block runs."""
    denoiser = DENOISERS[name]
    model = denoiser.make()
    schedule = learned(Schedule.uniform(model, STEPS, every=2, level="blocks"))
    schedule.save(tmp_path / "s.json")
    blocks = trunk_of(model)
    fast = compiled(denoiser, model, Schedule.load(tmp_path / "s.json"))
    ran = Counter()

    def count(entry: int, forward: Callable, args: tuple, kwargs: dict) -> Any:
        ran[step] += 1
        return forward(*args, **kwargs)

    actual = run(denoiser, model, fast)
    arguments = [denoiser.call(model, step) for step in range(STEPS)]
    fast.reset()
    with replaced(blocks, count), torch.no_grad():
        for step in range(STEPS):
            assert_same([list(tensors(fast(**arguments[step])))], [actual[step]])
    assert [step for step in range(STEPS) if ran[step]] == [0, 2, 4]
    assert_same(run_again(denoiser, model, fast), actual)
    assert_close(actual, ByHand(denoiser, model, schedule, blocks).run())


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_trunk_with_a_carry(name: str) -> None:
    denoiser = DENOISERS[name]
    model = denoiser.make()
    schedule = learned(Schedule.uniform(model, STEPS, every=3, level="blocks", carry=0.7))
    fast = compiled(denoiser, model, schedule)
    if name in NOTHING_TO_CARRY:
        with pytest.raises(
            hrt.UnsupportedModelError, match="carry: expected among the arguments of trunk's first block"
        ):
            run(denoiser, model, fast)
    else:
        assert_close(run(denoiser, model, fast), ByHand(denoiser, model, schedule, trunk_of(model)).run())


def two_groups(model: nn.Module, together: bool) -> Schedule:
    """Two groups a list with a carry, computed at every second step or each at steps of its own."""
    schedule = Schedule.uniform(model, STEPS, level="blocks", groups=2)
    if not together:
        compute = np.random.default_rng(0).random(schedule.compute.shape) < 0.4
        compute[0] = True
        carry = np.where(compute, 0.0, 1.0)
        schedule = Schedule(compute, model=schedule.model, level="blocks", groups=schedule.groups, carry=carry)
    return learned(schedule)


@pytest.mark.parametrize("name", WITH_BLOCKS)
@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
def test_groups(name: str, together: bool) -> None:
    denoiser = DENOISERS[name]
    model = denoiser.make()
    schedule = two_groups(model, together)
    fast = compiled(denoiser, model, schedule)
    if not together and name in READ_BETWEEN:
        with pytest.raises(hrt.UnsupportedModelError, match="depends on nothing but the streams after"):
            run(denoiser, model, fast)
        return
    groups = [
        list(part)
        for group in schedule.groups
        for part in np.array_split(np.array(blocks_of(model, [group.name])[group.name], dtype=object), group.layers)
    ]
    actual = run(denoiser, model, fast)
    assert_same(run_again(denoiser, model, fast), actual)
    assert_close(actual, ByHand(denoiser, model, schedule, groups).run())


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("level", ["blocks", "output"])
def test_a_step_on_the_same_input_is_the_same(name: str, level: str) -> None:
    denoiser = DENOISERS[name]
    if level == "blocks" and name in OUTPUT_ONLY:
        return
    model = denoiser.make()
    for options in [{}] if level == "output" else [{}, {"groups": 2}]:
        schedule = Schedule.uniform(model, 2, order=0, level=level, **options)
        fast = hrt.compile(model, schedule, backend="eager")
        out = []
        for step in range(2):
            with fast.cache_context("all", step_index=step):
                out += run(denoiser, model, fast, [0])
        assert_close(out[1:], out[:1], 1e-6)
