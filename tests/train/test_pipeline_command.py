"""`harmonica learn` as a command: what it says, what it refuses, and how it ends."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.train import learn as learning
from harmonica_rt.train.natural_gradient import NaturalGradient
from harmonica_rt.train.pipeline_task import PipelineTask
from harmonica_rt.train.starts import Starts

from ..pipelines.folders import text_flux
from .commands import refused, run, succeeded

CALL = ("--steps", 5, "--height", 16, "--width", 16)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    text_flux().save_pretrained(folder / "flux")
    (folder / "prompts.txt").write_text("a cat\nred fox\n")
    return folder


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "TRIAL", 1)
    monkeypatch.setattr(PipelineTask, "held_out", 2)
    monkeypatch.setitem(hrt.learn.__kwdefaults__, "validation", 2)


def learns(folder: Path, out: Path, *more: object, speedup: float | None = 1.5) -> Result:
    options = () if speedup is None else ("--target-speedup", speedup)
    settings = ("--batch", 2, "--iterations", 2, *options, *more)
    return run(
        "learn", "--pipeline", folder / "flux", "--prompts", folder / "prompts.txt", "--out", out, *CALL, *settings
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--iterations", 0), "iterations: expected at least 1, got 0"),
        (("--batch", 0), "batch: expected at least 1, got 0"),
        (("--accumulate", 3), "batch: expected a multiple of 3 parts, got 2"),
        (("--lr", "nan"), "lr: expected a number above 0, got nan"),
        (("--minutes", "nan"), "minutes: expected a number above 0, got nan"),
        (("--minutes", -1), "minutes: expected a number above 0, got -1"),
        (("--minutes", 0), "minutes: expected a number above 0, got 0"),
        (("--target-speedup", 50), "target speed-up: expected 1.00 to"),
        (("--target-speedup", "nan"), "for 5 steps, got nan"),
        (("--target-speedup", 0.9), "for 5 steps, got 0.9"),
        (("--init", "nowhere.json"), "--init: expected a schedule file, or cond=FILE,uncond=FILE, got 'nowhere.json'"),
        (("--groups", 2, "--level", "output"), "groups: expected 1 at level output, got 2"),
        (("--checkpoint", "x", "--resume"), "x: no such checkpoint"),
    ],
    ids=str,
)
def test_it_refuses(flux: Path, tmp_path: Path, options: tuple[object, ...], text: str) -> None:
    refused(learns(flux, tmp_path / "s.json", *options), text)
    assert not any(tmp_path.iterdir())


def test_schedules_of_another_run_are_refused(flux: Path, tmp_path: Path) -> None:
    start, out = tmp_path / "start.json", tmp_path / "s.json"
    transformer = text_flux().transformer
    for change, options, text in (
        ({"sampler": "DDIMScheduler"}, (), "schedule with sampler FlowMatchEulerDiscreteScheduler, got DDIMSched"),
        ({"timesteps": range(5)}, (), "schedule with timesteps"),
        ({}, ("--steps", 6), "schedule with steps 6, got 5"),
        ({}, ("--order", 0), "order: expected 1 beside init, got 0"),
        ({}, ("--target-speedup", 2), "target_speedup: expected None beside init, got 2"),
    ):
        Schedule.uniform(transformer, 5, level="blocks").replace(**change).save(start)
        refused(learns(flux, out, "--init", start, *options, speedup=None), text)


def test_weights_per_channel_need_their_file_before_anything_runs(flux: Path, tmp_path: Path) -> None:
    start, out = tmp_path / "start.safetensors", tmp_path / "s.json"
    own = Schedule.uniform(text_flux().transformer, 5, level="blocks")
    own.replace(channels=np.zeros((*own.compute.shape, 3, 4), dtype=np.float32)).save(start)
    result = learns(flux, out, "--init", start, speedup=None)
    refused(result, f"--init with weights per channel: expected a .safetensors file as --out, got {out}")
    assert len(result.stderr.splitlines()) == 1, "not even the pipeline is read"
    refused(learns(flux, tmp_path / "s.txt", "--channels", "yes"), "expected a .safetensors file as --out, got")


def test_a_failure_leaves_the_best_schedule(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors, calls = Starts.errors, []

    def spoilt(starts: Starts, result: torch.Tensor, *part: int) -> torch.Tensor:
        calls.extend([1] * result.requires_grad)
        return errors(starts, result, *part) * (torch.nan if result.requires_grad and len(calls) > 6 else 1)

    monkeypatch.setattr(Starts, "errors", spoilt)
    out = tmp_path / "s.json"
    refused(learns(flux, out, "--iterations", 30), "the gradient is not finite", f"{out} is the best schedule until")
    assert Schedule.load(out).learned


def test_a_signal_before_the_first_improvement_says_so(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direction = NaturalGradient.direction

    def kill(gradient: NaturalGradient, *given: torch.Tensor | None) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(NaturalGradient, "direction", direction)
        return 0 * direction(gradient, *given)  # a step of length 0 is no improvement

    monkeypatch.setattr(NaturalGradient, "direction", kill)
    out, before = tmp_path / "s.json", signal.getsignal(signal.SIGTERM)
    result = learns(flux, out, "--iterations", 1000)
    assert result.exit_code == 3, result.output
    message = f"ended early, nothing better than the forecast yet: {out} has the forecast's weights"
    assert result.stderr.splitlines()[-1] == message
    assert "ended early" in Schedule.load(out).note
    assert signal.getsignal(signal.SIGTERM) == before


def test_progress_is_a_line_a_phase_without_a_terminal(flux: Path, tmp_path: Path) -> None:
    result = learns(flux, tmp_path / "s.json")
    succeeded(result)
    lines = result.stderr.splitlines()
    phases = [re.split("[:,]", line)[0] for line in lines]
    starts = [phase for phase in phases if phase.startswith("start ")]
    assert starts and phases == ["pipeline", "what to compute", "memory", "targets", *starts, "weights", "verdict"]
    time = r"(\d+:\d\d left|time left not known yet)"
    for line in lines[3:]:
        assert re.fullmatch(rf"[\w ]+: ([\w ]+, )?iteration \d+, [+-]\d+\.\d\d dB over the forecast, {time}", line), (
            line
        )
