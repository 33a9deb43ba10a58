"""``harmonica try`` on pipelines in folders, as a person has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.generating import Generation
from harmonica_rt.train.pipeline_task import PipelineTask
from harmonica_rt.train.sampled import Sampled

from ..pipelines.folders import labelled_dit, text_flux, text_pixart, text_qwen, text_sd3, text_wan
from .commands import refused, run, succeeded

SMALL = ("--steps", "6", "--height", "16", "--width", "16", "--call", "max_sequence_length=16", "--backend", "eager")
PIXART = (*SMALL, "--call", "use_resolution_binning=false", "--call", "clean_caption=false")
CLIP = ("--steps", "6", "--height", "32", "--width", "32", "--frames", "9", "--call", "max_sequence_length=16")
SPECS = ("--schedule", "uniform:2", "--schedule", "output:3")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    text_flux().save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\n", encoding="utf-8")
    return file


def attempt(pipeline: Path, prompts: Path, out: Path, *more: object) -> Result:
    return run("try", "--pipeline", pipeline, "--prompts", prompts, "--out", out, *more)


@pytest.mark.parametrize(
    ("make", "subjects", "options"),
    [
        (text_flux, "a cat\na dog", (*SMALL, "--true-cfg", "3", "--negative-prompt", "bad", "--guidance", "3.5")),
        (text_sd3, "a cat\na dog", (*SMALL, "--guidance", "3", "--rounds", "1")),
        (text_qwen, "a cat\na fox", (*SMALL, "--true-cfg", "3", "--negative-prompt", "bad", "--rounds", "1")),
        (text_pixart, "a cat\na dog", (*PIXART, "--guidance", "2", "--dtype", "float32")),
        (labelled_dit, "1\n7", ("--steps", "6", "--rounds", "1")),
        (text_wan, "a cat\na dog", (*CLIP, "--negative-prompt", "bad", "--rounds", "1")),
    ],
    ids=["flux", "sd3", "qwen", "pixart", "dit", "wan"],
)
def test_from_a_folder(make, subjects: str, options: tuple[str, ...], prompts: Path, tmp_path: Path) -> None:
    prompts.write_text(subjects)
    make().save_pretrained(tmp_path / "pipeline")
    out = tmp_path / "out"
    text = succeeded(attempt(tmp_path / "pipeline", prompts, out, *SPECS, *options))
    assert text.splitlines()[-1] == f"wrote {out / 'index.html'}"
    assert {path.name for path in out.iterdir()} == {
        "index.html",
        "sheet.png",
        "figures.csv",
        "figures.json",
        "uniform-2.json",
        "output-3.json",
    }
    read = json.loads((out / "figures.json").read_text())
    assert [row["name"] for row in read["rows"]] == ["full run", "uniform:2", "output:3"]
    assert all(row["calls"] == (2 if "--rounds" in options else 4) for row in read["rows"])
    assert all(15 < row["psnr"] < 100 for row in read["rows"][1:])


def test_a_schedule_file_brings_its_steps(flux: Path, prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    Schedule.uniform(text_flux().transformer, 5, 3).save(file)
    size = [option for option in SMALL if option not in ("--steps", "6")]
    succeeded(attempt(flux, prompts, tmp_path / "out", "--schedule", file, *size, "--rounds", "1"))
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["conditions"]["num_inference_steps"] == 5
    result = attempt(flux, prompts, tmp_path / "other", "--schedule", file, *SMALL)
    refused(result, "mine: expected a schedule of 6 steps, as many as the call makes, got 5")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--schedule", "every:2", *SMALL), "schedule: expected full, uniform:N[:ORDER]"),
        ((*SPECS, "--frames", "9"), "num_frames: FluxPipeline takes no such argument, or not from here; expected"),
        ((*SPECS, "--call", "height"), "--call: expected key=value, got 'height'"),
        ((*SPECS, *SMALL, "--out", "{prompts}"), "--out: expected a folder, got the file"),
        ((*SPECS, *SMALL, "--out", "/no/such/out"), "--out: expected a folder to make out in, got /no/such"),
        ((*SPECS, *SMALL, "--pipeline", "/no/such"), "expected a folder or a hub name (owner/name), got '/no/such'"),
        ((*SPECS, *SMALL, "--inputs", "."), "inputs: expected no prompts beside"),
        (
            (*SPECS, *SMALL, "--prompts", "/no/such"),
            "prompts: expected a file, one a line, got /no/such, which is none",
        ),
    ],
    ids=str,
)
def test_refused(flux: Path, prompts: Path, tmp_path: Path, options: tuple[str, ...], error: str) -> None:
    given = [option.format(prompts=prompts) for option in options]
    refused(attempt(flux, prompts, tmp_path / "out", *given), error)
    assert not (tmp_path / "out").exists()


def test_prompts_are_needed(flux: Path, tmp_path: Path) -> None:
    result = run("try", "--pipeline", flux, "--out", tmp_path / "out", *SPECS, *SMALL)
    refused(result, "prompts: expected at least one for FluxPipeline, got none")


@pytest.mark.parametrize("level", ["blocks", "branches", "output"])
def test_theory_is_what_learning_says_of_two_denoisers(level: str) -> None:
    """Of each the steps that it runs: the first computes more of its own than the second."""
    call = {"num_inference_steps": 8, "height": 16, "width": 16, "num_frames": 9, "guidance_scale": 3.0}
    generation = Generation(text_wan(), ["a cat"], **call)
    sampled = Sampled(generation.pipeline)
    with sampled.ready():
        task = PipelineTask(sampled, generation, level)
        assert task.entered == (4,)
        schedule, expected = task.schedule([0, 1, 2, 4], 1), task.speedup(4)
    compared = hrt.compare(generation.pipeline, {"mine": schedule}, ["a cat"], rounds=1, backend="eager", **call)
    assert compared.rows[1].theory == pytest.approx(expected, rel=1e-6)
