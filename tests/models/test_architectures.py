"""The published models at their real sizes, on the meta device: they build, lower, and count as published."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import harmonica_rt as hrt
from bench.models.reference import REFERENCES
from harmonica_rt.lowering import lower
from harmonica_rt.models import adapt

DIT = REFERENCES["dit-xl-2"].config
PIXART = {"caption_channels": 4096}
# Name, class, config, tokens of a prompt, CUR of the papers' tables (METHOD: 53 to 55 %; DiT 37.5 %), published GMACs
MODELS = [
    ("DiT-XL/2 256", DiTTransformer2DModel, {**DIT, "sample_size": 32}, 0, 0.375, 118.64),
    ("DiT-XL/2 512", DiTTransformer2DModel, {**DIT, "sample_size": 64}, 0, 0.375, 524.60),
    ("PixArt-alpha 256", PixArtTransformer2DModel, {**PIXART, "sample_size": 32}, 120, 0.5324, None),
    ("PixArt-alpha 512", PixArtTransformer2DModel, {**PIXART, "sample_size": 64}, 120, 0.5464, None),
    ("PixArt-alpha 1024", PixArtTransformer2DModel, {**PIXART, "sample_size": 128}, 120, 0.5506, None),
    ("PixArt-Sigma 256", PixArtTransformer2DModel, {**PIXART, "sample_size": 32}, 300, 0.55, None),
    ("PixArt-Sigma 512", PixArtTransformer2DModel, {**PIXART, "sample_size": 64}, 300, 0.55, None),
    (
        "PixArt-Sigma 1024",
        PixArtTransformer2DModel,
        {**PIXART, "sample_size": 128, "use_additional_conditions": False, "interpolation_scale": 2},
        300,
        0.55,
        None,
    ),
    ("PixArt-Sigma 2K", PixArtTransformer2DModel, {**PIXART, "sample_size": 256}, 300, 0.55, None),
]


@pytest.mark.parametrize(
    ("kind", "config", "text", "cur", "published"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS]
)
def test_a_published_model(kind: type, config: dict, text: int, cur: float, published: float | None) -> None:
    with torch.device("meta"):
        model = kind(**config).eval()
        adapter, size = adapt(model), config["sample_size"]
        sample, timestep = torch.empty(1, 4, size, size), torch.empty(1)
        conditioning: tuple[torch.Tensor, ...] = (torch.zeros(1, dtype=torch.long),)
        if text:
            sizes = (torch.empty(1, 2), torch.empty(1, 1)) if model.use_additional_conditions else ()
            conditioning = (*sizes, torch.empty(1, text, 4096), torch.empty(1, text))
        # torch's counter knows no flash attention: the same attention as two batched products
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(sample, timestep=timestep, **adapter.arguments(conditioning))
    macs = adapter.macs(None, None, 1, text or None)
    total = macs.fixed + adapter.layers * sum(macs.branches)
    assert 2 * total == counter.get_total_flops()
    if published is not None:
        assert total / 1e9 == pytest.approx(published, rel=0.01)
    schedule = hrt.Schedule.full(model, 20)
    reused = np.random.default_rng(0).random(schedule.compute.shape) < cur * 20 / 19
    reused[0] = False
    schedule = schedule.replace(compute=~reused, order=0)
    program = lower(schedule)
    assert program.computed == schedule.compute.sum() and schedule.cur == pytest.approx(cur, abs=0.02)
    assert 0.95 / (1 - cur) < schedule.speedup(model, context=text or None) < 1.05 / (1 - cur)
    entries = adapter.layers * len(adapter.branches)
    assert entries / 2 < program.slots <= entries + 1, "order 0 at this CUR keeps one value of most branches"
