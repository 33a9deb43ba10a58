"""Supported models: one adapter file per diffusers class."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import nn

from .base import Adapter, UnsupportedModelError

ADAPTERS = {
    "DiTTransformer2DModel": ("dit", "DiTAdapter"),
    "PixArtTransformer2DModel": ("pixart", "PixArtAdapter"),
}

__all__ = ["ADAPTERS", "Adapter", "UnsupportedModelError", "adapt"]


def adapt(model: nn.Module) -> Adapter:
    """The adapter of `model`. Its class decides, by name, so that diffusers need not be imported to ask.

    Raises:
        UnsupportedModelError: naming the supported classes, or the part of the model that cannot be expressed.
    """
    if isinstance(model, nn.Module):
        model = vars(model).get("model", model)  # a CompiledTransformer stands for its model
    for cls in type(model).__mro__:
        if cls.__module__.startswith("diffusers.") and cls.__name__ in ADAPTERS:
            module, name = ADAPTERS[cls.__name__]
            _check_unhooked(model)
            return getattr(import_module(f".{module}", __name__), name)(model)
    hint = "; pass its .transformer" if hasattr(model, "transformer") and not isinstance(model, nn.Module) else ""
    raise UnsupportedModelError(
        f"expected a diffusers model of a supported class ({', '.join(sorted(ADAPTERS))}), "
        f"got {type(model).__module__}.{type(model).__name__}{hint}"
    )


def _offloads(model: nn.Module) -> bool:
    """Whether a pipeline's `enable_model_cpu_offload` replaced the forward: a compiled model runs that hook too."""
    hook = type(vars(model).get("_hf_hook"))
    return (hook.__module__, hook.__name__) == ("accelerate.hooks", "CpuOffload")


def _check_unhooked(model: nn.Module) -> None:
    """A hook or a replaced forward would silently not run: refuse it by name."""
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise UnsupportedModelError("expected no forward hooks, got one on all modules (register_module_forward_hook)")
    for name, module in model.named_modules():
        own = vars(module).get("forward")  # accelerate leaves the class's own there when it takes a hook away
        replaced = own is not None and getattr(own, "__func__", None) is not type(module).forward
        replaced = replaced and not (module is model and _offloads(module))
        if replaced or module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedModelError(
                f"{name or type(model).__name__}: expected no forward hooks, got some (a cache, offloading or casting "
                "hook?); remove them before compiling"
            )
