"""Which way to go for few parameters with noisy, strongly correlated gradients: a natural gradient of recent images.

Weights of neighbouring layers and steps push the result the same way, so that plain or diagonally scaled gradients
(Adam) crawl along the valleys between them. The gradients of single images tell the valleys: F = mean(g g^T) over the
last few hundred (the empirical Fisher matrix), and the step is (F + damping)^-1 times the averaged gradient, through
the singular values of the stacked gradients, so that F itself, parameters squared, is never formed.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class NaturalGradient:
    """Directions from per-image gradients.

    Args:
        damping: of F, relative to the mean of its diagonal.
        window: iterations whose gradients are kept.
        momentum: of the averaged gradient.
    """

    def __init__(self, damping: float = 0.05, window: int = 40, momentum: float = 0.7) -> None:
        self.damping, self.momentum = damping, momentum
        self.recent: deque[Tensor] = deque(maxlen=window)
        self.mean: Tensor | None = None

    def direction(self, gradients: Tensor) -> Tensor:
        """Where to go, [n], of root mean square 1, after an iteration's gradients [images, n]; 0 if all of them are."""
        self.recent.append(gradients)
        fresh = gradients.mean(0)
        self.mean = fresh if self.mean is None else self.momentum * self.mean + (1 - self.momentum) * fresh
        rows = torch.cat(tuple(self.recent)).double()
        _, values, basis = torch.linalg.svd(rows / len(rows) ** 0.5, full_matrices=False)
        squares = values.square()  # eigenvalues of F; the averaged gradient has hardly anything outside their span
        damped = (squares + self.damping * squares.sum() / gradients.shape[1]).clamp_min(1e-300)
        step = basis.T @ ((basis @ self.mean.double()) / damped)
        size = step.square().mean().sqrt()
        return (step / size if size > 0 else step).to(gradients.dtype)
