"""Pictures as pipelines give them, and how near they are by packages that may be installed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from harmonica_rt.pictures import perceptual_distance, samples_of


def test_samples_of_whatever_a_pipeline_gives() -> None:
    numbers = np.random.default_rng(0).random((2, 4, 5, 3)).astype(np.float32)
    pictures = [Image.fromarray(np.round(255 * each).astype(np.uint8)) for each in numbers]

    tensors = torch.from_numpy(numbers).permute(0, 3, 1, 2)
    for output, count, frames in (
        (SimpleNamespace(images=pictures), 2, 1),
        (SimpleNamespace(images=tensors), 2, 1),
        (SimpleNamespace(frames=[pictures, pictures]), 2, 2),
        ((numbers,), 2, 1),
        ((numbers[None],), 1, 2),
    ):
        made = samples_of(output)
        assert [each.shape for each in made] == [(frames, 4, 5, 3)] * count
        assert np.abs(made[0][0] - numbers[0]).max() < 0.003
    with pytest.raises(TypeError, match="expected an output with images or frames, got dict"):
        samples_of({})


def test_a_perceptual_distance_where_a_package_is_installed(monkeypatch) -> None:
    assert perceptual_distance() == (None, "not installed (pip install lpips)")
    package = ModuleType("lpips")
    package.__spec__ = type(sys.__spec__)("lpips", None)

    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, x, y):
            assert x.shape[1] == 3 and -1 <= x.min() < 0
            return (x - y).abs().mean((1, 2, 3), keepdim=True)

    package.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", package)
    distance, name = perceptual_distance()
    x = np.random.default_rng(0).random((9, 4, 4, 3)).astype(np.float32)
    assert name == "lpips" and distance(x, 1 - x) == pytest.approx(2 * np.abs(2 * x - 1).mean(), rel=1e-5)

    def offline(net: str, verbose: bool) -> None:
        raise OSError("no network")

    package.LPIPS = offline
    assert perceptual_distance() == (None, "lpips is installed, its weights are not: no network")
