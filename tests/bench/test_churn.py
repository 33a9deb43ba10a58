"""What comes and goes leaves nothing: a part of the campaign, and that it sees what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.run_churn import main
from bench.trust import churning
from bench.trust.churning import cycles, runs
from harmonica_rt.branch_engine import BranchEngine
from harmonica_rt.cuda_graphs import StepGraphs

pytest.importorskip("triton")


def test_runs_over_shapes_in_threads_leave_nothing() -> None:
    tally = runs(48)
    assert not tally.failures, tally.failures
    assert (tally.count, tally.threads) == (48, 48)
    assert tally.peak_plans == tally.kept == 16 and tally.plans[-1] == tally.graphs[-1] == tally.graph_bytes[-1] == 0
    assert max(tally.graphs) > 8 and max(tally.graph_bytes) > 0


@pytest.mark.parametrize("backend", ["eager", "cudagraph"])
def test_cycles_leave_nothing(backend: str) -> None:
    tally = cycles(3, backend)
    assert not tally.failures and tally.peak_plans == 1 and tally.plans[-1] == 0


def test_plans_that_stay_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    free = BranchEngine.free_plans

    def keep(engine: BranchEngine) -> None:
        kept.extend(engine.plans.values())
        free(engine)

    monkeypatch.setattr(BranchEngine, "free_plans", keep)
    failures = cycles(3, "eager").failures
    assert any("plans alive once all was uncompiled" in failure for failure in failures), failures


def test_graphs_that_stay_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    def keep(graphs: StepGraphs) -> None:
        kept.extend(graphs.graphs.values())

    monkeypatch.setattr(StepGraphs, "release", keep)
    failures = cycles(3, "cudagraph").failures
    assert any("graphs alive once all was uncompiled" in failure for failure in failures), failures


def test_memory_that_grows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter(range(2**30, 2**40, 2**23))
    monkeypatch.setattr(churning, "status_bytes", lambda name: next(told))
    assert any("more resident than once warm" in failure for failure in cycles(5, "eager").failures)


def test_the_command_writes_a_line_a_part(tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    assert main(["--runs", "8", "--cycles", "2", "--backend", "eager", "--out", str(out)]) == 0
    assert [json.loads(line)["count"] for line in out.read_text().splitlines()] == [8, 2]
