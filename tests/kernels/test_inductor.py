"""Machines that cannot compile: the reason reaches the user, once, and `auto` still samples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._inductor import config

import harmonica_rt as hrt
from harmonica_rt.kernels import inductor
from harmonica_rt.kernels.gap_torch import compiled_gap
from harmonica_rt.kernels.gelu import compiled_gelu

from ..conftest import Calls, assert_close, needs_compiler, random_schedule


@pytest.fixture
def no_compiler() -> Iterator[None]:
    memos = (compiled_gap, compiled_gelu, inductor.missing_compiler)
    for memo in memos:
        memo.cache_clear()
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield
    for memo in memos:
        memo.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_auto_falls_back_to_eager_and_says_why(dit: torch.nn.Module) -> None:
    fast, calls = hrt.compile(dit, hrt.Schedule.full(dit, 3)), Calls(3)
    with pytest.warns(UserWarning, match="runs its eager backend, not inductor: TorchInductor cannot compile"):
        outputs = calls.run(fast)
    assert_close(outputs, calls.run(dit), 1e-5)
    assert fast.report().plans[0].backend == "eager"
    assert "TorchInductor cannot compile" in fast.report().fallback
    assert "fallback to eager" in str(fast.report())


@pytest.mark.usefixtures("no_compiler")
def test_inductor_asked_for_by_name_raises(dit: torch.nn.Module) -> None:
    fast = hrt.compile(dit, hrt.Schedule.full(dit, 3), backend="inductor")
    with pytest.raises(inductor.CompilerMissing, match="cannot compile for cpu"):
        Calls(3).run(fast)


@needs_compiler
def test_auto_takes_inductor_where_it_works(dit: torch.nn.Module) -> None:
    fast = hrt.compile(dit, hrt.Schedule.full(dit, 3))
    Calls(3).run(fast)
    assert fast.report().fallback is None
    assert [plan.backend for plan in fast.report().plans] == ["inductor"]


@needs_compiler
def test_a_second_schedule_on_the_same_shapes_compiles_nothing(dit: torch.nn.Module) -> None:
    calls = Calls(6)
    calls.run(hrt.compile(dit, random_schedule(1), backend="inductor"))
    before = compiled_gap.cache_info().misses, compiled_gelu.cache_info().misses
    for seed, order in ((2, 0), (3, 1), (4, 2)):
        calls.run(hrt.compile(dit, random_schedule(seed, order=order, reuse=0.9), backend="inductor"))
    assert (compiled_gap.cache_info().misses, compiled_gelu.cache_info().misses) == before
