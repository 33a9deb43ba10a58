"""The command line: what it writes, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import Result
from diffusers import UNet2DModel
from safetensors.torch import save_file
from typer.testing import CliRunner

import harmonica_rt.train.learn as learning
import harmonica_rt.train.run as running
from harmonica_rt import Schedule
from harmonica_rt.train.budget import Costs
from harmonica_rt.train.cli import app
from harmonica_rt.train.natural_gradient import NaturalGradient
from harmonica_rt.train.weights import Starts

from ..conftest import make_dit
from .conftest import ddim

LEARN = ("--objective", "sdt", "--steps", "6", "--iterations", "2", "--batch", "2", "--refresh", "1")
TARGET = ("--target-cur", "0.4")
END = ("--steps", "6", "--iterations", "2", "--batch", "2", "--pool", "2")
SPEEDUP = ("--target-speedup", "1.5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_dit().save_pretrained(folder)
    ddim().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unet")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    UNet2DModel(sample_size=8, norm_num_groups=1, layers_per_block=1, **blocks).save_pretrained(folder)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result: Result, *texts: str) -> None:
    """Exit code 2, one line that says why, no traceback."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0], "more than one line"
    for text in texts:
        assert text in errors[0], errors[0]


def learn(model: object, out: object, *more: object, target: tuple[str, ...] = TARGET) -> Result:
    """A router."""
    return run("learn", "--model", model, "--out", out, *LEARN, *target, *more)


def learn_end(model: object, out: object, *more: object, target: tuple[str, ...] = SPEEDUP) -> Result:
    """On the end error."""
    return run("learn", "--model", model, "--out", out, *END, *target, *more)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TRIAL", 2), ("HELD_OUT", 4)):
        monkeypatch.setattr(learning, name, value)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Its precision is the process's."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


