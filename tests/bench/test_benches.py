"""The commands users type, on small settings: they run, gate on correctness and write what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import harmonica_rt as hrt
from bench import demo, run_latency, run_quality
from bench.measure import CountLaunches, Timing, interleave, psnr, ratio
from bench.module_reuse import ModuleReuse
from bench.reference import load_pipeline, noise, timesteps

from ..conftest import Calls, make_dit, needs_compiler, random_schedule

SMALL = ["--model", "dit-s-2", "--layers", "1", "--size", "8", "--steps", "3", "--rounds", "2"]


def png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert demo.main(["--out", str(tmp_path), "--count", "4", "--rounds", "1", "--backend", "eager"]) == 0
    printed = capsys.readouterr().out
    assert "Seen: with 50 % of its branches reused" in printed
    assert all(png(tmp_path / f"{name}.png") for name in ("images", "schedule", "latency"))
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["demo"]["psnr_mean"] > 35
    assert result["cur"] == 0.5


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
    monkeypatch.setattr("harmonica_rt.backends.gap_eager", lambda x, slots, gates, weights, norm: (x, x.clone()))
    assert run_latency.main([*SMALL, "--backend", "eager", "--no-compile"]) == 2
    assert "nothing was timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--schedule", "uniform"], "random:PERCENT[:ORDER[:SEED]] or a schedule file, got 'uniform'"),
        (["--schedule", "uniform:2:9"], "order: expected one of (0, 1, 2), got 9"),
        (["--schedule", "no-such-file.json"], "got 'no-such-file.json'"),
        (["--backend", "fast"], "backend: expected one of"),
        (["--size", "15"], "multiple of the patch, 2, got 15"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], match: str, capsys: pytest.CaptureFixture) -> None:
    assert run_latency.main([*SMALL, "--no-compile", *arguments]) == 2
    assert match in capsys.readouterr().out


def test_a_schedule_file_is_benchmarked(tmp_path: Path) -> None:
    pipeline = load_pipeline("dit-s-2", layers=1, size=8)
    schedule = hrt.Schedule.uniform(pipeline.transformer, 3, 3, timesteps=timesteps(pipeline, 3))
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
