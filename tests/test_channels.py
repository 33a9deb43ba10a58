"""Weights per channel: at every level and backend, in files, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import harmonica_rt as hrt
from bench.by_hand.block_reuse import BlockReuse
from bench.by_hand.module_reuse import ModuleReuse
from harmonica_rt.forecast import history
from harmonica_rt.lowering import lower, lower_forward

from .conftest import BACKENDS, Calls, TextCalls, assert_close, make_dit, make_pixart
from .emulator import Emulator

STEPS, WIDTH = 7, {"DiTTransformer2DModel": 16, "PixArtTransformer2DModel": 24}
LEVELS = {"branches": {}, "one group": {"level": "blocks"}, "groups": {"level": "blocks", "groups": 2}, "output": {}}
levels = pytest.mark.parametrize("level", LEVELS)


def random_channels(model: nn.Module, level: str, seed: int = 0, order: int = 2, carry: float = 0.5) -> hrt.Schedule:
    """Random entries reused, some steps' outputs too, all with weights per channel."""
    rng = np.random.default_rng(seed)
    options = {"level": "output"} if level == "output" else LEVELS[level]
    schedule = hrt.Schedule.full(model, STEPS, order=order, **options)
    output = rng.random(STEPS) < (0.6 if level == "output" else 0.2)
    output[0] = False
    if schedule.groups:
        compute = (rng.random(schedule.compute.shape) < 0.5) & ~output[:, None, None]
        compute[0] = True
        schedule = schedule.replace(compute=compute, output=output)
    else:
        schedule = schedule.replace(output=output)
    return with_channels(model, schedule, rng, carry)


def with_channels(model: nn.Module, schedule: hrt.Schedule, rng: np.random.Generator, carry: float) -> hrt.Schedule:
    order, output = schedule.order, schedule.output
    fields: dict[str, Any] = {}
    if schedule.groups:
        reused = ~schedule.compute & ~output[:, None, None]
        exists = (history(schedule.compute, order) >= 0) & reused[..., None]
        if schedule.level == "blocks":
            exists = np.concatenate([exists, reused[..., None]], -1)
            fields["carry"] = np.where(reused, carry, 0.0)
        width = WIDTH[schedule.model]
        fields["channels"] = rng.normal(0, 0.2, (*exists.shape, width)) * exists[..., None]
    exists = (history(~output, order) >= 0) & output[:, None]
    channels = model.out_channels if hasattr(model, "out_channels") else model.config.out_channels
    fields["output_channels"] = rng.normal(0, 0.2, (*exists.shape, channels)) * exists[..., None]
    return schedule.replace(**fields)


def calls_for(model: nn.Module, seed: int = 0, **options: Any) -> Any:
    return Calls(STEPS, seed=seed, **options) if "DiT" in type(model).__name__ else TextCalls(model, STEPS, seed=seed)


def expected(model: nn.Module, schedule: hrt.Schedule, calls: Any) -> list[torch.Tensor]:
    oracle = (ModuleReuse if schedule.level == "branches" else BlockReuse)(model, schedule)
    try:
        return calls.run(oracle)
    finally:
        oracle.remove()


