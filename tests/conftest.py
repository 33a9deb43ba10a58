"""Shared fixtures: small random DiTs, random schedules, one closeness measure."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from hypothesis import settings
from torch import Tensor

from harmonica_rt import Schedule
from harmonica_rt.kernels.inductor import missing_compiler

torch.set_num_threads(1)
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

needs_compiler = pytest.mark.skipif(
    missing_compiler("cpu") is not None, reason=f"the inductor backend needs a compiler: {missing_compiler('cpu')}"
)
BACKENDS = ["eager", pytest.param("inductor", marks=needs_compiler)]
BRANCHES = {
    "DiTTransformer2DModel": ("attn", "mlp"),
    "PixArtTransformer2DModel": ("attn", "cross_attn", "mlp"),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _libraries_speak_as_before() -> Iterator[None]:
    """Some benches hush diffusers for the rest of their process, which here is that of other tests, too."""
    before = {name: logging.getLogger(name).level for name in ("diffusers", "transformers")}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def make_dit(
    layers: int = 3, heads: int = 2, head_dim: int = 8, seed: int = 0, **config: object
) -> DiTTransformer2DModel:
    """A small DiT in eval mode whose every parameter is random, so that nothing vanishes by initialisation."""
    torch.manual_seed(seed)
    defaults = {"in_channels": 2, "out_channels": 4, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5}
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, **{**defaults, **config}
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_pixart(
    layers: int = 3, heads: int = 2, head_dim: int = 12, seed: int = 0, **config: object
) -> torch.nn.Module:
    """A small PixArt in eval mode whose every parameter is random; `caption_channels` None: text as wide as itself."""
    torch.manual_seed(seed)
    width = heads * head_dim
    defaults = {"in_channels": 2, "out_channels": 4, "sample_size": 8, "caption_channels": 10}
    defaults |= {"cross_attention_dim": width, "use_additional_conditions": False}
    model = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, **{**defaults, **config}
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def dit() -> DiTTransformer2DModel:
    return make_dit()


def random_schedule(
    seed: int,
    steps: int = 6,
    layers: int = 3,
    order: int = 1,
    reuse: float = 0.5,
    learned: bool = False,
    model: str = "DiTTransformer2DModel",
) -> Schedule:
    rng = np.random.default_rng(seed)
    compute = rng.random((steps, layers, len(BRANCHES[model]))) >= reuse
    compute[0] = True
    schedule = Schedule(compute, model=model, branches=BRANCHES[model], order=order)
    if learned:
        schedule = schedule.replace(weights=schedule.weights * rng.normal(1.0, 0.5, schedule.weights.shape))
    return schedule


def timesteps(steps: int) -> list[int]:
    return [int(t) for t in np.linspace(990, 10, steps)]


class Calls:
    """The denoiser calls of one run, with samples that do not depend on the model's answers."""

    def __init__(self, steps: int, batch: int = 2, channels: int = 2, size: tuple[int, int] = (8, 8), seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.samples = torch.randn(steps, batch, channels, *size, generator=generator)
        self.labels = torch.randint(0, 6, (batch,), generator=generator)
        self.timesteps = timesteps(steps)

    def call(self, model: torch.nn.Module, step: int) -> Tensor:
        sample = self.samples[step]
        timestep = torch.full((len(sample),), self.timesteps[step])
        return model(sample, timestep=timestep, class_labels=self.labels).sample

    def run(self, model: torch.nn.Module, first: int = 0) -> list[Tensor]:
        with torch.no_grad():
            return [self.call(model, step) for step in range(first, len(self.samples))]


class TextCalls:
    """The denoiser calls of one run of a PixArt."""

    def __init__(self, model: torch.nn.Module, steps: int, batch: int = 2, mask: str = "mask", tokens: int = 5, seed=0):
        generator = torch.Generator().manual_seed(seed)
        config = model.config
        features = config.caption_channels or config.cross_attention_dim
        size = config.sample_size
        self.samples = torch.randn(steps, batch, config.in_channels, size, size, generator=generator)
        self.timesteps = timesteps(steps)
        keep = torch.ones(batch, tokens, dtype=torch.long)
        for i in range(batch):
            keep[i, 1 + i % tokens :] = 0
        masks = {
            "none": None,
            "mask": keep,
            "bool mask": keep.bool().float(),
            "bias": ((1 - keep.float()) * -10000.0)[:, None],
        }
        self.arguments = {
            "encoder_hidden_states": torch.randn(batch, tokens, features, generator=generator),
            "encoder_attention_mask": masks[mask],
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        if model.use_additional_conditions:
            sizes = {"resolution": torch.full((batch, 2), 8.0), "aspect_ratio": torch.full((batch, 1), 1.0)}
            self.arguments["added_cond_kwargs"] = sizes

    def call(self, model: torch.nn.Module, step: int) -> torch.Tensor:
        sample = self.samples[step]
        timestep = torch.full((len(sample),), self.timesteps[step])
        return model(sample, timestep=timestep, **self.arguments).sample

    def run(self, model: torch.nn.Module, first: int = 0) -> list[torch.Tensor]:
        with torch.no_grad():
            return [self.call(model, step) for step in range(first, len(self.samples))]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value expected."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(actual) == len(expected)
    for step, (a, e) in enumerate(zip(actual, expected)):
        assert a.dtype == e.dtype
        error = relative_error(a, e)
        assert error <= tolerance, f"step {step}: relative error {error:.2e} above {tolerance:.0e}"
