"""The campaign: a part with fixed seeds; it catches what is planted, and scripts of failures fail by themselves."""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import run_fuzz
from bench.fuzz import Case, Change, Plan, Recompile, Run, Wrong, oracle, play
from bench.fuzz import case as cases
from bench.fuzz.campaign import BACKENDS, LEVELS, play_chunk
from bench.fuzz.drawing import draw
from bench.fuzz.oracle import lagrange
from bench.fuzz.rounding import allowed, error, reach
from bench.fuzz.shrinking import failure_of, shrink, simpler
from bench.fuzz.subject import Subject
from harmonica_rt import branch_engine, forward_engine
from harmonica_rt.executor import Plan as BranchPlan
from harmonica_rt.kept_streams import Values

ROOT = Path(__file__).resolve().parent.parent.parent
DIT, FLUX, WAN = "DiTTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel, text to video"


@pytest.mark.parametrize("backend", ["eager", "cudagraph"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("model", [DIT, FLUX, "PixArtTransformer2DModel", WAN])
def test_a_part_of_the_campaign(model: str, level: str, backend: str) -> None:
    if backend == "cudagraph":
        pytest.importorskip("triton")
    chunk = play_chunk(1, 0, level, backend, model=model, cases=3 if backend == "eager" else 1, seconds=60)
    assert not chunk.failures, "\n".join(chunk.failures)
    assert chunk.calls > chunk.runs > 0


def test_cases_come_from_their_seed_and_say_all_of_themselves() -> None:
    subject = Subject(DIT)
    drawn = [draw(random.Random(7), subject, "blocks", "eager") for _ in range(2)]
    assert drawn[0] == drawn[1]
    rng = random.Random(0)
    for level in LEVELS:
        for _ in range(50):
            case = draw(rng, subject, level, "eager")
            assert eval(cases.source(case), vars(cases)) == case


# ---- the oracle


def test_polynomials() -> None:
    for nodes in ([3.0], [4.0, 2.0], [7.0, 4.0, 1.5]):
        values = [sum(x**power for power in range(len(nodes))) for x in nodes]
        got = sum(w * v for w, v in zip(lagrange(9.0, nodes), values))
        assert got == pytest.approx(sum(9.0**power for power in range(len(nodes))))


def test_the_oracle_imports_nothing_of_the_runtime() -> None:
    tree = ast.parse(Path(oracle.__file__).read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    ours = {name for name in names if name.split(".")[0] in ("harmonica_rt", "bench", "tests")}
    assert ours == {"bench.by_hand.module_reuse"}, "which reads a schedule's arrays, too"


def test_rounding_reaches_as_far_as_a_dtype_rounds() -> None:
    for dtype in ("float32", "float64", "bfloat16"):
        subject = Subject(DIT, dtype)
        eps, theirs = torch.finfo(subject.dtype).eps, subject._output()
        found = reach(subject.dtype, subject.twin, subject._output, theirs)
        assert 2 * eps < found < 1000 * eps
    assert error([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])]) == pytest.approx(0.2)
    assert error([torch.tensor([torch.nan])], [torch.tensor([1.0])]) == float("inf")
    assert allowed(torch.float32) < 1e-5


# ---- what it found


def test_groups_in_turn_keep_what_they_should_while_others_are_reused() -> None:
    """Latte's blocks alternate between two lists: what one keeps at a step is of the other's stand-ins."""
    plan = Plan(("1111", "1101", "0111"), "000", order=0)
    tally = play(Case("LatteTransformer3DModel", "blocks", (plan,), groups=2), Subject("LatteTransformer3DModel"))
    assert (tally.calls, tally.refused) == (3, None)


@pytest.mark.parametrize("model", ["T5FilmDecoder", "Cosmos3OmniTransformer"])
def test_a_sample_that_is_not_the_first_argument(model: str) -> None:
    """A run after one that was cut short at its first step is not taken for another call of that step."""
    plan, runs = Plan(("", ""), "01", order=0), (Run(stop=1), Run(seed=42))
    tally = play(Case(model, "output", (plan,), runs), Subject(model))
    assert (tally.runs, tally.refused) == (2, None)


# ---- what is planted is caught

PLAN = {
    "branches": Plan(("111111", "010111", "000000", "111111", "000000", "001100"), "000000"),
    "blocks": Plan(("1", "0", "0", "1", "0", "0"), "000000", order=1),
    "output": Plan(("",) * 6, "011011"),
}
levels = pytest.mark.parametrize("level", LEVELS)


def case_of(level: str, **changes: Any) -> Case:
    return replace(Case(DIT, level, (PLAN[level],), (Run(1), Run(2, stop=4), Run(3))), **changes)


def caught(case: Case) -> str:
    with pytest.raises(Wrong) as found:
        play(case, Subject(case.model, case.dtype))
    return str(found.value)


@levels
def test_without_a_bug_there_is_no_failure(level: str) -> None:
    tally = play(case_of(level), Subject(DIT))
    assert (tally.runs, tally.calls, tally.refused) == (3, 16, None)
    assert tally.worst < 1e-5


def heavier(schedule: Any) -> Any:
    """Weights a thousandth larger than the schedule's."""
    weights, outputs = (np.where(w != 0, w + 1e-3, 0.0) for w in (schedule.weights, schedule.output_weights))
    return schedule.replace(weights=weights, output_weights=outputs)


@levels
def test_a_weight_changed_by_a_thousandth(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_schedules(monkeypatch, heavier)
    assert "relative error" in caught(case_of(level))


@levels
def test_a_step_computed_too_few(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fewer(schedule: Any) -> Any:
        compute, output = schedule.compute.copy(), schedule.output.copy()
        compute[3:] = False
        output[3:] |= level == "output"
        return schedule.replace(compute=compute, output=output)

    plant_in_schedules(monkeypatch, fewer)
    assert "step 3" in caught(case_of(level))


def plant_in_schedules(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """What is lowered is another schedule than the oracle reads."""
    lower, lower_forward = branch_engine.lower, forward_engine.lower_forward
    monkeypatch.setattr(branch_engine, "lower", lambda schedule: lower(change(schedule)))
    monkeypatch.setattr(forward_engine, "lower_forward", lambda schedule: lower_forward(change(schedule)))


@levels
def test_a_stale_value_kept_across_runs(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a schedule's first computed step, or of what a run is conditioned on: no run after the first writes it."""
    if level == "branches":
        plant_once(monkeypatch, BranchPlan, "modulate")
    else:
        plant_once(monkeypatch, Values, "keep")
    plan = PLAN[level]
    assert "relative error" in caught(
        case_of(
            level, plans=(replace(plan, compute=plan.compute[:3], output=plan.output[:3]),), events=(Run(1), Run(2))
        )
    )


def plant_once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """A method that does nothing where it has been called with the same number on the same object."""
    method, called = getattr(owner, name), set()

    def once(self: Any, number: int, *rest: Any) -> None:
        if (id(self), number) not in called:
            called.add((id(self), number))
            method(self, number, *rest)

    monkeypatch.setattr(owner, name, once)


def test_half_of_a_batch_that_is_the_other_half(monkeypatch: pytest.MonkeyPatch) -> None:
    from harmonica_rt import engine

    kept = engine.half_kept
    monkeypatch.setattr(engine, "half_kept", lambda *args: 1 - kept(*args))
    for level in LEVELS:
        assert "step 4" in caught(case_of(level, events=(Run(1, half=(4, 1)),)))


def test_an_error_that_is_no_documented_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: Any, *args: Any) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(Values, "keep", breaks)
    assert caught(case_of("blocks")) == "raised KeyError: 'planted'"


@levels
def test_what_happens_to_a_model_is_followed(level: str) -> None:
    """No failure, whatever comes between runs and within them, and all of it is played."""
    events = (
        *(Run(1, beside=5), Change("in place", 1), Run(2), Change("parameter", 2), Run(3, fails=(2, 20))),
        *(Run(4, contexts=2, named=True), Change("load", 3), Run(5, start=2), Recompile(), Run(6, half=(3, 0))),
        *(Change("load compiled", 4), Run(7, batch=3), Run(8, refused=2), Run(9, contexts=2), Run(10, stop=2), Run(11)),
    )
    tally = play(case_of(level, events=events, second=PLAN[level]), Subject(DIT))
    assert tally.refused is None
    assert {*tally.events} >= {
        "half",
        "exception",
        "refused call",
        "interleaved",
        "midway",
        "contexts",
        "load compiled",
    }


@pytest.mark.parametrize("change", ["in place", "parameter", "load"])
def test_changes_that_do_not_reach_the_runtime(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models differ then, and only the change tells."""
    from bench.fuzz import changes

    own = changes._change
    monkeypatch.setattr(
        changes, "_change", lambda how, model, fast, *rest: fast is None and own(how, model, fast, *rest)
    )
    assert "relative error" in caught(case_of("blocks", events=(Run(1), Change(change, 1), Run(2))))


# ---- failures


def test_a_failure_shrinks_to_a_script_that_fails_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = case_of("blocks", dtype="float64", sampler="DDIMScheduler", listed=True)
    events = (Run(1), Change("in place", 1), Run(2, stop=4), Recompile(), Run(3, batch=4))
    case = replace(case, plans=(replace(PLAN["blocks"], order=2, weights=5, carry=0.5),), events=events)
    plant_in_schedules(monkeypatch, heavier)
    failure = failure_of(case)
    small, why = shrink(case, failure, seconds=60)
    # A norm without weights follows: of a stream that is larger as a whole it shows nothing
    assert small == Case(DIT, "blocks", (Plan(("1", "0"), "00", order=0, carry=0.5),), (Run(),))
    assert failure_of(small) == why

    path = tmp_path / "failure.py"
    path.write_text(cases.script(small, why))
    assert len(path.read_text().splitlines()) < 20
    plant = "from harmonica_rt import forward_engine as f\nwas = f.lower_forward\n"
    plant += "f.lower_forward = lambda s: was(s.replace(weights=s.weights * 1.001))\n"
    path.write_text(plant + path.read_text())
    run = subprocess.run([sys.executable, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "Wrong: step 1: relative error" in run.stderr


def test_simpler_cases_are_other_cases() -> None:
    rng, subject = random.Random(3), Subject(FLUX)
    for level in LEVELS:
        for _ in range(10):
            case = draw(rng, subject, level, "eager")
            assert all(candidate != case for candidate in simpler(case))


def test_a_campaign_goes_on_behind_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_schedules(monkeypatch, heavier)
    chunk = play_chunk(2, 0, "output", "eager", model=DIT, cases=4, seconds=60, shrinking=0.0)
    assert chunk.cases == 4 and len(chunk.failures) > 1


def test_lines_add_up_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, written = tmp_path / "lines.jsonl", tmp_path / "FUZZ.md"
    arguments = ["--model", DIT, "--chunk", "0.2", "--level", "output", "--out", str(out)]
    for seed in (1, 2, 1):
        assert run_fuzz.main(["--seconds", "0.1", "--seed", str(seed), *arguments]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["seed"], line["number"]) for line in lines] == [(1, 0), (2, 0), (1, 1)]
    assert run_fuzz.main(["--out", str(out), "--page", str(written)]) == 0
    text = written.read_text()
    assert f"{sum(line['runs'] for line in lines):,} runs" in text and f"| {DIT} |" in text
    assert set(BACKENDS) >= {line["backend"] for line in lines}
