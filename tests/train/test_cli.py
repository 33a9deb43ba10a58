"""The command line: what it writes, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import save_file
from typer.main import get_command

from harmonica_rt import Schedule
from harmonica_rt.train.cli import app

from ..conftest import make_dit
from .commands import ROUTER, TARGET, refused, route, run, succeeded


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
def test_router(model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "s.json"
    text = succeeded(route(model, out, *options))
    schedule = Schedule.load(out)
    assert text == f"wrote {out}: {schedule!r}\n{schedule.note}\n"
    assert schedule.steps == 6 and schedule.cur == pytest.approx(0.4, abs=0.02)
    assert schedule.sampler == ("DPMSolverMultistepScheduler" if "dpmsolver++" in options else "DDIMScheduler")
    assert schedule.order == (1 if "--order" in options else 0)


def test_router_writes_all_it_is_asked_for(model: Path, tmp_path: Path) -> None:
    out, router, checkpoint, log = (tmp_path / n for n in ("s.json", "r.pt", "c", "log"))
    succeeded(route(model, out, "--published", router, "--checkpoint", checkpoint, "--log", log))
    assert any(log.rglob("events.out.tfevents.*"))
    again = tmp_path / "again.json"
    succeeded(run("convert", router, "--model", model, "--out", again))
    assert (Schedule.load(again).compute == Schedule.load(out).compute).all()
    first = Schedule.load(out)
    succeeded(route(model, out, "--checkpoint", checkpoint, "--resume"))
    assert (Schedule.load(out).compute == first.compute).all()
    assert "2 iterations" in Schedule.load(out).note


def test_router_from_a_schedule_file(model: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.json"
    Schedule.uniform(make_dit(), 6, every=3).save(start)
    out = tmp_path / "s.json"
    succeeded(route(model, out, "--init", start, "--lr", "1e-6", target=("--target-cur", str(4 / 6))))
    assert (Schedule.load(out).compute == Schedule.load(start).compute).all()


def test_router_l2c(model: Path, tmp_path: Path) -> None:
    images = tmp_path / "images.safetensors"
    save_file({"images": torch.randn(4, 2, 8, 8), "labels": torch.tensor([0, 1, 2, 3])}, images)
    out = tmp_path / "s.json"
    succeeded(route(model, out, "--objective", "l2c", "--images", images))
    assert Schedule.load(out).compute[[0, 2, 4]].all()


def test_inspect_and_plot(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    Schedule.uniform(make_dit(), 6, note="[bold]a note[/bold]").save(file)
    assert succeeded(run("inspect", file)) == f"{Schedule.load(file)}\n"
    succeeded(run("plot", file))
    succeeded(run("plot", file, "--out", tmp_path / "other.png"))
    for name in ("s.png", "other.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["learn", "router", "try", "inspect", "plot", "convert"])
def test_help(command: str) -> None:
    assert "Usage" in succeeded(run(command, "--help"))
    missing = [parameter.name for parameter in get_command(app).commands[command].params if not parameter.help]
    assert not missing, "each option says what it is"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--sampler", "heun"), "sampler: expected one of ddim, ddpm, iddpm, dpmsolver++"),
        (("--features", "f.safetensors"), "features: expected none for DiTTransformer2DModel, which takes labels"),
        (("--target-cur", "0.99"), "target CUR: expected 0.00 to 0.83 for 6 steps, got 0.99"),
        (("--target-cur", "nan"), "target CUR: expected 0.00 to 0.83"),
        (("--target-speedup", "2"), "expected one target, got speed-up 2.0 and CUR 0.4"),
        (("--resume",), "--resume: expected --checkpoint FILE, got none"),
        (("--resume", "--checkpoint", "nowhere"), "nowhere: no such checkpoint"),
        (("--init", "uniform:0"), "every: expected a positive integer, got 0"),
        (("--init", "uniform:x"), "init: expected normal, uniform:N or a schedule file, got 'uniform:x'"),
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
def test_router_refuses(model: Path, tmp_path: Path, options: tuple[str, ...], text: str) -> None:
    refused(route(model, tmp_path / "s.json", *options), text)
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(("option", "value"), [("--steps", "1"), ("--order", "3"), ("--estimator", "x"), ("--lr", "x")])
def test_router_refuses_what_typer_checks(model: Path, tmp_path: Path, option: str, value: str) -> None:
    result = route(model, tmp_path / "s.json", option, value)
    assert result.exit_code == 2 and f"Invalid value for '{option}'" in click.unstyle(result.stderr)


def test_router_needs_a_goal(model: Path, tmp_path: Path) -> None:
    result = route(model, tmp_path / "s.json", target=())
    refused(result, "expected beta, a target speed-up or a target CUR, got none")


@pytest.mark.parametrize("name", ["dit-fashoin", "./nowhere", "/nowhere/model"])
def test_router_refuses_unknown_models(tmp_path: Path, name: str) -> None:
    refused(route(name, tmp_path / "s.json"), "model: expected a reference model", repr(name))


def test_router_refuses_folders_without_a_model(tmp_path: Path) -> None:
    refused(route(tmp_path, tmp_path / "s.json"), str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    refused(route(tmp_path, tmp_path / "s.json"), str(tmp_path))


def test_router_refuses_another_model_class(unet: Path, tmp_path: Path) -> None:
    refused(route(unet, tmp_path / "s.json"), "UNet2DModel", "DiTTransformer2DModel")


@pytest.mark.parametrize("option", ["--out", "--checkpoint", "--published"])
def test_router_refuses_missing_folders_before_it_trains(model: Path, tmp_path: Path, option: str) -> None:
    target = tmp_path / "missing" / "file"
    arguments = {"--model": model, "--out": tmp_path / "s.json", option: target}
    result = run("router", *ROUTER, *TARGET, *(x for pair in arguments.items() for x in pair))
    refused(result, f"{target}: there is no folder {target.parent}")
    assert not any(tmp_path.iterdir())


def test_router_refuses_a_folder_as_output_before_it_trains(model: Path, tmp_path: Path) -> None:
    result = route(model, tmp_path, "--checkpoint", tmp_path / "c")
    refused(result, str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_router_refuses_other_checkpoints(model: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    resume = ("--checkpoint", checkpoint, "--resume")
    succeeded(route(model, tmp_path / "s.json", "--checkpoint", checkpoint))
    refused(route(model, tmp_path / "t.json", *resume, "--guidance", "4"), "guidance_scale expected 4.0, got 1.5")
    refused(route(model, tmp_path / "t.json", *resume, "--lr", "0.5"), "lr expected 0.5, got 0.05")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    refused(route(model, tmp_path / "t.json", *resume), f"{checkpoint}: not a checkpoint of harmonica_rt.train")


def test_router_refuses_wrong_starts(model: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.json"
    Schedule.uniform(make_dit(), 5).save(start)
    refused(route(model, tmp_path / "s.json", "--init", start), "init: expected a schedule of 6 steps, got 5")
    Schedule.uniform(make_dit(layers=2), 6).save(start)
    refused(route(model, tmp_path / "s.json", "--init", start), "layers expected 3, got 2")
    start.write_text("{")
    refused(route(model, tmp_path / "s.json", "--init", start), str(start))


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
def test_router_refuses_wrong_images(
    model: Path, tmp_path: Path, tensors: dict[str, torch.Tensor] | None, text: str
) -> None:
    images = tmp_path / "images.safetensors"
    if tensors is None:
        images.write_text("no images here")
    else:
        save_file(tensors, images)
    refused(route(model, tmp_path / "s.json", "--objective", "l2c", "--images", images), text)


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


def test_convert_takes_other_methods_plans(model: Path, tmp_path: Path) -> None:
    out, lists = tmp_path / "s.json", tmp_path / "lists.json"
    succeeded(run("convert", "110101", "--method", "mask", "--model", model, "--out", out))
    assert Schedule.load(out) == Schedule.from_mask("110101", make_dit())
    succeeded(run("convert", "110101", "--method", "mask", "--level", "output", "--model", model, "--out", out))
    assert Schedule.load(out).output.tolist() == [False, False, True, False, True, False]
    lists.write_text('{"attn": [1, 0, 1], "mlp": [1, 0, 0]}')
    succeeded(run("convert", lists, "--method", "smoothcache", "--model", model, "--out", out))
    assert Schedule.load(out) == Schedule.from_smoothcache(lists, make_dit())
    refused(run("convert", lists, "--method", "ecad", "--model", model, "--out", out), "lists.json: expected steps")
    refused(run("convert", "0101", "--method", "mask", "--model", model, "--out", out), "mask: expected 1 at step 0")


def test_progress_of_a_router_is_a_line_a_phase(model: Path, tmp_path: Path) -> None:
    lines = route(model, tmp_path / "s.json").stderr.splitlines()
    unknown = "time left not known yet"
    assert lines[:2] == [f"model: {model}, {unknown}", f"first iteration: 0 of 2 iterations, {unknown}"]
    assert re.fullmatch(r"router: 1 of 2 iterations, loss .*, \d+:\d\d left", lines[2]) and len(lines) == 3
