"""Where a run's time goes, and how it grows: the parts add up, the exponents are those of the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import harmonica_rt as hrt
from bench import run_latency, run_scale
from bench.measure import breakdown
from bench.models.reference import load_pipeline, noise


def test_parts_add_up_and_results_stay() -> None:
    pipeline = load_pipeline("dit-fashion")
    schedule, start = hrt.Schedule.uniform(pipeline.transformer, 4, every=2), noise(pipeline, 2)
    images: list[torch.Tensor] = []

    def sample(own: object) -> torch.Tensor:
        images.append(own([1, 2], num_inference_steps=4, latents=start, output_type="latent").images)
        return images[-1]

    found = breakdown.profile(pipeline.around(pipeline.transformer), schedule, "eager", sample, rounds=2)
    assert all(torch.equal(image, images[0]) for image in images)
    parts = found.medians()
    assert {part: values.shape for part, values in parts.items()} == dict.fromkeys(breakdown.PARTS, (4,))
    assert (parts["branches"][[0, 2]] > 0).all() and (parts["branches"][[1, 3]] == 0).all(), "nothing else is computed"
    assert parts["modulation"][0] > 0 and not parts["modulation"][1:].any(), "once a run"
    assert (parts["Gaps"] > 0).all() and (parts["host"] > 0).all()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--steps", "4", "--batch", "1", "--backend", "eager", "--rounds", "1"]
    assert run_latency.main([*arguments, "--profile", str(tmp_path / "p.png")]) == 0
    assert "modulation" in capsys.readouterr().out and (tmp_path / "p.png").stat().st_size > 5_000
    assert run_latency.main([*arguments, "--device", "cuda", "--profile", "p.png"]) == 2
    assert "--profile: expected --device cpu" in capsys.readouterr().out


def test_scale(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_scale, "BASE", {"batch": 1, "tokens": 64, "layers": 2, "steps": 10})
    small = ["--batch", "2", "--tokens", "64", "--layers", "2", "--steps", "10", "--rounds", "1"]
    assert run_scale.main([*small, "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]) == 0
    assert "batch, exponent" in capsys.readouterr().out and (tmp_path / "s.png").is_file()
    assert run_scale.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert run_scale.exponent([1], [3]) != run_scale.exponent([1], [3]), "NaN"