@levels
@pytest.mark.parametrize("make", [make_dit, make_pixart])
@pytest.mark.parametrize("seed", range(4))
def test_they_equal_the_oracle(level: str, make: Any, seed: int) -> None:
    model = make()
    schedule = random_channels(model, level, seed, order=seed % 3)
    fast, calls = hrt.compile(model, schedule, backend="eager"), calls_for(model)
    wanted = expected(model, schedule, calls)
    assert_close(calls.run(fast), wanted, 1e-4)
    assert_close(calls.run(fast), wanted, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("make", [make_dit, make_pixart])
def test_inductor_takes_them(make: Any, backend: str) -> None:
    model = make()
    schedule = random_channels(model, "branches")
    fast, calls = hrt.compile(model, schedule, backend=backend), calls_for(model)
    assert_close(calls.run(fast), expected(model, schedule, calls), 1e-4)


@levels
def test_graphs_take_them(level: str) -> None:
    pytest.importorskip("triton")
    model = make_dit()
    for seed in range(3):
        schedule = random_channels(model, level, seed)
        fast, calls = hrt.compile(model, schedule, backend="cudagraph"), calls_for(model)
        fast._recorder = Emulator
        wanted = expected(model, schedule, calls)
        for _ in range(2):
            assert_close(calls.run(fast), wanted, 1e-4)


def test_at_branches_they_cost_neither_slot_nor_launch(dit: nn.Module) -> None:
    plain = hrt.Schedule.uniform(dit, STEPS, 3, 2)
    rng = np.random.default_rng(0)
    channels = with_channels(dit, plain, rng, 0.0).replace(output_channels=None)
    calls, reports = Calls(STEPS), []
    for schedule in (plain, channels):
        fast = hrt.compile(dit, schedule, backend="eager")
        calls.run(fast)
        reports.append(fast.report().plans[0])
    assert (reports[0].slots, reports[0].slot_bytes) == (reports[1].slots, reports[1].slot_bytes)
    assert reports[0].launches == reports[1].launches
    assert lower(channels).distinct_steps <= lower(plain).distinct_steps
    terms = max(sum(len(gap.terms) for gap in step.gaps) for step in lower(channels).steps)
    rows = fast._plans[next(iter(fast._plans))].buffers.rows.shape[2]
    assert rows <= 6 * 3 + 2 + terms


def test_at_blocks_they_cost_no_slot(dit: nn.Module) -> None:
    plain = hrt.Schedule.uniform(dit, STEPS, 3, 2, level="blocks", carry=0.5)
    channels = with_channels(dit, plain, np.random.default_rng(0), 0.5)
    assert lower_forward(channels).slots == lower_forward(plain).slots


@levels
def test_zeros_are_the_schedule_without(level: str) -> None:
    model = make_dit()
    schedule = random_channels(model, level)
    bare = schedule.replace(channels=None, output_channels=None)
    zero = schedule.replace(
        channels=None if schedule.channels is None else schedule.channels * 0,
        output_channels=schedule.output_channels * 0,
    )
    calls = Calls(STEPS)
    outputs = [calls.run(hrt.compile(model, each, backend="eager")) for each in (bare, zero)]
    assert_close(*outputs, 0.0)


@levels
def test_a_run_midway_keeps_those_whose_history_is_the_same(level: str) -> None:
    model = make_dit()
    schedule = random_channels(model, level)
    left = schedule.starting_at(3)
    for name in ("channels", "output_channels"):
        channels, was = getattr(left, name), getattr(schedule, name)
        if channels is None:
            continue
        changed = (channels != was[3:]).any(-1)
        assert not channels[changed].any(), "another history: 0"
    calls = calls_for(model)
    fast = hrt.compile(model, schedule.replace(timesteps=calls.timesteps), backend="eager")
    again = hrt.compile(model, left, backend="eager")
    assert_close(calls.run(fast, first=3), calls.run(again, first=3), 1e-5)


# ---- files


@levels
def test_a_schedule_with_channels_is_one_safetensors_file(level: str, tmp_path: Path) -> None:
    schedule = random_channels(make_dit(), level).replace(note="by hand")
    schedule.save(tmp_path / "s.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]
    loaded = hrt.Schedule.load(tmp_path / "s.safetensors")
    assert loaded == schedule
    assert loaded.learned
    assert "per channel" in repr(loaded)
    assert (tmp_path / "s.safetensors").read_bytes()[:4096].find(b"by hand") > 0, "readable"


def test_weights_per_channel_need_a_safetensors_file_which_any_may_have(tmp_path: Path) -> None:
    model = make_dit()
    with pytest.raises(ValueError, match=r"expected a .safetensors file for weights per channel, got 's.json'"):
        random_channels(model, "one group").save(tmp_path / "s.json")
    assert not list(tmp_path.iterdir())
    schedule = hrt.Schedule.uniform(model, 6)
    schedule.save(tmp_path / "s.safetensors")
    assert hrt.Schedule.load(tmp_path / "s.safetensors") == schedule


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    schedule = random_channels(make_dit(), "one group")
    schedule.save(path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"s\.safetensors: not a schedule file"):
            hrt.Schedule.load(path)
    rows = {"channels": np.zeros((2, 4, 16), dtype=np.float32)}
    text = {"schedule": json.dumps({"format": "harmonica_rt.schedule", "version": 9})}
    good = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    for arrays, metadata, message in [
        ({"weight": np.zeros(3)}, None, "unknown tensor 'weight'"),
        (rows, None, "expected the schedule's text in its metadata, got none"),
        (rows, text, "schema version"),
        (rows, good, r"channels: expected \[\d+, 4, channels\], got \[2, 4, 16\]"),
    ]:
        save_file(arrays, path, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            hrt.Schedule.load(path)


# ---- refusals


def test_wrong_channels_are_named() -> None:
    model = make_dit()
    schedule = hrt.Schedule.uniform(model, 4, 2, level="blocks")
    good = np.zeros((4, 1, 1, 3, 16), dtype=np.float32)
    first, computed = good.copy(), good.copy()
    first[1, 0, 0, 1] = 1.0
    computed[2, 0, 0, 0] = 1.0
    for channels, error, message in [
        (good[..., :2, :], ValueError, r"channels: expected shape \[4, 1, 1, 3, channels\], got \[4, 1, 1, 2, 16\]"),
        (good.astype(int), TypeError, "channels: expected a float dtype, got int64"),
        (good + np.nan, ValueError, "channels: expected finite numbers, got nan"),
        (first, ValueError, r"channels: value 1 \(0 = newest\) does not exist yet at step 1, layer 0, branch 0"),
        (computed, ValueError, "channels: expected 0 where a branch is computed"),
    ]:
        with pytest.raises(error, match=message):
            schedule.replace(channels=channels)
    with pytest.raises(ValueError, match=r"output_channels: expected shape \[4, 2, channels\], got \[4, 3, 8\]"):
        schedule.replace(output_channels=np.zeros((4, 3, 8)))


@pytest.mark.parametrize("level", ["branches", "blocks"])
def test_channels_of_another_width_are_refused(dit: nn.Module, level: str) -> None:
    schedule = hrt.Schedule.uniform(dit, 4, 2, level=level)
    channels = np.zeros((*schedule.compute.shape, 2 + (level == "blocks"), 12), dtype=np.float32)
    channels[1, ..., 0, :] = 0.1
    fast, calls = hrt.compile(dit, schedule.replace(channels=channels), backend="eager"), Calls(4)
    with pytest.raises(ValueError, match=r"expected (16 channels.*got a schedule with 12|trunk of 12 channels)"):
        calls.run(fast)
