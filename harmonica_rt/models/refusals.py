"""Models that cannot be expressed: the errors, and the checks that a module is what it is taken for."""

from __future__ import annotations

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class UnsupportedModelError(TypeError):
    """The model is of a class, or built in a way, that no adapter can express."""


class NoCarryError(UnsupportedModelError):
    """What a group returns is none of the streams that go into it: it can be reused, but not with a carry."""


def expect_exactly(module: nn.Module, kind: type[nn.Module], name: str) -> None:
    """A subclass or wrapper (quantised, LoRA, parallel) computes something else than `kind`: refuse it by name."""
    if type(module) is not kind:
        raise UnsupportedModelError(
            f"{name}: expected a plain {kind.__name__}, got {type(module).__module__}.{type(module).__name__}; "
            "merge or remove what replaced it before compiling"
        )
    for parameter in module.parameters(recurse=False):
        if is_traceable_wrapper_subclass(parameter):
            raise UnsupportedModelError(f"{name}: expected plain tensors, got {type(parameter.data).__name__}")


def expect_plain_norm(module: nn.Module, name: str, kind: type[nn.LayerNorm] = nn.LayerNorm) -> None:
    """A LayerNorm without weight and bias, as the blocks' modulation needs it."""
    expect_exactly(module, kind, name)
    if module.weight is not None:
        raise UnsupportedModelError(f"{name}: expected a LayerNorm without weight and bias, got an affine one")
