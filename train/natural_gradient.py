"""Which way to go for few parameters with noisy, strongly correlated gradients: a natural gradient of recent images.

Weights of neighbouring layers and steps push the result the same way, so that plain or diagonally scaled gradients
(Adam) crawl along the valleys between them. The gradients of single images tell the valleys: F = mean(g g^T) over the
last few hundred (the empirical Fisher matrix), and the step is (F + damping)^-1 times the averaged gradient, through
the products of the gradients with each other, so that F itself, parameters squared, is never formed: weights per
channel are hundreds of thousands.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

WINDOW = 40  # iterations whose gradients are kept


class NaturalGradient:
    """Directions from per-image gradients.

    Args:
        damping: of F, relative to the mean of its eigenvalues, those counted that so many images can tell.
        window: iterations whose gradients are kept.
        momentum: of the averaged gradient.
    """

    def __init__(self, damping: float = 0.05, window: int = WINDOW, momentum: float = 0.7) -> None:
        self.damping, self.momentum = damping, momentum
        self.recent: deque[Tensor] = deque(maxlen=window)
        self.products: deque[list[Tensor]] = deque(maxlen=window)  # of each of `recent` with those before it and itself
        self.mean: Tensor | None = None

    def direction(self, gradients: Tensor, shares: Tensor | None = None) -> Tensor:
        """Where to go, [n], of root mean square 1 where it goes, after an iteration's gradients [images, n].

        Args:
            shares: of the images in the averaged gradient, [images], 1 in all; alike unless given.
        """
        self.recent.append(gradients)
        fresh = gradients.mean(0) if shares is None else shares.to(gradients.dtype) @ gradients
        self.mean = fresh if self.mean is None else self.momentum * self.mean + (1 - self.momentum) * fresh
        if len(self.products) == self.products.maxlen:
            self.products = deque((row[1:] for row in self.products), maxlen=self.products.maxlen)
        new = gradients.double()
        self.products.append([new @ old.double().T for old in self.recent])
        count = sum(map(len, self.recent))
        squares, vectors = torch.linalg.eigh(self._gram() / count)  # F's own, and what rows they are made of
        kept = squares > 1e-12 * squares[-1].clamp_min(1e-300)
        squares, vectors = squares[kept], vectors[:, kept]
        mean = self.mean.double()
        along = torch.cat([old.double() @ mean for old in self.recent])
        rank = min(gradients.shape[1], count)
        damped = squares + self.damping * squares.sum() / rank
        rows = vectors @ ((vectors.T @ along) / (squares * damped)) / count
        step = sum(part @ old.double() for part, old in zip(rows.split([*map(len, self.recent)]), self.recent))
        moved = step != 0  # what later groups stand in for has no gradient
        size = (step.square().sum() / moved.sum().clamp_min(1)).sqrt()
        return (step / size if size > 0 else step).to(gradients.dtype)

    def state(self) -> dict[str, Tensor]:
        """What it goes on from: the recent gradients, one an iteration, their products, and the mean; none at first."""
        if self.mean is None:
            return {}
        return {"mean": self.mean, "gram": self._gram(), **{f"recent.{i}": rows for i, rows in enumerate(self.recent)}}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take what `state` gave."""
        if not state:
            return
        self.mean = state["mean"]
        self.recent.extend(state[f"recent.{i}"] for i in range(len(state) - 2))
        sizes = [*map(len, self.recent)]
        for i, rows in enumerate(state["gram"].split(sizes)):
            self.products.append(list(rows.split(sizes, 1)[: i + 1]))

    def _gram(self) -> Tensor:
        """Products of all recent gradients, [rows, rows]."""
        sizes = [*map(len, self.recent)]
        gram = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64, device=self.recent[0].device)
        ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        for i, row in enumerate(self.products):
            for j, block in enumerate(row):
                gram[ends[j] : ends[j + 1], ends[i] : ends[i + 1]] = block.T
                gram[ends[i] : ends[i + 1], ends[j] : ends[j + 1]] = (
                    block  # the last to write: `state` has it from here
                )
        return gram