# ---- what works


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--sampler", "dpmsolver++", "--order", "1", "--init", "uniform:2", "--estimator", "telescoping"),
        ("--paper", "--guidance", "1", "--checkpointing"),
        ("--dtype", "bfloat16", "--estimator", "none"),
    ],
    ids=str,
)
def test_learn(model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "s.json"
    text = succeeded(learn(model, out, *options))
    schedule = Schedule.load(out)
    assert text == f"wrote {out}: {schedule!r}\n{schedule.note}\n"
    assert schedule.steps == 6 and schedule.cur == pytest.approx(0.4, abs=0.02)
    assert schedule.sampler == ("DPMSolverMultistepScheduler" if "dpmsolver++" in options else "DDIMScheduler")
    assert schedule.order == (1 if "--order" in options else 0)


def test_learn_writes_all_it_is_asked_for(model: Path, tmp_path: Path) -> None:
    out, router, checkpoint, log = (tmp_path / n for n in ("s.json", "r.pt", "c", "log"))
    succeeded(learn(model, out, "--router", router, "--checkpoint", checkpoint, "--log", log))
    assert any(log.rglob("events.out.tfevents.*"))
    again = tmp_path / "again.json"
    succeeded(run("convert", router, "--model", model, "--out", again))
    assert (Schedule.load(again).compute == Schedule.load(out).compute).all()
    first = Schedule.load(out)
    succeeded(learn(model, out, "--checkpoint", checkpoint, "--resume"))
    assert (Schedule.load(out).compute == first.compute).all()
    assert "2 iterations" in Schedule.load(out).note


def test_learn_from_a_schedule_file(model: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.json"
    Schedule.uniform(make_dit(), 6, every=3).save(start)
    out = tmp_path / "s.json"
    succeeded(learn(model, out, "--init", start, "--lr", "1e-6", target=("--target-cur", str(4 / 6))))
    assert (Schedule.load(out).compute == Schedule.load(start).compute).all()


def test_learn_l2c(model: Path, tmp_path: Path) -> None:
    images = tmp_path / "images.safetensors"
    save_file({"images": torch.randn(4, 2, 8, 8), "labels": torch.tensor([0, 1, 2, 3])}, images)
    out = tmp_path / "s.json"
    succeeded(learn(model, out, "--objective", "l2c", "--images", images))
    assert Schedule.load(out).compute[[0, 2, 4]].all()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--moves", "1"),
        ("--target", "converged", "--order", "1"),
        ("--tie", "branch", "--accumulate", "2", "--checkpointing", "--sampler", "dpmsolver++", "--guidance", "1"),
        ("--dtype", "bfloat16", "--init", "uniform:2"),
        ("--init", "uniform:2", "--order", "0"),
    ],
    ids=str,
)
def test_learn_on_the_end_error(model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "s.json"
    text = succeeded(learn_end(model, out, *options))
    schedule = Schedule.load(out)
    assert text == f"wrote {out}: {schedule!r}\n{schedule.note}\n"
    assert schedule.speedup(make_dit()) >= 1.5 and schedule.learned
    assert schedule.sampler == ("DPMSolverMultistepScheduler" if "dpmsolver++" in options else "DDIMScheduler")
    given = dict(pairwise(options))
    assert schedule.order == int(given.get("--order", 2)) and schedule.timesteps is not None
    assert f"target {given.get('--target', 'full')}: " in schedule.note
    assert (" of 1 moves, " in schedule.note) == ("--moves" in options)
    if "--init" not in options:
        assert schedule.speedup(make_dit()) == pytest.approx(1.5, rel=0.05)
    else:
        assert np.array_equal(schedule.compute, Schedule.uniform(make_dit(), 6).compute)
    if "branch" in options:
        change = schedule.weights - schedule.replace(weights=None).weights
        assert np.allclose(change[5, :2], change[5, :1]) and change[5].any(), "layers share"


@pytest.mark.usefixtures("short")
def test_learn_weights_of_reused_outputs(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    succeeded(learn_end(model, out, "--init", "output:2", "--classes", "0,2"))
    schedule = Schedule.load(out)
    assert schedule.output.tolist() == [False, True] * 3 and schedule.compute[::2].all()
    assert not np.allclose(schedule.output_weights, schedule.replace(output_weights=None).output_weights)


@pytest.mark.usefixtures("short", "fresh_accelerator")
def test_learn_on_the_end_error_in_mixed_precision(model: Path, tmp_path: Path) -> None:
    succeeded(learn_end(model, tmp_path / "s.json", "--mixed-precision", "bf16", "--init", "uniform:2"))
    assert Schedule.load(tmp_path / "s.json").learned


@pytest.mark.usefixtures("short")
def test_learn_on_a_budget_of_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "seconds", lambda task: Costs(np.tile([2.0, 0.0], 3), 3.0))  # 6 of 9 s are attention
    out = tmp_path / "s.json"
    succeeded(learn_end(model, out, "--budget", "time"))
    schedule = Schedule.load(out)
    faster = 6 * 9 / (6 * 3 + 2 * schedule.compute[..., 0].sum())
    assert 1.5 <= faster < 1.6 and schedule.speedup(make_dit()) > 1.7, "of time, not of MACs"
    refused(learn_end(model, out, "--budget", "time", "--target-speedup", "2.5"), "expected 1.00 to 2.25 for 6 steps")


@pytest.mark.usefixtures("short")
def test_learn_from_a_files_weights(model: Path, tmp_path: Path) -> None:
    start, out = tmp_path / "start.json", tmp_path / "s.json"
    uniform = Schedule.uniform(make_dit(), 6, 3)
    given = uniform.replace(weights=0.7 * uniform.weights, sampler="DDIMScheduler", note="before")
    given.save(start)
    succeeded(learn_end(model, out, "--init", start, "--lr", "1e-9", "--guidance", "2", target=()))
    schedule = Schedule.load(out)
    assert np.array_equal(schedule.compute, given.compute) and schedule.order == 1
    np.testing.assert_allclose(schedule.weights, given.weights, atol=1e-6)
    assert schedule.guidance_scale == 2 and schedule.timesteps is not None and "before" not in schedule.note


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("moves", [(), ("--moves", "9999")], ids=str)
def test_learn_for_some_time(model: Path, tmp_path: Path, moves: tuple[str, ...]) -> None:
    out, log = tmp_path / "s.json", tmp_path / "log"
    options = (*SPEEDUP, "--steps", "6", "--batch", "2", "--pool", "2", "--minutes", "0.02", "--log", log, *moves)
    succeeded(run("learn", "--model", model, "--out", out, *options))
    assert Schedule.load(out).learned and any(log.rglob("events.out.tfevents.*"))
    assert ("moves" in Schedule.load(out).note) == bool(moves)


@pytest.mark.usefixtures("short")
def test_a_signal_ends_it_with_what_was_learned(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direction, steps = NaturalGradient.direction, []

    def kill(gradient: NaturalGradient, rows: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return direction(gradient, rows)

    monkeypatch.setattr(NaturalGradient, "direction", kill)
    out, before = tmp_path / "s.json", signal.getsignal(signal.SIGTERM)
    succeeded(learn_end(model, out, "--iterations", "1000", "--init", "uniform:2"))
    assert len(steps) == 3 and Schedule.load(out).learned and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("short")
def test_learning_that_fails_leaves_the_best_schedule(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = Starts.errors
    monkeypatch.setattr(
        Starts, "errors", lambda s, r, *part: errors(s, r, *part) * (torch.nan if r.requires_grad else 1)
    )
    out = tmp_path / "s.json"
    result = learn_end(model, out, "--init", "uniform:2")
    refused(result, "iteration 0: the gradient is not finite", f"{out} is the best schedule until then")
    assert np.array_equal(Schedule.load(out).compute, Schedule.uniform(make_dit(), 6).compute)


def test_inspect_and_plot(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    Schedule.uniform(make_dit(), 6, note="[bold]a note[/bold]").save(file)
    assert succeeded(run("inspect", file)) == f"{Schedule.load(file)}\n"
    succeeded(run("plot", file))
    succeeded(run("plot", file, "--out", tmp_path / "other.png"))
    for name in ("s.png", "other.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["learn", "inspect", "plot", "convert"])
def test_help(command: str) -> None:
    assert "Usage" in succeeded(run(command, "--help"))


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--sampler", "euler"), "sampler: expected one of ddim, dpmsolver++, got 'euler'"),
        (("--target-cur", "0.99"), "target CUR: expected 0.00 to 0.83 for 6 steps, got 0.99"),
        (("--target-cur", "nan"), "target CUR: expected 0.00 to 0.83"),
        (("--target-speedup", "2"), "expected one target, got speed-up 2.0 and CUR 0.4"),
        (("--resume",), "--resume: expected --checkpoint FILE, got none"),
        (("--resume", "--checkpoint", "nowhere"), "nowhere: no such checkpoint"),
        (("--init", "uniform:0"), "every: expected a positive integer, got 0"),
        (("--init", "uniform:x"), "init: expected normal, uniform:N, output:N or a schedule file, got 'uniform:x'"),
        (("--init", "nowhere.json"), "nowhere.json"),
        (("--iterations", "0"), "iterations: expected at least 1, got 0"),
        (("--batch", "0"), "batch: expected at least 1, got 0"),
        (("--lr", "-1"), "learning rate"),
        (("--lr", "nan"), "learning rate"),
        (("--beta", "nan"), "beta"),
        (("--beta", "-1"), "beta"),
        (("--guidance", "nan"), "guidance"),
        (("--mixed-precision", "fp7"), "fp7"),
        (("--objective", "l2c"), "images: the l2c objective needs them"),
        (("--steps", "2000"), "2000"),
    ],
    ids=str,
)
def test_learn_refuses(model: Path, tmp_path: Path, options: tuple[str, ...], text: str) -> None:
    refused(learn(model, tmp_path / "s.json", *options), text)
    assert not (tmp_path / "s.json").exists()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--init", "normal"), "init: expected uniform:N, output:N or a schedule file, got normal"),
        (("--init", "uniform:x"), "got 'uniform:x'"),
        (("--init", "output:x"), "got 'output:x'"),
        (("--classes", "0,5"), "classes: expected some from 0 to 4, got [0, 5]"),
        (("--init", "uniform:1", "--target-speedup", "1"), "expected a schedule that reuses something"),
        (("--init", "nowhere.json"), "nowhere.json"),
        (("--init", "uniform:2", "--target-speedup", "2.5"), "meets the target of 2.5, got one of "),
        (("--estimator", "gain"), "--estimator: goes with --objective sdt or l2c, got end"),
        (("--refresh", "2"), "--refresh: goes with --objective sdt or l2c, got end"),
        (("--beta", "1"), "--beta: goes with --objective sdt or l2c, got end"),
        (("--images", "x"), "--images: goes with --objective sdt or l2c, got end"),
        (("--checkpoint", "x"), "--checkpoint: goes with --objective sdt or l2c, got end"),
        (("--router", "x"), "--router: goes with --objective sdt or l2c, got end"),
        (("--paper", "--objective", "end"), "--paper: goes with --objective sdt or l2c, got end"),
        (("--target-speedup", "50"), "target speed-up: expected 1.00 to 3.50 for 6 steps, got 50"),
        (("--target-speedup", "nan"), "target speed-up: expected 1.00 to 3.50 for 6 steps, got nan"),
        (("--target-speedup", "0.9"), "target speed-up: expected 1.00 to 3.50 for 6 steps, got 0.9"),
        (("--target-cur", "0.4"), "expected a target speed-up or a target CUR, got 1.5 and 0.4"),
        (("--minutes", "nan"), "minutes: expected a number above 0, got nan"),
        (("--minutes", "-1"), "minutes: expected a number above 0, got -1"),
        (("--minutes", "0"), "minutes: expected a number above 0, got 0"),
        (("--minutes", "-1", "--moves", "1"), "minutes: expected a number above 0, got -1"),
        (("--pool", "1"), "pool: expected at least a batch of 2, got 1"),
        (("--batch", "0"), "batch: expected at least 1, got 0"),
        (("--accumulate", "3"), "batch: expected a multiple of 3 parts, got 2"),
        (("--iterations", "0"), "iterations: expected at least 1, got 0"),
        (("--lr", "nan"), "lr: expected a number above 0, got nan"),
        (("--sampler", "euler"), "sampler: expected one of ddim, dpmsolver++, got 'euler'"),
    ],
    ids=str,
)
def test_learn_on_the_end_error_refuses(model: Path, tmp_path: Path, options: tuple[str, ...], text: str) -> None:
    refused(learn_end(model, tmp_path / "s.json", *options), text)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ("--target", "full"),
        ("--minutes", "1"),
        ("--moves", "1"),
        ("--tie", "step"),
        ("--pool", "4"),
        ("--accumulate", "1"),
        ("--budget", "macs"),
    ],
    ids=str,
)
@pytest.mark.parametrize("objective", ["sdt", "l2c"])
def test_routers_refuse_what_is_for_the_end_error(
    model: Path, tmp_path: Path, options: tuple[str, str], objective: str
) -> None:
    result = learn(model, tmp_path / "s.json", *options, "--objective", objective)
    refused(result, f"{options[0]}: goes with --objective end, got {objective}")


