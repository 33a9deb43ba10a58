"""Measures of a run: times within rounds, and how near images are to others."""

from __future__ import annotations

import math
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Timing:
    """Seconds of a candidate's rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.seconds, q))


def ratio(baseline: Timing, other: Timing) -> float:
    """Speed-up of `other` over `baseline`: the median over rounds of the ratio within a round."""
    return float(np.median(np.array(baseline.seconds) / np.array(other.seconds)))


def psnr(images: Tensor, reference: Tensor, span: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB; `span` is the range of values ([-1, 1]: 2)."""
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(span**2 / error.clamp_min(1e-20))


def pooled_psnr(images: Tensor, reference: Tensor, span: float = 2.0) -> float:
    """PSNR of the mean squared error over all images, in dB: the worst ones decide."""
    return 10 * math.log10(span**2 / max((images.double() - reference.double()).square().mean().item(), 1e-20))


def ssim(images: Tensor, reference: Tensor, span: float = 2.0) -> Tensor:
    """Structural similarity of each image, 1 for equal ones (Wang et al. 2004: Gaussian window, sigma 1.5).

    The window has 11 pixels a side, or as many as the image where that has less.
    """
    channels = images.shape[1]
    along = [_window(min(11, side)) for side in images.shape[2:]]
    down, across = (window.expand(channels, 1, -1) for window in along)

    def mean(t: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(t, down[..., None], groups=channels), across[..., None, :], groups=channels)

    x, y = images.double(), reference.double()
    mx, my, c1, c2 = mean(x), mean(y), (0.01 * span) ** 2, (0.03 * span) ** 2
    vx, vy, covariance = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    similar = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similar.flatten(1).mean(1)


def _window(length: int) -> Tensor:
    window = torch.exp(-((torch.arange(float(length), dtype=torch.float64) - (length - 1) / 2) ** 2) / (2 * 1.5**2))
    return window / window.sum()


def processor() -> str:
    """The CPU's name."""
    if (about := Path("/proc/cpuinfo")).exists() and (
        names := re.findall(r"^model name\s*: (.*)$", about.read_text(), re.MULTILINE)
    ):
        return names[0]
    return platform.processor() or platform.machine()
