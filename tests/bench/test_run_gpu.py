"""bench-gpu without a GPU: all of it on a CPU, what it loses to errors and signals, what it makes of lines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import run_gpu
from bench.gpu import environment, gap, profile, report
from bench.gpu.machine import Machine, Rehearsal
from bench.gpu.record import SHARES, STAGES, Case, DeviceLost, Log, Record, read

from ..emulator import Emulator

SCRIPT = Path(run_gpu.__file__)


class Card(Rehearsal):
    """A machine that can be lost."""

    lost = False

    def usable(self) -> bool:
        return not self.lost


def lines(path: Path, *kinds: str) -> list[dict[str, Any]]:
    return [line for line in read(path) if not kinds or line["kind"] in kinds]


def case(run: Callable[[Log], None], name: str = "a", seconds: float = 1.0, stage: str = "correct") -> Case:
    return Case(stage, name, seconds, run)


def figure(log: Log) -> None:
    log.figure(value=1)


def broken(log: Log) -> None:
    log.figure(value=0)
    raise ArithmeticError("planted")


# ---- the whole of it


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run make bench-gpu")
def test_without_cuda_it_says_so_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_gpu.main(["--out", str(tmp_path / "gpu")]) == 2
    assert "expected a CUDA device, found none; nothing was measured" in capsys.readouterr().out
    assert not (tmp_path / "gpu").exists()


def test_a_dry_run_runs_every_stage_and_its_report_shows_it(tmp_path: Path) -> None:
    """The very code that runs on a card, at once and without an error."""
    began = time.monotonic()
    assert run_gpu.main(["--dry-run", "--rounds", "2", "--out", str(tmp_path)]) == 0
    assert time.monotonic() - began < 400, "3 minutes on a core of its own"
    (path,) = tmp_path.glob("dry-run-*.jsonl")
    assert not lines(path, "failed", "skipped")
    assert {line["stage"] for line in lines(path, "figure")} == set(STAGES)
    assert lines(path)[-1]["how"] == "complete"
    rows = [line for line in lines(path, "figure") if line.get("device_ms")]
    first = {row["name"]: row for row in rows if row["case"] == "DiT, 1 layer, batch 1, uniform:2"}
    assert set(first) == set(run_gpu.latency.NAMES), "every candidate"
    ours = first["harmonica_rt, cudagraph"]
    assert ours["graphs"] == 4
    assert ours["realised"] == pytest.approx(ours["speedup"] / 1.67, rel=0.01)
    assert ours["speedup_over_compile"] / ours["realised_over_compile"] == pytest.approx(1.67, rel=0.01)
    assert run_gpu.main(["--report", str(tmp_path)]) == 0
    page = (tmp_path / report.PAGE).read_text()
    for title in ("Cards", "Latency", "Levels", "Learning", "Correct", "Capture", "Gap", "One step"):
        assert f"## {title}" in page
    assert "Failed and skipped" not in page
    assert all((tmp_path / f"dry-run-{plot}.png").exists() for plot in ("latency", "gap"))


def test_sigterm_leaves_whole_lines_and_a_second_run_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(tmp_path), "--stages", "environment,correct"]
    command += ["--only", "environment,float16,bfloat16"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    for printed in process.stdout:
        if printed.startswith("correct"):
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    (path,) = tmp_path.glob("*.jsonl")
    assert all(json.loads(text) for text in path.read_text().splitlines())
    assert lines(path)[-1]["how"] == "stopped by SIGTERM"
    before = len(lines(path, "begin"))
    assert run_gpu.main([*command[2:], "--resume"]) == 0
    assert list(tmp_path.glob("*.jsonl")) == [path]
    begun = [(line["stage"], line["case"]) for line in lines(path, "begin")]
    assert len(begun) > before
    assert [key for key in begun if key[0] == "environment"] == [
        ("environment", c) for c in ("versions", "limits", "attention")
    ]
    assert lines(path)[-1]["how"] == "complete"


# ---- errors, the budget, processes that die


def test_an_exception_loses_no_other_case(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.jsonl", Card())
    record.run([case(broken, "one"), case(figure, "two")])
    (failed,) = lines(record.path, "failed")
    assert failed["case"] == "one"
    assert failed["error"] == "ArithmeticError: planted"
    assert "in broken" in failed["traceback"]
    assert [line["case"] for line in lines(record.path, "figure")] == ["one", "two"]
    assert [line["case"] for line in lines(record.path, "done")] == ["two"]


def test_a_candidate_fails_on_its_own(tmp_path: Path) -> None:
    def run(log: Log) -> None:
        assert log.attempt("first", lambda: 1 // 0) is None
        assert log.attempt("second", lambda: 5) == 5

    record = Record(tmp_path / "r.jsonl", Card())
    record.run([case(run)])
    (failed,) = lines(record.path, "failed")
    assert (failed["name"], failed["fatal"]) == ("first", False)
    assert [line["name"] for line in lines(record.path, "tried")] == ["second"]
    assert len(lines(record.path, "done")) == 1


def test_a_lost_device_ends_the_process_and_the_next_leaves_its_candidate_out(tmp_path: Path) -> None:
    """An illegal access spoils the whole process; the case is run again without what did it."""
    machine, ran = Card(), []

    def run(log: Log) -> None:
        log.attempt("good", lambda: ran.append("good"))

        def bad() -> None:
            ran.append("bad")
            machine.lost = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        log.attempt("bad", bad)
        log.attempt("last", lambda: ran.append("last"))

    path = tmp_path / "r.jsonl"
    cases = [case(run, "one"), case(figure, "two")]
    with pytest.raises(DeviceLost):
        Record(path, machine).run(cases)
    machine.lost = False
    Record(path, machine).run(cases)
    assert ran == ["good", "bad", "good", "last"]
    (skipped,) = lines(path, "skipped")
    assert skipped["name"] == "bad"
    assert [line["case"] for line in lines(path, "done")] == ["one", "two"]


def test_a_process_that_dies_without_a_word_is_gone_on_behind(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    record = Record(path, Card())
    record.write("begin", stage="correct", case="one")
    record.write("trying", stage="correct", case="one", name="crashes")
    path.open("a").write('{"kind": "fig')  # as a killed process leaves it
    record = Record(path, Card())
    assert record.deadly == {("correct", "crashes")}
    assert not record.over, "the rest of the case is still wanted"
    record.write("begin", stage="correct", case="two")
    record = Record(path, Card())
    assert record.over == {("correct", "two")}, "it died outside of any candidate"
    assert [line["error"] for line in lines(path, "failed")] == 2 * ["the process died"]


def test_the_budget_skips_what_would_not_fit_and_keeps_some_for_later_stages(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.jsonl", Card(), budget=100.0, stages=("correct", "profile"))
    later = 100 * SHARES["profile"] / (SHARES["profile"] + SHARES["correct"])
    assert record.left("correct") == pytest.approx(100 - later, abs=0.5)
    assert record.left("profile") == pytest.approx(100, abs=0.5)
    record.run([case(figure, "dear", seconds=99), case(figure, "cheap", seconds=2)])
    (skipped,) = lines(record.path, "skipped")
    assert skipped["case"] == "dear"
    assert "expected to take 99 s" in skipped["reason"]
    assert [line["case"] for line in lines(record.path, "done")] == ["cheap"]


def test_a_case_over_its_limit_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(log: Log) -> None:
        while True:
            with contextlib.suppress(Exception):  # as compilers do
                time.sleep(0.05)

    monkeypatch.setattr("bench.gpu.record.LEAST", 0.2)
    record = Record(tmp_path / "r.jsonl", Card(), budget=100.0)
    record.run([case(endless, "one", seconds=0.01), case(figure, "two")])
    assert "TookTooLong: took more than 0 s" in lines(record.path, "failed")[0]["error"]
    assert [line["case"] for line in lines(record.path, "done")] == ["two"]


# ---- what a rehearsal puts others in place of


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine as it is on CUDA, on fakes."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 250.0  # ms

    fakes = {
        "Event": Event,
        "current_device": lambda: 1,
        "get_device_name": lambda device: "NVIDIA H100 80GB HBM3",
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device: 3,
        "memory_reserved": lambda device: 5,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 7,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "Stream": lambda device: device,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return Machine()


def test_a_card_is_clocked_by_events_and_counts_memory(card: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[float] = []
    card.clocked(lambda: None, seconds)()
    assert seconds == [0.25]
    assert card.memory() == {"allocated": 3, "reserved": 5}
    assert card.peak(lambda: None) == 7
    assert (card.slug, str(card.device)) == ("nvidia-h100-80gb-hbm3", "cuda:1")
    with card.another_stream() as stream, card.graphs():
        assert stream == card.device
    card.kept = object()
    card.forget()
    assert card.kept is None
    made = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: made(*shape))
    assert card.usable()

    def lost(*shape: int, device: torch.device) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", lost)
    assert not card.usable()


def test_many_launches_are_one_graph(card: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator, total = Emulator(), torch.zeros(1)
    monkeypatch.setattr(card, "recorder", lambda: emulator)
    card.device = torch.device("cpu")
    replay = card.repeated(lambda: total.add_(1), 5)
    total.zero_()
    replay()
    assert (total.item(), emulator.warm_ups, len(emulator.graphs)) == (5, 1, 1)


def test_clocks_come_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho '580.1, P0, 1980 MHz, 1980 MHz, 2619 MHz, 2619 MHz, 93.1 W, 700.0 W, 31'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = environment._clocks()
    assert (found["driver_version"], found["clocks.max.sm"], found["temperature.gpu"]) == ("580.1", "1980 MHz", "31")


# ---- parts of stages


def test_the_gap_candidates_do_the_same() -> None:
    results = []
    for position in range(3):
        torch.manual_seed(0)
        made, moved = gap.candidates(2, 5, 24, 3, torch.float32, torch.device("cpu"), gap.plain)
        assert moved >= 4 * 2 * 5 * 24 * (2 + 3 + 1)
        results.append(list(made.values())[position]())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


def test_a_profile_counts_idle_time_and_overlap() -> None:
    events = [{"name": "a", "ts": 0, "dur": 10}, {"name": "b", "ts": 5, "dur": 10}, {"name": "a", "ts": 30, "dur": 10}]
    found = profile.summary(events)
    assert found["idle"] == pytest.approx(15 / 40)
    assert found["kernels"] == pytest.approx(3 / profile.REPEATS)
    assert [each["kernel"] for each in found["top"]] == ["a", "b"]
    with pytest.raises(RuntimeError, match="no event of the device"):
        profile.summary([])


def test_a_report_of_two_cards_says_which_and_takes_the_newest_run(tmp_path: Path) -> None:
    def run(name: str, card: str, error: float, *more: dict[str, Any]) -> None:
        check = {"kind": "figure", "stage": "correct", "case": "c", "name": "n", "tolerance": 0.1, "passed": True}
        rows = [{"kind": "start", "machine": card}, {**check, "error": error}, *more]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    failed = {"kind": "failed", "stage": "gap", "case": "g", "name": None, "error": "RuntimeError: a|b\nmore"}
    run("h100-1.jsonl", "H100", 0.03)
    run("h100-2.jsonl", "H100", 0.02, failed)
    run("l40s-1.jsonl", "L40S", 0.01)
    page = report.write(tmp_path).read_text()
    assert "| H100 | c | n | 2.0e-02 |" in page
    assert "| L40S | c | n | 1.0e-02 |" in page
    assert "3.0e-02" not in page
    assert "| H100 | failed | gap: g |  | RuntimeError: a\\|b |" in page
    with pytest.raises(FileNotFoundError, match=r"expected \*\.jsonl"):
        report.write(tmp_path / "none")
