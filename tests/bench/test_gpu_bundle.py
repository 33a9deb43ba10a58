"""The folder for a machine without network: what is in it, that its wheel installs, and how run.sh goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import bundle

STUB = """\
import os, pathlib, signal, sys, time
with open({calls!r}, "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if "--report" in sys.argv or {how!r} == "well" or "--resume" in sys.argv:
    sys.exit(0)
if {how!r} == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
print("ready", flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
time.sleep(60)
"""


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A bundle whose wheels, but ours, were only asked for."""
    pip, asked = bundle.pip, []

    def ours_alone(*arguments: str) -> None:
        asked.append(arguments[-1])
        if arguments[0] == "wheel":
            pip(*arguments)

    monkeypatch.setattr(bundle, "pip", ours_alone)
    assert bundle.build(tmp_path / "bundle") < bundle.LIMIT
    return tmp_path / "bundle", asked


def test_a_bundle_holds_what_a_cuda_image_lacks(built: tuple[Path, list[str]]) -> None:
    folder, asked = built
    assert {path.name for path in folder.iterdir()} == {"bench", "tests", "wheels", "run.sh", "install.py"}
    names = {pinned.split("==")[0] for pinned in asked[1:]}
    assert {"diffusers", "importlib-metadata"} <= names
    assert not names & {"torch", "triton", "numpy", "transformers", "huggingface-hub"}
    assert (folder / "bench" / "models" / "reference.py").exists()
    assert {path.suffix for path in (folder / "bench" / "models").iterdir()} == {".py", ".md"}
    assert (folder / "bench" / "COMMIT").read_text().strip()
    assert os.access(folder / "run.sh", os.X_OK)


def test_its_wheel_installs_and_runs_without_the_repository(built: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = built
    site = tmp_path / "site"
    subprocess.run([sys.executable, str(folder / "install.py"), str(site)], check=True, cwd=tmp_path)
    assert (site / "harmonica_rt" / "kernels" / "gap.py").exists()
    assert (site / "harmonica_rt" / "train" / "cli.py").exists()
    where = (
        "import harmonica_rt.train.models as ours; from bench.measure.environment import environment;"
        "print(ours.__file__, environment())"
    )
    found = subprocess.run(
        [sys.executable, "-c", where],
        env=os.environ | {"PYTHONPATH": f"{site}:{folder}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found.startswith(str(site))
    assert (folder / "bench" / "COMMIT").read_text().strip() in found


def start(tmp_path: Path, how: str) -> tuple[subprocess.Popen, Path]:
    """run.sh around a stub of run_gpu.py that goes well, crashes or waits."""
    calls, folder = tmp_path / "calls", tmp_path / "folder"
    (folder / "bench").mkdir(parents=True)
    source = Path(bundle.__file__).parent / "run.sh"
    (folder / "run.sh").write_text(source.read_text())
    (folder / "install.py").write_text("")
    (folder / "bench" / "run_gpu.py").write_text(STUB.format(calls=str(calls), how=how))
    command = ["bash", str(folder / "run.sh"), "77", "--rounds", "3"]
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True), calls


@pytest.mark.parametrize("how", ["well", "crash"])
def test_a_crash_is_gone_on_behind(how: str, tmp_path: Path) -> None:
    process, calls = start(tmp_path, how)
    assert process.wait(60) == 0
    first, *others = calls.read_text().splitlines()
    out = tmp_path / "out"
    assert first == f"--out {out} --budget 77 --rounds 3"
    resumed = [f"{first.removesuffix(' --rounds 3')} --resume --rounds 3"] if how == "crash" else []
    assert others == [*resumed, f"--report {out}"]


def test_sigterm_is_passed_on_and_ends_with_the_report(tmp_path: Path) -> None:
    process, calls = start(tmp_path, "wait")
    for printed in process.stdout:
        if printed.strip() == "ready":
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["--out", "--report"]
    assert "ready" in (tmp_path / "out" / "log.txt").read_text()
