"""How close two sets of Fashion-MNIST images are as distributions: the Fréchet distance between the features of a
small classifier, and how many images show the class they were asked for.

For Gaussians N(m, C) the squared Fréchet distance is |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al.,
arXiv 1706.08500, with Inception's features). Features differ, so do the figures: compare them with each other only. The
distance between finite sets is biased upwards: compare sets of the same size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "models" / "fashion-classifier"
WIDTH = 64


class Classifier(nn.Module):
    """A small CNN on 28x28 grey images in [-1, 1]; its penultimate layer is normalised to unit variance."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, 128)):  # 28 -> 14 -> 7 -> 3
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2))
        self.penultimate = nn.Sequential(nn.Linear(128 * 9, WIDTH, bias=False), nn.BatchNorm1d(WIDTH, affine=False))
        self.head = nn.Linear(WIDTH, classes)

    def features(self, images: Tensor) -> Tensor:
        """[count, 1, 28, 28] -> [count, WIDTH], before the activation."""
        return self.penultimate(self.body(images))

    def forward(self, images: Tensor) -> Tensor:
        """[count, 1, 28, 28] -> logits [count, classes]."""
        return self.head(self.features(images).relu())

    def save(self, folder: Path) -> None:
        """Weights in fp16; counters of batches are left out."""
        weights = {name: t.half().contiguous() for name, t in self.state_dict().items() if t.is_floating_point()}
        save_file(weights, folder / "classifier.fp16.safetensors")

    @classmethod
    def load(cls, folder: Path = FOLDER) -> Classifier:
        """In fp32, ready for use: eval mode, no gradients."""
        model = cls()
        weights = {name: t.float() for name, t in load_file(folder / "classifier.fp16.safetensors").items()}
        counters = {name: t for name, t in model.state_dict().items() if not t.is_floating_point()}
        model.load_state_dict(weights | counters)
        return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Statistics:
    """Of `count` feature vectors: mean [d] and covariance [d, d], float64."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Of a set of features [count, d], more of them than d: otherwise their covariance is singular."""
        if features.ndim != 2:
            raise ValueError(f"features: expected [count, d], got {list(features.shape)}")
        count, width = features.shape
        if count <= width:
            raise ValueError(f"features: expected more than {width} samples for a width of {width}, got {count}")
        if bad := (~features.isfinite().all(1)).sum().item():
            raise ValueError(f"features: expected finite values, got NaN or infinity in {bad} of {count} samples")
        features = features.double()
        return cls(features.mean(0), features.T.cov(), count)

    def save(self, path: Path) -> None:
        """In float32."""
        tensors = {"mean": self.mean.float(), "covariance": self.covariance.float()}
        save_file(tensors | {"count": torch.tensor(self.count)}, path)

    @classmethod
    def load(cls, path: Path = FOLDER / "real.safetensors") -> Statistics:
        """By default those of the 70,000 images of Fashion-MNIST, training and test, under the stored classifier."""
        stored = load_file(path)
        return cls(stored["mean"].double(), stored["covariance"].double(), int(stored["count"]))


def frechet_distance(a: Tensor | Statistics, b: Tensor | Statistics) -> float:
    """Squared Fréchet distance between two sets of features [count, d], or their statistics; computed in float64."""
    a, b = (x if isinstance(x, Statistics) else Statistics.of(x) for x in (a, b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"expected features of one width, got {len(a.mean)} and {len(b.mean)}")
    # (C_a C_b)^(1/2) has the eigenvalues of the symmetric (A C_b A)^(1/2), where A A = C_a
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ b.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)  # rounding may leave a little below zero


@torch.no_grad()
def features(images: Tensor, classifier: Classifier, batch: int = 250) -> Tensor:
    """Features [count, WIDTH] of images [count, 1, 28, 28], clamped to [-1, 1]: samplers overshoot."""
    if images.ndim != 4 or images.shape[1:] != (1, 28, 28):
        raise ValueError(f"images: expected [count, 1, 28, 28], got {list(images.shape)}")
    return torch.cat([classifier.features(part.float().clamp(-1, 1)) for part in images.split(batch)])


@torch.no_grad()
def class_accuracy(features: Tensor, labels: list[int] | Tensor, classifier: Classifier) -> float:
    """Share of the images behind `features` [count, WIDTH] that the classifier takes for what `labels` [count] say."""
    if len(features) != len(labels):
        raise ValueError(f"expected a label for each image, got {len(labels)} labels for {len(features)} images")
    predicted = classifier.head(features.relu()).argmax(1)
    return (predicted == torch.as_tensor(labels)).double().mean().item()
