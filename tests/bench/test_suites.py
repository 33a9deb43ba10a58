"""The suites measure what they say; their times are nobody's business here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.suites import bench_branches, bench_lowering, bench_step

from ..conftest import needs_compiler, relative_error

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "bench").rglob("*.py") if "models" not in path.parts)
BRANCHES = [(size, branch, "eager") for size, branch in bench_branches.BRANCHES]
BRANCHES += [pytest.param("dit-s-2", "mlp", "inductor", marks=needs_compiler)]


@pytest.mark.parametrize(("size", "branch", "implementation"), BRANCHES)
def test_branches_are_diffusers_modules(size: str, branch: str, implementation: str) -> None:
    y = torch.randn(bench_branches.plan(size).buffers.stream)
    with torch.no_grad():
        expected, actual = (
            bench_branches.IMPLEMENTATIONS[name](size, branch)(y) for name in ("diffusers", implementation)
        )
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("percent", [0, 25, 50, 75, 100])
def test_the_step_that_is_timed_reuses_its_share(percent: int) -> None:
    compute = bench_step.schedule(percent).compute
    assert compute[:-1].all()
    assert np.array_equal(1 - compute[-1].mean(axis=0), [percent / 100] * 2), "of each branch"


def test_sizes_are_the_published_ones() -> None:
    plans = [bench_lowering.schedule(size, 20, "uniform:2") for size in bench_lowering.SIZES]
    assert [plan.compute.shape for plan in plans] == [(20, 28, 2), (20, 28, 3)]
    assert bench_lowering.schedule("dit-xl-2", 50, "random:50").cur == pytest.approx(0.49, abs=0.02)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_bench_can_be_imported(path: Path) -> None:
    import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
