"""What every small denoiser is made of: random parameters, seeded inputs, timesteps that fall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import diffusers.models.transformers
import diffusers.models.unets
import torch
from torch import Tensor, nn

STEPS = 6  # of a run; `clock` reaches two more


@dataclass(frozen=True)
class Denoiser:
    """A denoiser class of diffusers, small enough for one core."""

    make: Callable[[], nn.Module]  # in eval mode, every parameter random
    call: Callable[[nn.Module, int], dict]  # keyword arguments of one forward at a step
    note: str = ""


class Family(dict[str, Denoiser]):
    """Denoisers by class name, filled by decorating the function that gives a call's arguments."""

    def add(self, name: str, note: str = "", std: float = 0.2, **config: object) -> Callable:
        """Register class `name` with `config`; its floating parameters are drawn from N(0, std)."""

        def register(call: Callable[[nn.Module, int], dict]) -> Callable[[nn.Module, int], dict]:
            self[name] = Denoiser(lambda: make(name, std, config), call, note)
            return call

        return register


def model_class(name: str) -> type[nn.Module]:
    """A class of diffusers' models by name."""
    return getattr(diffusers, name, None) or getattr(diffusers.models.transformers, name)


def make(name: str, std: float, config: dict[str, object]) -> nn.Module:
    torch.manual_seed(0)
    model = model_class(name)(**config)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            nn.init.normal_(parameter, std=std)
    return model.eval()


def noise(step: int, *shape: int, seed: int = 0) -> Tensor:
    """The sample of a step: another one at each step."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + 100 * seed + step))


def given(*shape: int, seed: int = 0) -> Tensor:
    """Conditioning: the same at every step."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clock(step: int, *shape: int) -> Tensor:
    """The scheduler's timestep, falling from 951 by 120 a step, as floats of `shape`."""
    return torch.full(shape, 951.0 - 120.0 * step)


def keep(*lengths: int, tokens: int) -> Tensor:
    """A mask [batch, tokens] of ones where a row's text is, zeros behind it."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def grid(*sizes: int) -> Tensor:
    """Coordinates of every cell of a grid, row-major: [cells, axes]."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).float()
