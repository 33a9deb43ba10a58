"""The router: one learnable logit for each step, layer and branch (METHOD: Vocabulary, SDT)."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harmonica_rt.schedule import Schedule

LIMIT = 5.0  # logits are clamped to [-LIMIT, LIMIT] after each optimiser step
TAU = 0.1


class Router(nn.Module):
    """Logits Z [T, L, B]; r = sigmoid(Z). Step 0 is pinned to compute.

    Args:
        steps, layers, branches: T, L, B.
        seed: of the initial logits, N(0, 1).
        pinned: steps that always compute and do not learn.
    """

    def __init__(self, steps: int, layers: int, branches: int, seed: int = 0, pinned: tuple[int, ...] = (0,)) -> None:
        super().__init__()
        self.shape, self.pinned = (steps, layers, branches), pinned
        start = torch.randn(steps, layers * branches, generator=torch.Generator().manual_seed(seed))
        start[list(pinned)] = LIMIT
        # One parameter a step: an optimiser step on Z_i must not move the others by their momentum
        self.logits = nn.ParameterList([nn.Parameter(row.clone().clamp_(-LIMIT, LIMIT)) for row in start])
        for step in pinned:
            self.logits[step].requires_grad_(False)

    def gates(self, step: int) -> Tensor:
        """r of a step, [L B]."""
        return torch.sigmoid(self.logits[step])

    def kept(self, step: int, tau: float = TAU) -> np.ndarray:
        """Which entries of a step are computed in the end, bool [L B]: r > tau."""
        return (torch.sigmoid(self.logits[step].detach()) > tau).cpu().numpy()

    @torch.no_grad()
    def clamp_(self) -> None:
        for row in self.logits:
            row.clamp_(-LIMIT, LIMIT)

    @torch.no_grad()
    def start_from(self, compute: np.ndarray, distance: float) -> None:
        """Warm start: logits of `distance` where `compute` [T, L, B], of -`distance` elsewhere."""
        for row, values in zip(self.logits, compute.reshape(self.shape[0], -1)):
            row.copy_(torch.from_numpy(np.where(values, distance, -distance)))
        for step in self.pinned:
            self.logits[step].fill_(LIMIT)

    def to_tensor(self) -> Tensor:
        """Z, [T, L, B] on the CPU."""
        return torch.stack([row.detach().cpu() for row in self.logits]).view(self.shape)

    def load(self, logits: Tensor) -> None:
        """Take Z [T, L, B]."""
        if tuple(logits.shape) != self.shape:
            raise ValueError(f"router: expected logits of shape {self.shape}, got {tuple(logits.shape)}")
        with torch.no_grad():
            for row, values in zip(self.logits, logits.flatten(1)):
                row.copy_(values)

    def to_schedule(self, tau: float = TAU, **fields: Any) -> Schedule:
        """Computed iff r > tau; pinned steps always. `fields` are further arguments of `Schedule`.

        Raises:
            ValueError: tau is not between 0 and 1.
        """
        check_tau(tau)
        compute = torch.sigmoid(self.to_tensor().double()).numpy() > tau
        compute[list(self.pinned)] = True
        return Schedule(compute, **fields)


def check_tau(tau: float) -> None:
    if not isinstance(tau, float) or not 0 < tau < 1:
        raise ValueError(f"tau: expected a number between 0 and 1, got {tau!r}")


def write_published(router: Router, path: str | os.PathLike[str], tau: float = TAU) -> None:
    """Write a checkpoint as HarmoniCa publishes them, for its authors' sampling code.

    ``{"routers": {"<k>.prob": [2 L] logits}}`` with the papers' step numbers k = T-1-i. Logits are moved so that their
    threshold of 0.1 computes what `tau` does here.
    """
    logits = router.to_tensor().flatten(1) + math.log(TAU / (1 - TAU)) - math.log(tau / (1 - tau))
    logits[list(router.pinned)] = LIMIT
    last = len(logits) - 1
    torch.save({"routers": {f"{last - i}.prob": row.clone() for i, row in enumerate(logits)}}, path)
