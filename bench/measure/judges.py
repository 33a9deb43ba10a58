"""What a set of a model's images is worth by itself, whatever run they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.models.pipelines import EMOJI
from bench.models.reference import noise
from bench.models.sampling import Sampling

from .frechet import WIDTH, Classifier, Statistics, class_accuracy, features, frechet_distance

BATCH = 32  # of the images; the noises are a multiple of it, so that one plan serves all
SIDE = 32  # of a glyph, in pixels
APART = 1_000_000  # between the seeds of the PSNR's noises, a judge's and those of its reference


@dataclass(frozen=True)
class Judge(ABC):
    """Judges sets of `count` images, all sampled from the same noises."""

    start: Tensor  # noises, padded to whole batches
    count: int

    @classmethod
    @abstractmethod
    def prepare(cls, sampling: Sampling, steps: int, count: int, seed: int) -> Judge:
        """For what `sampling` samples; it makes the full run."""

    def __call__(self, sampling: Sampling, steps: int) -> dict[str, float]:
        """Columns for a row: `sampling`, as its pipeline is, in `steps`."""
        images = sampling(self.start, steps, BATCH)[: self.count]
        return self.columns(images, sampling.labels(len(self.start))[: self.count])

    @abstractmethod
    def columns(self, images: Tensor, labels: list[Any]) -> dict[str, float]:
        """What `images`, [count, channels, height, width], that were to show `labels` are worth."""


def _noises(sampling: Sampling, count: int, seed: int) -> Tensor:
    return noise(sampling.pipeline, -(-count // BATCH) * BATCH, seed)


@dataclass(frozen=True)
class Frechet(Judge):
    """dit-fashion: distance of the images' features to real ones' and to the full run's; how many show their class."""

    classifier: Classifier
    real: Statistics
    full: Statistics  # of the full run from other noises

    @classmethod
    def prepare(cls, sampling: Sampling, steps: int, count: int, seed: int) -> Frechet:
        if count <= WIDTH:
            raise ValueError(f"expected more images than the classifier's {WIDTH} features, got {count}")
        classifier = Classifier.load()
        images = sampling(_noises(sampling, count, seed + 2 * APART), steps, BATCH)[:count]
        full = Statistics.of(features(images, classifier))
        return cls(_noises(sampling, count, seed + APART), count, classifier, Statistics.load(), full)

    def columns(self, images: Tensor, labels: list[Any]) -> dict[str, float]:
        seen = features(images, self.classifier)
        mine = Statistics.of(seen)
        return {
            "frechet_real": frechet_distance(mine, self.real),
            "frechet_full": frechet_distance(mine, self.full),
            "class_accuracy": class_accuracy(seen, labels, self.classifier),
        }


def glyphs(names: list[str]) -> Tensor:
    """What the emoji models were trained on for all they know, [names, pixels] in [-1, 1]."""
    sheet = torch.from_numpy(np.array(Image.open(EMOJI / "glyphs.png").convert("RGB")))
    tiles = sheet.unflatten(0, (-1, SIDE)).unflatten(2, (-1, SIDE))  # rows, height, columns, width, channels
    return tiles.permute(0, 2, 4, 1, 3).flatten(0, 1).flatten(1)[: len(names)] / 127.5 - 1


@dataclass(frozen=True)
class NearestGlyph(Judge):
    """Of emoji: how many images are as near (in L2 over pixels) to their prompt's glyph as to any other."""

    names: list[str]
    glyphs: Tensor  # [names, pixels], in [-1, 1]: what the models were trained on

    @classmethod
    def prepare(cls, sampling: Sampling, steps: int, count: int, seed: int) -> NearestGlyph:
        names = sampling.pipeline.prompts.names
        return cls(_noises(sampling, count, seed + APART), count, names, glyphs(names))

    def columns(self, images: Tensor, labels: list[Any]) -> dict[str, float]:
        seen = images.float().clamp(-1, 1).flatten(1)
        apart = torch.cdist(seen, self.glyphs, compute_mode="donot_use_mm_for_euclid_dist")  # some glyphs are equal
        wanted = torch.tensor([self.names.index(label) for label in labels])
        return {"glyph_accuracy": (apart.gather(1, wanted[:, None])[:, 0] <= apart.amin(1)).double().mean().item()}


JUDGES: dict[str, type[Judge]] = {"dit-fashion": Frechet, "pixart-emoji": NearestGlyph, "flux-emoji": NearestGlyph}
