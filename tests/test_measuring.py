"""How near images are, by numbers known otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harmonica_rt.measuring import Timing, pooled_psnr, psnr, ratio, ssim


def ssim_by_hand(x: Tensor, y: Tensor, span: float) -> float:
    """Of one channel, the window laid on every place in turn (Wang et al. 2004, equation 13)."""
    side = min(11, *x.shape)
    away = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    window = torch.exp(-(away**2) / 4.5)
    window = window.outer(window) / window.outer(window).sum()
    values, c1, c2 = [], (0.01 * span) ** 2, (0.03 * span) ** 2
    for i in range(x.shape[0] - side + 1):
        for j in range(x.shape[1] - side + 1):
            a, b = (t[i : i + side, j : j + side].double() for t in (x, y))
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb, both = ((window * u * v).sum() - p for u, v, p in ((a, a, ma**2), (b, b, mb**2), (a, b, ma * mb)))
            values.append((2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return torch.stack(values).mean().item()


@pytest.mark.parametrize("size", [(16, 13), (8, 8)], ids=str)
def test_ssim(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size)
    y = (x + 0.2 * torch.randn(2, 3, *size)).clamp(0, 1)
    expected = [sum(ssim_by_hand(a, b, 1.0) for a, b in zip(*pair)) / 3 for pair in zip(x, y)]
    assert ssim(x, y, span=1.0).tolist() == pytest.approx(expected, rel=1e-9)
    assert ssim(x, x, span=1.0).tolist() == pytest.approx([1.0, 1.0])


def test_psnr() -> None:
    x = torch.zeros(2, 1, 4, 4)
    y = torch.stack([x[0] + 0.1, x[0] + 0.01])
    assert psnr(y, x, span=1.0).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)
    assert pooled_psnr(y, x, span=1.0) == pytest.approx(22.967, abs=1e-3)


def test_a_ratio_is_taken_within_rounds() -> None:
    assert ratio(Timing((1.0, 10.0, 2.0)), Timing((0.5, 5.0, 1.0))) == 2.0
