"""Going on after SIGKILL with the same result. As a module: learns, is killed, and goes on, in forks of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors import safe_open

import harmonica_rt as hrt
from harmonica_rt.schedule import Schedule
from harmonica_rt.train import checkpoint as checkpoint_file
from harmonica_rt.train import learn as learning
from harmonica_rt.train import record
from harmonica_rt.train.natural_gradient import NaturalGradient
from harmonica_rt.train.pipeline_task import PipelineTask

from ..pipelines.folders import text_flux
from .commands import refused, run, succeeded

TRIAL, HELD_OUT, ITERATIONS = 2, 2, 4
ROOT = Path(__file__).parents[2]
SMALL = ("--steps", 5, "--height", 16, "--width", 16, "--target-speedup", 1.5, "--batch", 2)
MOMENTS = {  # steps of weights before the kill, and seconds between checkpoints
    "race": (TRIAL + 1, 0.0),
    "weights": (-2, 0.0),
    "weights-long-ago": (-2, 1e9),  # the last one is of the race
}


def pipeline_learns(folder: Path, out: Path, *more: object, prompts: str = "prompts.txt") -> Result:
    options = (*SMALL, "--iterations", ITERATIONS, "--prompts", folder / prompts)
    return run("learn", "--pipeline", folder / "flux", "--out", out, *options, *more)


def forked(work: Callable[[], Any]) -> int:
    """Status of a fork that does `work`: minus the signal that ended it."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counted(after: int, then: Callable[[], None]) -> list[int]:
    """One element for each step of the weights from now on; `then` at the one after `after` of them."""
    direction, steps = NaturalGradient.direction, []

    def count(gradient: NaturalGradient, *given: torch.Tensor | None) -> torch.Tensor:
        if len(steps) == after:
            then()
        steps.append(1)
        return direction(gradient, *given)

    NaturalGradient.direction = count
    return steps


