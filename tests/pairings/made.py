"""Small random models, the calls a sampler makes of them, and what a compiled one is held to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

import harmonica_rt as hrt
from tests.conftest import assert_close, make_dit, make_pixart, relative_error

STEPS = 5
COMPUTED = range(0, STEPS, 2)
WAYS = {
    "output": {"level": "output"},
    "trunk": {"level": "blocks"},
    "groups": {"level": "blocks", "groups": 2, "carry": 1.0},
}
BLOCK_WAYS = {name: way for name, way in WAYS.items() if name != "output"}
Outputs = list[Tensor]


def over(ways: dict[str, Any], argument: str = "way") -> pytest.MarkDecorator:
    return pytest.mark.parametrize(argument, list(ways.values()), ids=list(ways))


def _random(model: nn.Module) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_flux(**config: Any) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    small = {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16}
    small |= {"num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 6}
    return _random(FluxTransformer2DModel(**{**small, "axes_dims_rope": (4, 4, 8), **config}))


def make_sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return _random(
        SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=6,
            pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
        )
    )  # fmt: skip


def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return _random(
        UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "flux": make_flux, "sd3": make_sd3, "pixart": make_pixart, "dit": make_dit, "unet": make_unet,
}  # fmt: skip
BLOCK_MODELS = [name for name in MODELS if name != "unet"]


class Sampler:
    """The calls of one run, on samples that do not depend on the model's answers.

    Args:
        name: of `MODELS`.
        each: further arguments of the call at a step.
    """

    def __init__(
        self, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, each: Callable[[int], Any] = lambda _: {}
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.each = each
        self.timesteps = [1.0 - step / STEPS for step in range(STEPS)] if name == "flux" else [990, 700, 500, 300, 100]
        channels, image = (2 if name in ("dit", "pixart") else 4), (8, 8)
        self.samples = [noise(2, 16, 4) if name == "flux" else noise(2, channels, *image) for _ in range(STEPS)]
        self.fixed: dict[str, Any] = {
            "flux": lambda: {
                "encoder_hidden_states": noise(2, 5, 8), "pooled_projections": noise(2, 6),
                "txt_ids": torch.zeros(5, 3), "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 4, 4))).float(),
            },
            "sd3": lambda: {"encoder_hidden_states": noise(2, 5, 12), "pooled_projections": noise(2, 6)},
            "pixart": lambda: {
                "encoder_hidden_states": noise(2, 5, 10),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
            "dit": lambda: {"class_labels": torch.tensor([1, 3])},
            "unet": lambda: {"encoder_hidden_states": noise(2, 5, 12)},
        }[name]()  # fmt: skip

    def call(self, model: nn.Module, step: int) -> Tensor:
        sample = self.samples[step]
        timestep = torch.full((len(sample),), self.timesteps[step])
        timestep = timestep.to(sample.dtype) if timestep.is_floating_point() else timestep
        return model(sample, timestep=timestep, return_dict=False, **self.fixed, **self.each(step))[0]

    def run(self, model: nn.Module) -> Outputs:
        with torch.no_grad():
            return [self.call(model, step) for step in range(STEPS)]


def compiled(model: nn.Module, way: dict[str, Any], every: int = 2, **options: Any) -> Any:
    return hrt.compile(model, hrt.Schedule.uniform(model, STEPS, every, **way), **options)


def plain_of(model: nn.Module) -> Any:
    return vars(model).get("model", model)


def check(fast: nn.Module, sampler: Sampler, way: dict[str, Any], tolerance: float = 0.0) -> Outputs:
    """One run of `fast`: computed steps are the plain model's, to the bit, all of them those of one compiled just now.

    Nothing left over from earlier runs or from an earlier state of the model passes.
    """
    plain, got = plain_of(fast), sampler.run(fast)
    wanted = sampler.run(plain)
    assert_close([got[step] for step in COMPUTED], [wanted[step] for step in COMPUTED], tolerance)
    assert_close(got, sampler.run(compiled(plain, way, backend="eager")), tolerance)
    assert relative_error(got[1], wanted[1]) > 1e-4, "step 1 reuses"
    return got


def check_works(model: nn.Module, sampler: Sampler, way: dict[str, Any]) -> Any:
    """Computing everything is the plain model to the bit; reuse is right, in two runs. The model that reuses."""
    assert_close(sampler.run(compiled(model, way, every=1)), sampler.run(model), 0.0)
    fast = compiled(model, way)
    assert_close(check(fast, sampler, way), check(fast, sampler, way), 0.0)
    return fast


def check_follows(
    fast: nn.Module, sampler: Sampler, way: dict[str, Any], change: Callable[[], Any], tolerance: float = 0.0
) -> None:
    """The run after `change` is what the model has become, and not what it was."""
    sampler.run(fast)
    before = sampler.run(fast)  # where steps are captured, all of them are by now
    change()
    after = check(fast, sampler, way, tolerance)
    for step in range(STEPS):
        assert relative_error(after[step], before[step]) > 1e-4, f"step {step} is as before the change"


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(plain_of(model))