def test_a_budget_of_time_needs_a_speedup(model: Path, tmp_path: Path) -> None:
    for target in ((), TARGET):
        result = learn_end(model, tmp_path / "s.json", "--budget", "time", target=target)
        refused(result, "--budget time: expected --target-speedup, got none")


def test_learning_on_the_end_error_needs_a_goal(model: Path, tmp_path: Path) -> None:
    result = learn_end(model, tmp_path / "s.json", target=())
    refused(result, "expected a target speed-up, a target CUR or --init, got none")


@pytest.mark.parametrize(
    ("change", "options", "texts"),
    [
        ({"sampler": "DPMSolverMultistepScheduler"}, (), ("sampler expected DDIMScheduler, got DPMSolver",)),
        ({"timesteps": range(6)}, (), ("timesteps expected",)),
        ({}, ("--steps", "5"), ("steps expected 5, got 6",)),
        ({}, ("--order", "0"), ("init: expected a schedule of order 0, got order 1",)),
    ],
    ids=str,
)
def test_learning_on_the_end_error_refuses_starts_of_another_run(
    model: Path, tmp_path: Path, change: dict[str, object], options: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    Schedule.uniform(make_dit(), 6).replace(**change).save(tmp_path / "start.json")
    refused(learn_end(model, tmp_path / "s.json", "--init", tmp_path / "start.json", *options), *texts)


@pytest.mark.parametrize(("option", "value"), [("--tie", "layer"), ("--target", "real"), ("--moves", "-1")])
def test_learning_on_the_end_error_refuses_what_typer_checks(
    model: Path, tmp_path: Path, option: str, value: str
) -> None:
    result = learn_end(model, tmp_path / "s.json", option, value)
    assert result.exit_code == 2 and f"Invalid value for '{option}'" in click.unstyle(result.stderr)


@pytest.mark.parametrize(("option", "value"), [("--steps", "1"), ("--order", "3"), ("--estimator", "x"), ("--lr", "x")])
def test_learn_refuses_what_typer_checks(model: Path, tmp_path: Path, option: str, value: str) -> None:
    result = learn(model, tmp_path / "s.json", option, value)
    assert result.exit_code == 2 and f"Invalid value for '{option}'" in click.unstyle(result.stderr)


def test_learn_needs_a_goal(model: Path, tmp_path: Path) -> None:
    result = learn(model, tmp_path / "s.json", target=())
    refused(result, "expected beta, a target speed-up or a target CUR, got none")


@pytest.mark.parametrize("name", ["dit-fashoin", "./nowhere", "/nowhere/model"])
def test_learn_refuses_unknown_models(tmp_path: Path, name: str) -> None:
    refused(learn(name, tmp_path / "s.json"), "model: expected a reference model", repr(name))


def test_learn_refuses_folders_without_a_model(tmp_path: Path) -> None:
    refused(learn(tmp_path, tmp_path / "s.json"), str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    refused(learn(tmp_path, tmp_path / "s.json"), str(tmp_path))


def test_learn_refuses_another_model_class(unet: Path, tmp_path: Path) -> None:
    refused(learn(unet, tmp_path / "s.json"), "UNet2DModel", "DiTTransformer2DModel")


@pytest.mark.parametrize("option", ["--out", "--checkpoint", "--router"])
def test_learn_refuses_missing_folders_before_it_trains(model: Path, tmp_path: Path, option: str) -> None:
    target = tmp_path / "missing" / "file"
    arguments = {"--model": model, "--out": tmp_path / "s.json", option: target}
    result = run("learn", *LEARN, *TARGET, *(x for pair in arguments.items() for x in pair))
    refused(result, f"{target}: there is no folder {target.parent}")
    assert not any(tmp_path.iterdir())


def test_learn_refuses_a_folder_as_output_before_it_trains(model: Path, tmp_path: Path) -> None:
    result = learn(model, tmp_path, "--checkpoint", tmp_path / "c")
    refused(result, str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_learn_refuses_other_checkpoints(model: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    resume = ("--checkpoint", checkpoint, "--resume")
    succeeded(learn(model, tmp_path / "s.json", "--checkpoint", checkpoint))
    refused(learn(model, tmp_path / "t.json", *resume, "--guidance", "4"), "guidance_scale expected 4.0, got 1.5")
    refused(learn(model, tmp_path / "t.json", *resume, "--lr", "0.5"), "lr expected 0.5, got 0.05")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    refused(learn(model, tmp_path / "t.json", *resume), f"{checkpoint}: not a checkpoint of harmonica_rt.train")


def test_learn_refuses_wrong_starts(model: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.json"
    Schedule.uniform(make_dit(), 5).save(start)
    refused(learn(model, tmp_path / "s.json", "--init", start), "init: expected a schedule of 6 steps, got 5")
    Schedule.uniform(make_dit(layers=2), 6).save(start)
    refused(learn(model, tmp_path / "s.json", "--init", start), "layers expected 3, got 2")
    start.write_text("{")
    refused(learn(model, tmp_path / "s.json", "--init", start), str(start))


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"pictures": torch.zeros(4, 2, 8, 8)}, "expected images [n, channels, height, width] and labels [n], got"),
        ({"images": torch.zeros(4, 2, 8, 8), "labels": torch.zeros(3)}, "[4, 2, 8, 8]"),
        ({"images": torch.zeros(4, 3, 8, 8), "labels": torch.zeros(4, dtype=torch.long)}, "[4, 3, 8, 8]"),
        ({"images": torch.zeros(4, 2, 8, 8), "labels": torch.full((4,), 77)}, "labels"),
        ({"images": torch.zeros(0, 2, 8, 8), "labels": torch.zeros(0, dtype=torch.long)}, "images"),
        (None, "images.safetensors"),
    ],
    ids=["names", "counts", "channels", "labels", "none", "text"],
)
def test_learn_refuses_wrong_images(
    model: Path, tmp_path: Path, tensors: dict[str, torch.Tensor] | None, text: str
) -> None:
    images = tmp_path / "images.safetensors"
    if tensors is None:
        images.write_text("no images here")
    else:
        save_file(tensors, images)
    refused(learn(model, tmp_path / "s.json", "--objective", "l2c", "--images", images), text)


@pytest.mark.parametrize("command", ["inspect", "plot"])
@pytest.mark.parametrize("content", [None, "", "[]", "\x00\xff", '{"format": 1}'], ids=str)
def test_files_that_are_no_schedules(tmp_path: Path, command: str, content: str | None) -> None:
    file = tmp_path / "[b]s[/b].json"  # nothing in a name is markup
    file = file if content is None else tmp_path / "[x].json"
    if content is not None:
        file.write_text(content, encoding="latin-1")
    refused(run(command, file), str(file))


@pytest.mark.parametrize("tau", ["0", "1", "1.5", "-0.1", "nan"])
def test_convert_refuses_other_taus(model: Path, tmp_path: Path, tau: str) -> None:
    torch.save({"routers": {f"{k}.prob": torch.zeros(6) for k in range(4)}}, tmp_path / "r.pt")
    result = run("convert", tmp_path / "r.pt", "--model", model, "--out", tmp_path / "s.json", "--tau", tau)
    refused(result, "tau: expected", f"got {float(tau)}")
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("content", [b"", b"nothing", None], ids=str)
def test_convert_refuses_other_files(model: Path, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "r.pt").write_bytes(content)
    refused(run("convert", tmp_path / "r.pt", "--model", model, "--out", tmp_path / "s.json"), str(tmp_path / "r.pt"))


def test_convert_refuses_another_models_router(model: Path, tmp_path: Path) -> None:
    torch.save({"routers": {f"{k}.prob": torch.zeros(8) for k in range(4)}}, tmp_path / "r.pt")
    refused(run("convert", tmp_path / "r.pt", "--model", model, "--out", tmp_path / "s.json"), "8 logits a step")
