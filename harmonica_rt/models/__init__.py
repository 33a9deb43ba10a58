"""Models: an adapter file for each class that runs at level branches, and what blocks any other has."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from ..layout import BLOCKS, LEVELS, TRUNK, Group
from .base import Adapter
from .blocks import block_lists, class_name, no_blocks
from .refusals import UnsupportedModelError

ADAPTERS = {
    "DiTTransformer2DModel": ("dit", "DiTAdapter"),
    "FluxTransformer2DModel": ("flux", "FluxAdapter"),
    "LTXVideoTransformer3DModel": ("ltx", "LTXAdapter"),
    "PixArtTransformer2DModel": ("pixart", "PixArtAdapter"),
    "QwenImageTransformer2DModel": ("qwen", "QwenAdapter"),
    "SD3Transformer2DModel": ("sd3", "SD3Adapter"),
    "WanTransformer3DModel": ("wan", "WanAdapter"),
}

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Layout",
    "UnsupportedModelError",
    "adapt",
    "adapt_at_branches",
    "layout_of",
    "no_finer",
    "own_model",
]


class Layout(NamedTuple):
    """What a schedule for a model decides about; fields of `Schedule`."""

    model: str
    level: str
    groups: tuple[Group, ...]


def layout_of(model: Any, level: str = "auto", groups: int = 1) -> Layout:
    """The entries `model` has at `level`, or at the finest level it can have.

    Args:
        groups: at level blocks, how many groups each list is split into; 1 is the whole trunk, across lists.

    Raises:
        UnsupportedModelError: it cannot have that level; the message says which it can.
    """
    if level not in ("auto", *LEVELS):
        raise ValueError(f"level: expected one of {('auto', *LEVELS)}, got {level!r}")
    model = own_model(model)
    if not isinstance(model, nn.Module):
        parts = [name for name in ("transformer", "unet") if isinstance(getattr(model, name, None), nn.Module)]
        hint = f": pass its .{parts[0]}" if parts else ""
        raise UnsupportedModelError(f"expected a denoiser, a torch.nn.Module, got {_named(model)}{hint}")
    lists = block_lists(model)
    if level == "auto":
        branches = groups == 1 and refusal(model) is None and adapt(model).automatic
        level = "branches" if branches else "blocks" if lists else "output"
    if level != "blocks" and groups != 1:
        raise ValueError(f"groups: expected 1 at level {level}, got {groups}")
    name = class_name(model)
    if level == "output":
        return Layout(name, level, ())
    if level == "branches":
        adapter = adapt_at_branches(model)
        return Layout(adapter.model_class, level, adapter.groups)
    if not lists:
        raise UnsupportedModelError(f"{no_blocks(model)}: expected level 'output', got 'blocks'")
    if groups == 1:
        return Layout(name, level, (Group(TRUNK, 1, (BLOCKS,)),))
    return Layout(name, level, tuple(Group(n, min(groups, len(b)), (BLOCKS,)) for n, b in lists.items()))


def own_model(model: Any) -> Any:
    """A `CompiledTransformer` stands for its model."""
    return vars(model).get("model", model) if isinstance(model, nn.Module) else model


def no_finer(model: Any, level: str) -> str | None:
    """Why `model` runs at no finer level than `level`."""
    if level == "branches":
        return None
    model = own_model(model)
    lists = block_lists(model)
    if level == "output" and not lists:
        return f"{type(model).__name__} has no lists of blocks"
    reason = refusal(model)
    return "the schedule asks for it" if level == "output" or reason is None else reason


def refusal(model: Any) -> str | None:
    """Why `model` cannot have level branches, or None."""
    try:
        adapt(model)
    except UnsupportedModelError as error:
        return str(error)
    return None


def adapt(model: nn.Module) -> Adapter:
    """The adapter of `model`. Its class decides, by name, so that diffusers need not be imported to ask.

    Raises:
        UnsupportedModelError: naming the supported classes, or the part of the model that cannot be expressed.
    """
    model = own_model(model)
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


def adapt_at_branches(model: nn.Module) -> Adapter:
    """`adapt`, whose error says which levels take `model`."""
    try:
        return adapt(model)
    except UnsupportedModelError as error:
        level = "'blocks' takes" if isinstance(model, nn.Module) and block_lists(own_model(model)) else "'output' takes"
        raise UnsupportedModelError(
            f"{error}. Level {level} such a model as it is: Schedule.uniform(model, ..., level={level.split()[0]})"
        ) from None


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


def _named(something: Any) -> str:
    return f"the class {something.__name__}" if isinstance(something, type) else type(something).__name__
