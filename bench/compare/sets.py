"""What a set of a model's images is worth beside real ones: nearness, precision and recall, what they show.

Features are those of `bench.measure.judges`: dit-fashion's of its classifier, emoji's pixels; for their Fréchet
distance the first 64 principal components of all glyphs, or covariances would be singular. The real ones are
Fashion-MNIST and the glyphs that the models were trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.measure.frechet import FOLDER, WIDTH, Classifier, Statistics, class_accuracy, features, frechet_distance
from bench.measure.judges import APART, BATCH, NearestGlyph
from bench.measure.precision_recall import precision_recall
from bench.models.reference import noise
from bench.models.sampling import Sampling

from .comparison import HELD_OUT

RESAMPLES = 20


@dataclass(frozen=True)
class Sets:
    """A judge of sets of images that are all sampled from the same noises.

    Attributes:
        start: noises, padded to whole batches.
        features: images [n, channels, height, width] -> [n, d].
        accuracy: (images, features, labels) -> share that shows what it was to show.
        real: features of real images [m, d]; `statistics` may be of more of them.
        axes: [d, WIDTH], what features are projected on for the Fréchet distance; nothing unless given.
    """

    start: Tensor
    features: Callable[[Tensor], Tensor]
    accuracy: Callable[[Tensor, Tensor, list[Any]], float]
    real: Tensor
    statistics: Statistics
    axes: Tensor | None = None

    COLUMNS = tuple(
        f"{name}{end}" for name in ("frechet", "accuracy", "precision", "recall") for end in ("", "_spread")
    )

    @classmethod
    def prepare(cls, sampling: Sampling, count: int, seed: int = HELD_OUT + APART) -> Sets:
        """For sets of `count` images of a reference model.

        Raises:
            ValueError: not more images than features.
        """
        if count <= WIDTH:
            raise ValueError(f"--sets: expected 0, or more images than the {WIDTH} features, got {count}")
        start = noise(sampling.pipeline, -(-count // BATCH) * BATCH, seed)
        if sampling.pipeline.prompts is None:
            return cls(start, *_fashion())
        return cls(start, *_emoji(NearestGlyph.prepare(sampling, 0, 1, seed)))

    def columns(self, images: Tensor, labels: list[Any]) -> dict[str, float]:
        """Figures and their spreads: Fréchet's over resamples of the set, shares' as of independent draws."""
        seen = self.features(images)
        narrow = seen if self.axes is None else seen @ self.axes
        draw = torch.Generator().manual_seed(0)
        again = [narrow[torch.randint(len(seen), (len(seen),), generator=draw)] for _ in range(RESAMPLES)]
        distances = torch.tensor([frechet_distance(some, self.statistics) for some in again])
        precision, recall = precision_recall(seen, self.real)
        row = {"frechet": frechet_distance(narrow, self.statistics), "frechet_spread": distances.std().item()}
        shares = {
            "accuracy": (self.accuracy(images, seen, labels), len(seen)),
            "precision": (precision, len(seen)),
            "recall": (recall, len(self.real)),
        }
        for name, (share, count) in shares.items():
            row |= {name: share, f"{name}_spread": (share * (1 - share) / count) ** 0.5}
        return row


def _fashion() -> tuple[Any, ...]:
    classifier = Classifier.load()
    real = load_file(FOLDER / "real-features.safetensors")["features"].float()
    return (
        lambda images: features(images, classifier),
        lambda images, seen, labels: class_accuracy(seen, labels, classifier),
        real,
        Statistics.load(),
    )


def _emoji(judge: NearestGlyph) -> tuple[Any, ...]:
    axes = torch.linalg.svd(judge.glyphs - judge.glyphs.mean(0), full_matrices=False).Vh[:WIDTH].T
    return (
        lambda images: images.float().clamp(-1, 1).flatten(1),
        lambda images, seen, labels: judge.columns(images, labels)["glyph_accuracy"],
        judge.glyphs,
        Statistics.of(judge.glyphs @ axes),
        axes,
    )
