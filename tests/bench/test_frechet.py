"""The Fréchet distance against its closed forms, the stored classifier, and both in the quality benchmark."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import harmonica_rt as hrt
from bench import run_quality
from bench.measure import quality
from bench.measure.frechet import FOLDER, WIDTH, Classifier, Statistics, class_accuracy, features, frechet_distance
from bench.models.reference import load_pipeline, noise
from bench.models.sampling import Sampling

COUNT = 70  # the least round number above the classifier's width


def gaussian(mean: Tensor, covariance: Tensor) -> Statistics:
    return Statistics(mean.double(), covariance.double(), 100)


def random_covariance(width: int) -> Tensor:
    root = torch.randn(width, width, dtype=torch.float64)
    return root @ root.T / width


def test_diagonal_gaussians() -> None:
    """|m_a - m_b|^2 + sum (s_a - s_b)^2, for standard deviations s."""
    mean_a, mean_b, deviation_a, deviation_b = torch.rand(4, 7, dtype=torch.float64)
    wanted = (mean_a - mean_b).square().sum() + (deviation_a - deviation_b).square().sum()
    a, b = gaussian(mean_a, deviation_a.square().diag()), gaussian(mean_b, deviation_b.square().diag())
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-12)
    assert frechet_distance(gaussian(mean_a, torch.zeros(7, 7)), b) == pytest.approx(
        ((mean_a - mean_b).square().sum() + deviation_b.square().sum()).item()
    ), "a point has no deviation"


def test_covariances_that_do_not_commute() -> None:
    """The trace of (C_a C_b)^(1/2) from the eigenvalues of the product itself, which is not symmetric."""
    mean, a, b = torch.zeros(9), random_covariance(9), random_covariance(9)
    cross = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    wanted = (a.trace() + b.trace() - 2 * cross).item()
    assert wanted > 1
    assert frechet_distance(gaussian(mean, a), gaussian(mean, b)) == pytest.approx(wanted, rel=1e-9)


def test_sets_of_features() -> None:
    a, b = torch.randn(200, 16), torch.randn(150, 16) @ torch.randn(16, 16)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 16, rel=1e-5), "only the mean moved"
    assert frechet_distance(a, 2 * a) == pytest.approx(
        Statistics.of(a).covariance.trace().item() + a.double().mean(0).square().sum().item(), rel=1e-9
    ), "deviations doubled: their differences are the deviations"
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 10


def test_statistics(tmp_path: Path) -> None:
    samples = torch.randn(50, 6)
    statistics = Statistics.of(samples)
    assert statistics.count == 50
    assert statistics.covariance.dtype == torch.float64
    centred = samples.double() - samples.double().mean(0)
    assert torch.allclose(statistics.covariance, centred.T @ centred / 49)
    statistics.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    assert again.count == 50
    assert again.mean.dtype == torch.float64
    assert frechet_distance(again, samples) == pytest.approx(0, abs=1e-5), "stored in float32"


@pytest.mark.parametrize(
    ("a", "match"),
    [
        (torch.zeros(8, 8), "expected more than 8 samples for a width of 8, got 8"),
        (torch.zeros(80), r"expected \[count, d\], got \[80\]"),
        (torch.randn(90, 9), "expected features of one width, got 9 and 8"),
        (torch.full((90, 8), torch.nan), "expected finite values, got NaN or infinity in 90 of 90 samples"),
    ],
)
def test_errors_name_both_sides(a: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        frechet_distance(a, torch.randn(90, 8))


def test_the_stored_classifier() -> None:
    classifier, claims = Classifier.load(), json.loads((FOLDER / "training.json").read_text())
    assert claims["test_accuracy"] >= 0.92
    assert not classifier.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in classifier.parameters())
    images = torch.rand(3, 1, 28, 28) * 4 - 2
    seen = features(images, classifier)
    assert seen.shape == (3, WIDTH)
    assert torch.equal(seen, features(images.clamp(-1, 1), classifier)), "what overshoots is clamped"
    assert torch.equal(features(images, classifier, batch=2)[2:], features(images[2:], classifier))
    predicted = classifier(images.clamp(-1, 1)).argmax(1)
    assert class_accuracy(seen, predicted, classifier) == 1.0
    assert class_accuracy(seen, [*predicted[:2].tolist(), (predicted[2].item() + 1) % 10], classifier) == 2 / 3
    assert (FOLDER / "classifier.fp16.safetensors").stat().st_size < 1_000_000


def test_the_classifier_refuses_what_it_was_not_made_for() -> None:
    classifier = Classifier.load()
    with pytest.raises(ValueError, match=r"expected \[count, 1, 28, 28\], got \[2, 3, 28, 28\]"):
        features(torch.zeros(2, 3, 28, 28), classifier)
    with pytest.raises(ValueError, match="a label for each image, got 1 labels for 2 images"):
        class_accuracy(torch.zeros(2, WIDTH), [3], classifier)


def test_the_statistics_of_the_real_images() -> None:
    """Of all 70,000; far from noise, and near enough to the reference model's images to be of the same data."""
    real, classifier, pipeline = Statistics.load(), Classifier.load(), load_pipeline("dit-fashion")
    assert (real.count, real.mean.shape, real.covariance.shape) == (70_000, (WIDTH,), (WIDTH, WIDTH))
    assert torch.equal(real.covariance, real.covariance.T)
    start = noise(pipeline, COUNT)
    images = Sampling(pipeline, 1.5)(start, 4)
    near, far = (features(x, classifier) for x in (images, start))
    assert frechet_distance(near, real) < 0.5 * frechet_distance(far, real)


def test_run_quality(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hrt, "compile", partial(hrt.compile, backend="eager"))  # no time for a compiler
    path = tmp_path / "q.json"
    arguments = ["--count", "2", "--steps", "4", "--frechet", str(COUNT), "--schedule", "uniform:2:0"]
    assert run_quality.main([*arguments, "--json", str(path)]) == 0
    assert "Fréchet" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["frechet"] == COUNT
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["full run", "uniform:2:0"]
    assert rows["full run"]["mean"] is None
    full, reused = rows.values()
    assert 0 < full["frechet_full"] < full["frechet_real"]
    assert reused["frechet_full"] > 0
    assert full["class_accuracy"] > 0.5


def test_run_quality_without_it(capsys: pytest.CaptureFixture) -> None:
    result = quality.measure((), steps=4, count=2, seed=0, fewer=(2,))
    assert [row["name"] for row in result["rows"]] == ["2 steps"]
    assert "frechet_real" not in result["rows"][0]
    assert run_quality.main(["--frechet", str(WIDTH)]) == 2
    assert f"expected 0 or more images than the classifier's {WIDTH} features, got {WIDTH}" in capsys.readouterr().out
