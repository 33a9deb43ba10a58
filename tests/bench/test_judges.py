"""What sets of images are worth: glyphs are found where images show them, whichever noises a judge drew."""

from __future__ import annotations

import pytest
import torch

from bench.measure.judges import BATCH, Frechet, NearestGlyph
from bench.models.sampling import Sampling


@pytest.fixture(scope="module")
def emoji() -> Sampling:
    return Sampling.of("pixart-emoji")


def test_glyphs_are_nearest_to_themselves(emoji: Sampling) -> None:
    judge = NearestGlyph.prepare(emoji, 20, 70, seed=1)
    assert len(judge.start) == 3 * BATCH and judge.glyphs.shape == (1148, 3 * 32 * 32)
    names = emoji.labels(96)[:70]
    images = torch.stack([judge.glyphs[judge.names.index(name)] for name in names]).view(-1, 3, 32, 32)
    assert judge.columns(images, names) == {"glyph_accuracy": 1.0}
    assert judge.columns(images.roll(1, 0), names)["glyph_accuracy"] < 0.05
    assert judge.columns(3 * images, names)["glyph_accuracy"] > 0.3  # samplers overshoot: clamped
    red = judge.glyphs[judge.names.index("large red circle")].view(3, 32, 32)[:, 16, 16]
    assert red[0] > 0.5 > red[1]  # channels and places are where they belong


def test_a_judge_samples_what_it_is_given(emoji: Sampling) -> None:
    judge = NearestGlyph.prepare(emoji, 2, 2, seed=1)
    asked: list[tuple[int, int]] = []

    class Given(Sampling):
        def __call__(self, start: torch.Tensor, steps: int, batch: int = 16) -> torch.Tensor:
            asked.append((len(start), steps))
            names = self.labels(len(start))
            return torch.stack([judge.glyphs[judge.names.index(name)] for name in names]).view(-1, 3, 32, 32)

    assert judge(Given(emoji.pipeline, 4.5), 7) == {"glyph_accuracy": 1.0} and asked == [(BATCH, 7)]


def test_too_few_for_the_features() -> None:
    with pytest.raises(ValueError, match="expected more images than the classifier's 64 features, got 64"):
        Frechet.prepare(Sampling.of("dit-fashion"), 2, 64, 0)
