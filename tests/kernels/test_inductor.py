"""Machines that cannot compile: the reason reaches the user, once, and `auto` still samples."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor
from torch._inductor import config
from torch._inductor.exc import CppCompileError

import harmonica_rt as hrt
from harmonica_rt.kernels import inductor
from harmonica_rt.kernels.gap_torch import compiled_gap
from harmonica_rt.kernels.gelu import compiled_gelu

from ..conftest import Calls, assert_close, needs_compiler, random_schedule

MEMOS = (compiled_gap, compiled_gelu, inductor.missing_compiler)
FAILURES = {  # what is wrong with the machine, and what of it the reason must name
    "no compiler": r"InvalidCxxCompiler: No working C\+\+ compiler found .*no-such-compiler",
    "a compiler that cannot be run": "PermissionError: .*'.*/compiler'",
    "a compiler that fails": r"\w+: \S.*",  # which of its calls torch makes first, and how it takes that, varies
    "a cache folder that cannot be made": "NotADirectoryError: .*/compiler/cache'",
}


@pytest.fixture(params=FAILURES)
def broken(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A machine that cannot compile; the reason it gives, as a pattern."""
    for memo in MEMOS:
        memo.cache_clear()
    compiler, cxx = tmp_path / "compiler", "no-such-compiler"
    fails = "case $* in *.cpp*) echo 'fatal: No space left on device' >&2; exit 1;; esac"
    compiler.write_text(f"#!/bin/sh\n{fails}\necho 'g++ (GCC) 12.2.0'\n")
    if request.param.startswith("a compiler"):
        compiler.chmod(0o755 if request.param == "a compiler that fails" else 0o644)
        cxx = str(compiler)
    if request.param == "a cache folder that cannot be made":
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiler / "cache"))
    else:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nothing lies there ready made
    with config.patch({} if "cache" in request.param else {"cpp.cxx": (cxx,)}):
        yield f"TorchInductor cannot compile for cpu here: {FAILURES[request.param]}"
    for memo in MEMOS:
        memo.cache_clear()


def test_auto_falls_back_to_eager_and_says_why(broken: str, dit: torch.nn.Module) -> None:
    fast, calls = hrt.compile(dit, hrt.Schedule.full(dit, 3)), Calls(3)
    with pytest.warns(UserWarning, match=f"runs its eager backend, not inductor: {broken}"):
        outputs = calls.run(fast)
    assert_close(outputs, calls.run(dit), 1e-5)
    assert fast.report().plans[0].backend == "eager"
    assert re.fullmatch(f"{broken}.*", fast.report().fallback), "one line"
    assert "fallback to eager" in str(fast.report())


def test_inductor_asked_for_by_name_raises(broken: str, dit: torch.nn.Module) -> None:
    fast = hrt.compile(dit, hrt.Schedule.full(dit, 3), backend="inductor")
    with pytest.raises(inductor.CompilerMissing, match=broken):
        Calls(3).run(fast)


def test_a_machine_that_breaks_later_is_told_as_well(
    broken: str, dit: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "missing_compiler", lambda device: None)  # it could compile a moment ago
    fast = hrt.compile(dit, hrt.Schedule.full(dit, 3))
    with pytest.warns(UserWarning, match=f"runs its eager backend, not inductor: {broken}"):
        Calls(3).run(fast)


def test_a_cache_folder_that_cannot_be_made_is_told_in_a_new_process(tmp_path: Path) -> None:
    """There importing TorchInductor fails already, before it wraps any error."""
    (tmp_path / "file").touch()
    code = "from harmonica_rt.kernels.inductor import missing_compiler; print(missing_compiler('cpu'))"
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match("TorchInductor cannot compile for cpu here: NotADirectoryError: .*/file/cache'", done.stdout)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "OSError: .*No space left on device: '/tmp/x'"),
        (
            CppCompileError(["g++"], "fatal: disk full\n1 error"),
            "CppCompileError: C\\+\\+ compile error: fatal: disk full$",
        ),
        (ImportError("x.so: failed to map segment"), "ImportError: x.so: failed to map segment"),
        (subprocess.TimeoutExpired("g++", 3), "TimeoutExpired: Command 'g\\+\\+' timed out after 3 seconds"),
        (RuntimeError("Failed to find C compiler.\nSet CC"), "RuntimeError: Failed to find C compiler.$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_inductor_raises_of_the_machine_is_a_missing_compiler(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(torch._inductor, "compile", fail)
    monkeypatch.setattr(inductor, "missing_compiler", lambda device: None)
    with pytest.raises(inductor.CompilerMissing, match=f"cannot compile for cpu here: {reason}"):
        inductor.compile_graph(lambda t: t + 1, [torch.zeros(2)])


def test_memory_that_runs_out_is_no_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    monkeypatch.setattr(inductor, "missing_compiler", lambda device: None)
    with pytest.raises(torch.OutOfMemoryError):
        inductor.compile_graph(lambda t: t + 1, [torch.zeros(2)])


@needs_compiler
def test_auto_takes_inductor_where_it_works(dit: torch.nn.Module) -> None:
    fast = hrt.compile(dit, hrt.Schedule.full(dit, 3))
    Calls(3).run(fast)
    assert fast.report().fallback is None
    assert [plan.backend for plan in fast.report().plans] == ["inductor"]


def _compiled() -> tuple[int, int]:
    return compiled_gap.cache_info().misses, compiled_gelu.cache_info().misses


@needs_compiler
def test_the_first_call_compiles_what_a_program_needs_and_no_more(dit: torch.nn.Module) -> None:
    for memo in (compiled_gap, compiled_gelu):
        memo.cache_clear()
    calls, full = Calls(6), hrt.Schedule.full(dit, 6)
    calls.run(hrt.compile(dit, full, backend="inductor"))
    assert _compiled() == (2, 1)  # a norm alone, at the start, and after a branch
    for seed, order in ((1, 2), (2, 0), (3, 1)):
        fast = hrt.compile(dit, random_schedule(seed, order=order, reuse=0.7), backend="inductor")
        with torch.no_grad():
            calls.call(fast, 0)
        before = _compiled()
        calls.run(fast, 1), calls.run(fast), calls.run(hrt.compile(dit, full, backend="inductor"))
        assert _compiled() == before


def test_libraries_cut_short_in_the_cache_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cut, outside = tmp_path / "ab" / "kernel.main.so", tmp_path.parent / "elsewhere.so"
    cut.parent.mkdir()
    for path in (cut, outside):
        path.write_bytes(b"")

    def compiled(path: Path) -> str:
        if path.exists():
            raise ImportError(f"{path}: file too short")
        return "made"

    assert inductor.without_cut_files(lambda: compiled(cut)) == "made"
    with pytest.raises(ImportError, match="elsewhere"):
        inductor.without_cut_files(lambda: compiled(outside))
    assert outside.exists()

    def again_and_again() -> None:
        cut.write_bytes(b"")
        compiled(cut)

    with pytest.raises(ImportError, match="file too short"):
        inductor.without_cut_files(again_and_again)
