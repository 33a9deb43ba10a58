"""The commands users type, on small settings: they run, gate on correctness and write what they say."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from bench import demo, run_latency, run_quality
from bench.by_hand.module_reuse import ModuleReuse
from bench.measure.launches import CountLaunches
from bench.measure.quality import FULL, measure
from bench.measure.timing import interleave
from bench.models.reference import load_pipeline, noise
from bench.models.sampling import Sampling
from bench.models.schedule_specs import parse_schedule
from harmonica_rt.generating import Generation
from harmonica_rt.measuring import Timing, psnr, ratio
from harmonica_rt.train import converged
from harmonica_rt.train.sampled import Sampled

from ..conftest import Calls, make_dit, needs_compiler, random_schedule

SMALL = ["--model", "dit-s-2", "--layers", "1", "--size", "8", "--steps", "3", "--rounds", "2"]


def png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert demo.main(["--out", str(tmp_path), "--count", "4", "--rounds", "1", "--backend", "eager"]) == 0
    printed = capsys.readouterr().out
    assert "Seen: with 51 % of its branches reused" in printed
    assert all(png(tmp_path / f"{name}.png") for name in ("images", "converged", "text", "schedule", "latency"))
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["demo"]["psnr_mean"] > 45
    assert result["demo"]["converged"]["learned"] > result["demo"]["converged"]["full"] + 2
    assert list(result["demo"]["text"]) == ["pixart-emoji", "flux-emoji"]
    assert all(20 < value < 60 for value in result["demo"]["text"].values())
    assert result["cur"] == pytest.approx(0.508, abs=0.001)


def test_run_latency_writes_what_it_measures(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "a" / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert run_latency.main([*SMALL, "--backend", "eager", "--no-compile", *files]) == 0
    assert png(tmp_path / "r.png")
    result = json.loads((tmp_path / "a" / "r.json").read_text())
    names = [row["name"] for row in result["rows"]]
    assert names == ["diffusers eager", "module-level reuse", "harmonica_rt, eager"]
    assert result["cur"] == pytest.approx(1 / 3)
    assert result["environment"]["torch"] == torch.__version__
    eager, naive, ours = result["rows"]
    assert eager["speedup"] == 1.0
    assert eager["realised"] is None
    assert ours["realised"] == pytest.approx(ours["speedup"] / result["theoretical"])
    assert ours["launches_per_step"] < naive["launches_per_step"] < eager["launches_per_step"]
    assert ours["slot_bytes"] == 2 * 2 * 16 * 384 * 4, "a value of two branches for two samples of 16 tokens"
    assert all(len(row["seconds"]) == 2 for row in result["rows"])


@needs_compiler
def test_run_latency_with_everything_compiled(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert run_latency.main([*SMALL, "--backend", "inductor", "--keep-cache", "--json", str(path)]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    whole, ours = rows["torch.compile, full"], rows["harmonica_rt, inductor"]
    assert 5 < whole["launches_per_step"] < rows["diffusers eager"]["launches_per_step"]
    assert whole["compile_seconds"] > 0
    assert ours["realised_over_compile"] == pytest.approx(
        ours["speedup_over_compile"] / (ours["speedup"] / ours["realised"])
    )


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("harmonica_rt.backends.gap_eager", lambda x, **_: (x, x.clone()))
    assert run_latency.main([*SMALL, "--backend", "eager", "--no-compile"]) == 2
    assert "nothing was timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--schedule", "uniform"], "random:PERCENT[:ORDER[:SEED]] or a schedule file, got 'uniform'"),
        (["--schedule", "random:90"], "expected at most 66 % reused in 3 steps, got 'random:90'"),
        (["--schedule", "uniform:2:9"], "order: expected one of (0, 1, 2), got 9"),
        (["--schedule", "no-such-file.json"], "got 'no-such-file.json'"),
        (["--backend", "fast"], "backend: expected one of"),
        (["--size", "15"], "multiple of the patch, 2, got 15"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], match: str, capsys: pytest.CaptureFixture) -> None:
    assert run_latency.main([*SMALL, "--no-compile", *arguments]) == 2
    assert match in capsys.readouterr().out


def test_random_schedules_reuse_what_was_asked_for() -> None:
    pipeline = load_pipeline("dit-fashion")
    one, other = (parse_schedule(f"random:75:1:{seed}", pipeline, 20) for seed in (0, 1))
    assert one.cur == other.cur == 0.75 and one.compute[0].all() and (one.compute != other.compute).any()


def test_a_schedule_file_is_benchmarked(tmp_path: Path) -> None:
    pipeline = load_pipeline("dit-s-2", layers=1, size=8)
    schedule = hrt.Schedule.uniform(pipeline.transformer, 3, 3, timesteps=pipeline.timesteps(3))
    schedule.save(tmp_path / "s.json")
    arguments = [*SMALL, "--schedule", str(tmp_path / "s.json"), "--backend", "eager", "--no-compile"]
    assert run_latency.main([*arguments, "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["cur"] == schedule.cur


def test_run_quality(tmp_path: Path) -> None:
    arguments = ["--count", "2", "--schedule", "uniform:2:0", "--schedule", "uniform:2:1", "--schedule", "full"]
    assert run_quality.main([*arguments, "--json", str(tmp_path / "q.json")]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "q.json").read_text())["rows"]}
    assert rows["full"]["worst"] > 90
    assert rows["uniform:2:1"]["mean"] > rows["uniform:2:0"]["mean"] + 6
    assert rows["uniform:2:1"]["mean"] > rows["10 steps"]["mean"] + 4


def quality(*schedules: str, steps: int = 4, count: int = 2, **options: Any) -> dict[str, Any]:
    """A small comparison without fewer steps."""
    return measure(schedules, steps=steps, count=count, seed=0, **({"fewer": ()} | options))


def rows_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["rows"]}


@pytest.fixture
def learned(tmp_path: Path) -> Path:
    """A file of a schedule for 4 steps whose weights are worse than the forecast's, made for guidance 1.5."""
    pipeline = load_pipeline("dit-fashion")
    schedule = hrt.Schedule.uniform(
        pipeline.transformer, 4, 2, 0, sampler="DDIMScheduler", timesteps=pipeline.timesteps(4), guidance_scale=1.5
    )
    schedule.replace(weights=0.5 * schedule.weights).save(tmp_path / "half.weights.json")
    return tmp_path / "half.weights.json"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hrt, "compile", partial(hrt.compile, backend="eager"))  # no time for a compiler


