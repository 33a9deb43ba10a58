"""How much of a set of images lies among the real ones, and how much of the real ones among them.

Precision: share of generated features that lie in a ball around a real one; recall: the other way round. A ball reaches
to the k-th nearest of its own set (Kynkäänniemi et al. 2019, arXiv 1904.06991, with VGG's features and 50,000 images:
by other features and counts figures differ, and compare with each other only).
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAREST = 3  # k of the paper


def inside(points: Tensor, others: Tensor, nearest: int = NEAREST) -> Tensor:
    """Whether each of `points`, [n, d], lies in a ball around one of `others`, [m, d]: bool [n].

    Raises:
        ValueError: widths differ, or `others` are too few to have a `nearest`-th neighbour.
    """
    if points.ndim != 2 or others.ndim != 2 or points.shape[1] != others.shape[1]:
        raise ValueError(f"expected features [n, d] and [m, d], got {list(points.shape)} and {list(others.shape)}")
    if len(others) <= nearest:
        raise ValueError(f"expected more than {nearest} features to have a {nearest}-th neighbour, got {len(others)}")
    points, others = points.double(), others.double()
    radii = torch.cdist(others, others).kthvalue(nearest + 1, dim=1).values  # the first is itself
    return (torch.cdist(points, others) <= radii).any(1)


def precision_recall(generated: Tensor, real: Tensor, nearest: int = NEAREST) -> tuple[float, float]:
    """(precision, recall) of features [n, d] by those of real images [m, d]."""
    return tuple(inside(*pair, nearest).double().mean().item() for pair in ((generated, real), (real, generated)))