def main(folder: Path) -> None:
    learning.TRIAL, PipelineTask.held_out = TRIAL, HELD_OUT
    hrt.learn.__kwdefaults__["validation"] = 2

    def whole() -> None:
        steps = counted(-1, list)
        succeeded(pipeline_learns(folder, folder / "whole.safetensors"))
        (folder / "steps").write_text(str(len(steps)))

    def killed(name: str, after: int) -> None:
        counted(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
        pipeline_learns(folder, folder / f"{name}.safetensors")

    def resumed(name: str) -> None:
        steps = counted(-1, list)
        succeeded(pipeline_learns(folder, folder / f"{name}.safetensors", "--resume"))
        (folder / f"{name}-steps").write_text(str(len(steps)))

    assert forked(whole) == 0
    total = int((folder / "steps").read_text())
    for name, (after, record.EVERY) in MOMENTS.items():
        assert forked(lambda name=name, after=after: killed(name, after % total)) == -signal.SIGKILL
        assert (folder / f"{name}.safetensors.checkpoint").exists()
        assert forked(lambda name=name: resumed(name)) == 0


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    text_flux().save_pretrained(folder / "flux")
    (folder / "prompts.txt").write_text("a cat\nred fox\nold house\n")
    (folder / "others.txt").write_text("a cat\nred fox\nnew house\n")
    return folder


@pytest.fixture(scope="module")
def ended(flux: Path) -> Path:
    command = [sys.executable, "-m", "tests.train.test_resuming", str(flux)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return flux


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "TRIAL", TRIAL)
    monkeypatch.setattr(PipelineTask, "held_out", HELD_OUT)
    monkeypatch.setitem(hrt.learn.__kwdefaults__, "validation", 2)
    monkeypatch.setattr(NaturalGradient, "direction", NaturalGradient.direction)  # put back afterwards


def bytes_of(schedule: Schedule) -> list[bytes]:
    names = ("compute", "weights", "carry", "channels", "output", "output_weights")
    return [np.asarray(getattr(schedule, name)).tobytes() for name in names]


@pytest.mark.parametrize("name", MOMENTS)
def test_a_killed_learning_goes_on_to_the_same_bytes(ended: Path, name: str) -> None:
    whole, resumed = (Schedule.load(ended / f"{which}.safetensors") for which in ("whole", name))
    assert whole.learned and bytes_of(resumed) == bytes_of(whole)
    verdict = [schedule.note.split(" s; ")[1] for schedule in (resumed, whole)]
    assert verdict[0] == verdict[1] and not (ended / f"{name}.safetensors.checkpoint").exists()
    total, again = (int((ended / which).read_text()) for which in ("steps", f"{name}-steps"))
    after, every = MOMENTS[name]
    assert again == (ITERATIONS if every else total - after % total), "what was kept is not learned again"


@pytest.mark.usefixtures("short")
def test_a_signal_keeps_the_checkpoint(flux: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "s.json", tmp_path / "s.json.checkpoint"
    counted(2 * TRIAL + 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    result = pipeline_learns(flux, out)
    succeeded(result)
    assert f"--resume goes on from {kept}" in result.stderr and Schedule.load(out).learned
    refused(pipeline_learns(flux, out), f"{kept} exists; expected --resume to go on from it, or another file")
    refused(
        pipeline_learns(flux, out, "--resume", prompts="others.txt"), "another task: prompts expected", "new", "got"
    )
    refused(pipeline_learns(flux, out, "--resume", "--guidance", 2), "another task:", "expected", "got")
    refused(pipeline_learns(flux, out, "--resume", "--iterations", 9), f"iterations expected 9, got {ITERATIONS}")
    refused(pipeline_learns(flux, out, "--resume", "--level", "output"), "another task: level expected output, got")
    succeeded(pipeline_learns(flux, out, "--resume"))
    assert not kept.exists()
    succeeded(pipeline_learns(flux, tmp_path / "whole.json", "--checkpoint", tmp_path / "c"))
    assert bytes_of(Schedule.load(out)) == bytes_of(Schedule.load(tmp_path / "whole.json"))
    assert {path.name for path in tmp_path.iterdir()} == {"s.json", "whole.json"}
    refused(pipeline_learns(flux, out, "--resume"), f"{kept}: no such checkpoint")


@pytest.mark.usefixtures("short")
def test_another_schedule_of_the_same_shape_is_refused(flux: Path, tmp_path: Path) -> None:
    out, own = tmp_path / "s.json", Schedule.uniform(text_flux().transformer, 5, level="blocks")
    for name, more in (("one", 0.1), ("other", 0.2)):
        own.replace(weights=np.where(own.weights != 0, own.weights + more, 0)).save(tmp_path / f"{name}.json")
    options = [option for option in SMALL if option not in ("--target-speedup", 1.5)]
    options += ["--iterations", 2, "--prompts", flux / "prompts.txt", "--pipeline", flux / "flux", "--out", out]
    counted(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    run("learn", *options, "--init", tmp_path / "one.json")
    refused(run("learn", *options, "--init", tmp_path / "other.json", "--resume"), "made with other settings: init exp")
    succeeded(run("learn", *options, "--init", tmp_path / "one.json", "--resume"))


@pytest.mark.usefixtures("short")
def test_from_python_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume: expected a checkpoint to go on from, got none"):
        hrt.learn(text_flux(), ["a cat"], resume=True, num_inference_steps=6, height=16, width=16)
    (tmp_path / "c").write_bytes(b"")
    with pytest.raises(ValueError, match="c: not a checkpoint"):
        hrt.learn(
            text_flux(), ["a cat"], checkpoint=tmp_path / "c", resume=True, num_inference_steps=6, height=16, width=16
        )
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        hrt.learn(text_flux(), ["a cat"], checkpoint=tmp_path / "none" / "c")


@pytest.mark.usefixtures("short")
def test_a_checkpoint_that_lacks_something_is_refused(flux: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "s.json", tmp_path / "s.json.checkpoint"
    counted(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    pipeline_learns(flux, out, "--level", "output")
    tensors, state = read_raw(kept)
    resume = ("--level", "output", "--resume")
    checkpoint_file.write(kept, {name: t for name, t in tensors.items() if name != "trainer.change"}, state)
    refused(pipeline_learns(flux, out, *resume), "expected a whole checkpoint, got one that lacks 'change'")
    checkpoint_file.write(kept, tensors, {name: own for name, own in state.items() if name != "trainer"})
    refused(pipeline_learns(flux, out, *resume), "expected a whole checkpoint, got one that lacks 'trainer'")
    kept.write_bytes(kept.read_bytes()[:-9])
    refused(pipeline_learns(flux, out, *resume), f"{kept}: not a checkpoint")


@pytest.mark.usefixtures("short")
def test_minutes_go_on_with_those_left(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them were spent but for half a second."""
    out, kept = tmp_path / "s.json", tmp_path / "s.json.checkpoint"
    options = ("--minutes", 1000, "--iterations", 1000)
    counted(2 * TRIAL + 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    succeeded(pipeline_learns(flux, out, *options))
    tensors, state = read_raw(kept)
    state["trainer"]["seconds"] = 60 * state["trainer"]["minutes"] - 0.5
    checkpoint_file.write(kept, tensors, state)
    steps = counted(-1, list)
    succeeded(pipeline_learns(flux, out, *options, "--resume"))
    assert 0 < len(steps) < 100 and not kept.exists()


def read_raw(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()[checkpoint_file.KEY])  # noqa: SIM118


if __name__ == "__main__":
    main(Path(sys.argv[1]))
