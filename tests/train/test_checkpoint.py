"""Checkpoint files: exact, replaced only when complete, refused for another task."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import save_file

from harmonica_rt.train import checkpoint
from harmonica_rt.train.task import Task

from ..conftest import make_dit
from .conftest import ddim, make_task

STATE = {"beta": 0.1 + 0.2, "iteration": 3, "miss": None}


def written(path: Path, task: Task, value: float = 1.0) -> Path:
    tensors = {"a": torch.full((3,), value), "b": torch.tensor([1e-300], dtype=torch.float64)}
    checkpoint.write(path, tensors, {"identity": checkpoint.identity(task), **STATE})
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    task = make_task()
    tensors, state = checkpoint.read(written(tmp_path / "c", task), task)
    assert tensors["a"].tolist() == [1.0] * 3 and tensors["b"].item() == 1e-300
    assert {k: state[k] for k in STATE} == STATE
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_an_optimizer_goes_on_as_it_was() -> None:
    def make() -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
        parameter = torch.nn.Parameter(torch.ones(3))
        return parameter, torch.optim.AdamW([parameter], lr=0.1)

    def advance(parameter: torch.nn.Parameter, optimizer: torch.optim.AdamW, power: float) -> None:
        parameter.grad = parameter.detach() ** power
        optimizer.step()

    parameter, optimizer = make()
    advance(parameter, optimizer, 3)
    other, restored = make()
    with torch.no_grad():
        other.copy_(parameter)
    tensors = {name: t.clone() for name, t in checkpoint.optimizer_tensors(optimizer).items()}
    checkpoint.load_optimizer(restored, tensors)
    for p, o in ((parameter, optimizer), (other, restored)):
        advance(p, o, 2)
    assert torch.equal(parameter, other)


OTHERS: dict[str, Any] = {
    "weights": lambda: make_task(seed=1),
    "weights expected .*, got": lambda: make_task(layers=2),
    "steps": lambda: make_task(steps=5),
    "guidance_scale expected 4.0, got 1.5": lambda: make_task(guidance=4.0),
    "sampler expected DPMSolverMultistepScheduler, got DDIMScheduler": lambda: Task(
        make_dit(), DPMSolverMultistepScheduler.from_config(ddim().config), 6, 1.5
    ),
    "timesteps": lambda: Task(
        make_dit(), DDIMScheduler.from_config(ddim().config, timestep_spacing="trailing"), 6, 1.5
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_tasks_checkpoint_is_refused(tmp_path: Path, what: str) -> None:
    path = written(tmp_path / "c", make_task())
    field = "timesteps" if what == "steps" else what
    with pytest.raises(ValueError, match=rf"c: made for another task: {field}") as caught:
        checkpoint.read(path, OTHERS[what]())
    assert " expected " in str(caught.value) and ", got " in str(caught.value)


def damaged(path: Path, how: str) -> None:
    whole = path.read_bytes()
    match how:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a checkpoint " * 10)
        case "cut":
            path.write_bytes(whole[: len(whole) - 8])
        case "cut in the header":
            path.write_bytes(whole[:50])
        case "weights of a model":
            save_file({"a": torch.zeros(2)}, path)
        case "header no JSON":
            save_file({"a": torch.zeros(2)}, path, {checkpoint.KEY: "{"})
        case "header nested too deeply":
            save_file({"a": torch.zeros(2)}, path, {checkpoint.KEY: "[" * 100_000})
        case "header a list":
            save_file({"a": torch.zeros(2)}, path, {checkpoint.KEY: "[1]"})


@pytest.mark.parametrize(
    "how",
    [
        *("empty", "text", "cut", "cut in the header", "weights of a model"),
        *("header no JSON", "header nested too deeply", "header a list"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, how: str) -> None:
    task = make_task()
    damaged(written(tmp_path / "c", task), how)
    with pytest.raises(ValueError, match=r"c: not a checkpoint of harmonica_rt\.train"):
        checkpoint.read(tmp_path / "c", task)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="c: no such checkpoint"):
        checkpoint.read(tmp_path / "c", make_task())


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata)
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task()
    path = written(tmp_path / "c", task)
    fill_disk(monkeypatch)
    with pytest.raises(OSError, match=r"c: the checkpoint could not be written.*intact.*No space left"):
        written(path, task, value=2.0)
    assert checkpoint.read(path, task)[0]["a"].tolist() == [1.0] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not be written"):
        written(tmp_path / "missing" / "c", make_task())
