"""Every denoiser class of diffusers, as its pipeline calls it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import diffusers.models.transformers
import diffusers.models.unets
import pytest
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from tests.models.denoisers import CANNOT_RUN, DENOISERS, NOT_DENOISERS


def model_classes() -> set[str]:
    """The model classes defined in diffusers' folders of transformers and UNets, by name."""
    names = set()
    for package in (diffusers.models.transformers, diffusers.models.unets):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for name, value in vars(module).items():
                if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == info.name:
                    names.add(name)
    return names


def tensors(output: object) -> Iterator[Tensor]:
    """Every tensor of what a forward returned, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)


def run(model: nn.Module, call, steps: range | list[int]) -> list[list[Tensor]]:
    """The tensors that `model` returns at each of `steps`."""
    with torch.no_grad():
        return [[tensor.clone() for tensor in tensors(model(**call(model, step)))] for step in steps]


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(torch.equal(a, e) for a, e in zip(actual, expected))


def test_no_class_is_forgotten() -> None:
    listed = [*DENOISERS, *NOT_DENOISERS, *CANNOT_RUN]
    assert len(listed) == len(set(listed))
    assert set(listed) == model_classes()
    print(f"{len(DENOISERS)} denoisers, {len(NOT_DENOISERS)} others, {len(CANNOT_RUN)} that cannot run here")


@pytest.mark.parametrize("name", DENOISERS)
def test_runs(name: str) -> None:
    denoiser = DENOISERS[name]
    model = denoiser.make()
    first, again, second = run(model, denoiser.call, [0, 0, 1])
    assert first and all(tensor.isfinite().all() for tensor in first + second)
    assert same(first, again)
    assert not any(torch.equal(a, b) for a, b in zip(first, second))
    assert all(parameter.any() for parameter in model.parameters())