@pytest.mark.usefixtures("eager")
def test_run_quality_of_twins(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [
        "--count",
        "2",
        "--steps",
        "4",
        "--fewer",
        "0",
        "--schedule",
        "uniform:2:1",
        "--schedule",
        f"{learned}",
    ]
    assert run_quality.main([*arguments, "--twins", "--json", str(tmp_path / "q.json")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "q.json").read_text())
    rows = rows_of(result)
    assert list(rows) == ["uniform:2:1", "half.weights", "half.weights, forecast"]
    mine, twin = rows["half.weights"], rows["half.weights, forecast"]
    assert twin["mean"] == pytest.approx(quality("uniform:2:0")["rows"][0]["mean"], abs=1e-3)
    assert mine["gain"] == mine["mean"] - twin["mean"] < -1
    assert (mine["cur"], mine["theoretical"]) == (twin["cur"], twin["theoretical"])
    assert [row["name"] for row in rows.values() if "gain" in row] == ["half.weights"]
    assert "gain" in printed and f"{mine['gain']:+.1f}" in printed
    assert "DDIM 4, guidance 1.5: PSNR to the full run" in printed
    assert {name: result[name] for name in ("target", "sampler", "guidance", "classes")} == {
        "target": "full",
        "sampler": "DDIMScheduler",
        "guidance": 1.5,
        "classes": None,
    }
    assert list(rows_of(quality(str(learned)))) == ["half.weights"]


@pytest.mark.usefixtures("eager")
def test_run_quality_to_the_converged_solution(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    arguments = ["--count", "2", "--steps", "10", "--fewer", "5", "--schedule", "full", "--schedule", "uniform:5:0"]
    assert run_quality.main([*arguments, "--target", "converged", "--json", str(tmp_path / "q.json")]) == 0
    assert "PSNR to the converged solution" in " ".join(capsys.readouterr().out.split())
    result = json.loads((tmp_path / "q.json").read_text())
    first, again, reused, fewer = result["rows"]
    assert (result["target"], first["name"]) == ("converged", FULL)
    assert (first["cur"], first["theoretical"]) == (0.0, 1.0)
    assert 5 < first["worst"] <= first["mean"] < 40, "not to itself"
    assert first["by_seed"] == pytest.approx([first["mean"]])
    assert again["mean"] == pytest.approx(first["mean"], abs=1e-3)
    assert first["mean"] > max(reused["mean"], fewer["mean"])


@pytest.mark.parametrize("model", ["dit-fashion", "flux-emoji"])
def test_run_quality_aims_where_learning_does(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converged solution, in more steps."""
    monkeypatch.setattr(converged, "STEPS", 10)
    monkeypatch.setattr(converged, "FLOW_STEPS", 10)
    sampling = Sampling.of(model, guidance=1.5)
    start = noise(sampling.pipeline, 1)
    call = {"latents": start, "num_inference_steps": 4, "guidance_scale": 1.5}
    generation = Generation(sampling.pipeline, sampling.labels(1), **call)
    wanted = Sampled(sampling.pipeline).converged(generation, [0])
    if model == "flux-emoji":  # its latents are squares of pixels
        wanted = sampling.pipeline.vae.decode(wanted, return_dict=False)[0]
    errors = [(made - wanted).norm() for made in (sampling.converged(start), sampling(start, 4))]
    assert errors[0] < errors[1] / 2


@pytest.mark.usefixtures("eager")
def test_run_quality_with_another_sampler(learned: Path, capsys: pytest.CaptureFixture) -> None:
    rows = {
        name: quality("full", sampler=name, target="converged", steps=10, count=1)["rows"]
        for name in ("ddim", "dpmsolver++")
    }
    assert rows["dpmsolver++"][0]["mean"] > rows["ddim"][0]["mean"] + 1, "a second-order sampler is closer"
    assert rows["dpmsolver++"][1]["mean"] == pytest.approx(rows["dpmsolver++"][0]["mean"], abs=1e-3)
    arguments = ["--count", "2", "--steps", "4", "--fewer", "2", "--sampler", "dpmsolver++"]
    assert run_quality.main([*arguments, "--schedule", "uniform:2:1"]) == 0
    assert "DPM-Solver++ 4, guidance 1.5" in capsys.readouterr().out
    assert run_quality.main([*arguments, "--schedule", str(learned)]) == 2
    printed = capsys.readouterr().out
    assert "was made for DDIMScheduler, --sampler samples with DPMSolverMultistepScheduler" in printed


@pytest.mark.usefixtures("eager")
def test_run_quality_with_another_guidance(learned: Path, capsys: pytest.CaptureFixture) -> None:
    """Other images; at 1 and below without guidance, so all the same."""
    means = [rows_of(quality(str(learned), guidance=g))["half.weights"]["mean"] for g in (None, 4.0, 1.0, 0.0)]
    assert len({round(mean, 3) for mean in means}) == 3
    assert means[2] == means[3]
    arguments = ["--count", "2", "--steps", "4", "--fewer", "0", "--schedule", "full", "--guidance"]
    assert run_quality.main([*arguments, "1"]) == 0
    assert "DDIM 4, no guidance: PSNR" in capsys.readouterr().out
    assert run_quality.main([*arguments, "nan"]) == 2
    assert "--guidance: expected a finite number, got nan" in capsys.readouterr().out


@pytest.mark.usefixtures("eager")
def test_run_quality_of_some_classes(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    arguments = ["--count", "3", "--steps", "4", "--fewer", "0", "--schedule", "uniform:2:0", "--classes"]
    assert run_quality.main([*arguments, "8,3", "--json", str(tmp_path / "q.json")]) == 0
    assert "guidance 1.5, classes 8, 3: PSNR" in capsys.readouterr().out
    result = json.loads((tmp_path / "q.json").read_text())
    assert result["classes"] == [8, 3]
    assert Sampling.of("dit-fashion", classes=(8, 3)).labels(5) == [8, 3, 8, 3, 8]
    first = quality("uniform:2:0", count=3)["rows"][0]
    assert (
        result["rows"][0]["mean"]
        != first["mean"]
        == quality("uniform:2:0", count=3, classes=(0, 1, 2))["rows"][0]["mean"]
    )
    assert run_quality.main([*arguments, "3,10"]) == 2
    assert "--classes: expected labels from 0 to 9, got [3, 10]" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_quality.main([*arguments, "bag"])
    assert "expected class labels with commas, got 'bag'" in capsys.readouterr().err


def test_run_quality_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="--target: expected one of full, converged, got 'best'"):
        quality(target="best")
    with pytest.raises(ValueError, match=r"sampler: expected one of ddim, .*dpmsolver\+\+, .*, got 'heun'"):
        quality(sampler="heun")


@pytest.mark.usefixtures("eager")
def test_run_quality_of_everything_with_the_frechet_distance(learned: Path) -> None:
    hrt.Schedule.load(learned).replace(sampler=None, timesteps=None).save(learned)
    options = {"target": "converged", "sampler": "dpmsolver++", "guidance": 1.0, "classes": (1, 8), "twins": True}
    rows = rows_of(quality(str(learned), frechet=70, **options))
    assert list(rows) == [FULL, "half.weights", "half.weights, forecast"]
    assert all(row["mean"] > 0 and row["frechet_real"] > row["frechet_full"] > 0 for row in rows.values())
    assert rows[FULL]["class_accuracy"] > 0.8


def test_trained_models_keep_their_size() -> None:
    with pytest.raises(ValueError, match="dit-fashion is trained: expected no other layers or size, got 3 and None"):
        load_pipeline("dit-fashion", layers=3)


def test_the_reference_pipeline_makes_pictures() -> None:
    pipeline = load_pipeline("dit-fashion")
    generator = torch.Generator().manual_seed(0)
    images = pipeline([8, 9], generator=generator, num_inference_steps=4).images
    assert [image.size for image in images] == [(28, 28)] * 2
    array = pipeline([8, 9], latents=noise(pipeline, 2), num_inference_steps=4, output_type="np").images
    assert array.shape == (2, 28, 28, 1)
    assert 0 <= array.min() < 0.1 < 0.7 < array.max() <= 1
    (tensor,) = pipeline([8, 9], latents=noise(pipeline, 2), num_inference_steps=4, output_type="pt", return_dict=False)
    assert tensor.shape == (2, 1, 28, 28)


def test_module_reuse_counts_and_leaves_no_trace() -> None:
    model, schedule, calls = make_dit(), random_schedule(2, order=2), Calls(6)
    before = [id(m) for m in model.modules()]
    wanted = calls.run(model)
    reuse = ModuleReuse(model, schedule)
    calls.run(reuse)
    assert (reuse.computed, reuse.reused) == (schedule.compute.sum(), (~schedule.compute).sum())
    reuse.remove()
    assert [id(m) for m in model.modules()] == before
    assert all(torch.equal(a, b) for a, b in zip(calls.run(model), wanted))


def test_measures() -> None:
    order: list[str] = []
    timings = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert [len(t.seconds) for t in timings.values()] == [3, 3]
    assert ratio(Timing((2.0, 9.0, 4.0)), Timing((1.0, 1.0, 2.0))) == 2.0
    assert psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.2)).item() == pytest.approx(20.0)
    with CountLaunches() as counter:
        x = torch.ones(4, 4)
        (x.t() + 1).unsqueeze(0)
    assert counter.count == 2, "ones and add; views and the empty they may need do not count"
