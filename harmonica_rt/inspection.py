"""What a call, its tensors and its model must be for a compiled program to run on them."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from .models import Adapter
from .models.base import Inputs, Shape

SAME_IN_TRAINING = (nn.Linear, nn.Conv2d, nn.Embedding, nn.Identity, nn.ModuleDict, nn.ModuleList, nn.ParameterDict)


def refuse_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            "expected a sample that needs no gradient, got requires_grad=True: a compiled transformer only samples; "
            "differentiate through .model"
        )


def read_timestep(timestep: Tensor | float | None) -> float | None:
    """The timestep of a call, or None where there is none or reading it would make the host wait for a device.

    Where samples or tokens have timesteps of their own, it is the largest.
    """
    if not isinstance(timestep, Tensor):
        return None if timestep is None else float(timestep)
    if timestep.device.type != "cpu" or not timestep.numel():
        return None
    return float(timestep.max() if timestep.ndim > 1 else max(timestep.tolist()) if timestep.ndim else timestep)


def shape_of(adapter: Adapter, inputs: Inputs) -> Shape:
    context = adapter.context_tokens(inputs.conditioning)
    return Shape(tuple(inputs.sample.shape), inputs.sample.dtype, inputs.sample.device, context)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What checks of a model and bindings to it rest on, taken in one walk: at the start of every run.

    Attributes:
        objects: classes, attributes, hooks and tensors of all its modules; compared by identity.
        places: where each tensor lies. Another answer later means that plans point at old weights.
    """

    objects: tuple[Any, ...]
    places: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        objects: list[Any] = [*global_hooks(everywhere)]
        places: list[Any] = []
        todo, seen = [model], {id(model)}
        while todo:
            module = todo.pop()
            own = vars(module)
            objects += (type(module), *own.values(), *own["_forward_hooks"].values())
            objects += own["_forward_pre_hooks"].values()
            for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
                if tensor is not None:
                    objects.append(tensor)
                    places.append(_place(tensor))
            for child in own["_modules"].values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    todo.append(child)
        return cls(tuple(objects), tuple(places))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Snapshot)
            and self.places == other.places
            and len(self.objects) == len(other.objects)
            and all(map(operator.is_, self.objects, other.objects))
        )


def _place(t: Tensor) -> tuple[Any, ...]:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype, t.device


def global_hooks(registry: Any) -> Iterator[Any]:
    """Hooks on all modules."""
    yield from registry._global_forward_hooks.values()
    yield from registry._global_forward_pre_hooks.values()


def check_eval(model: nn.Module) -> None:
    """Raise ValueError for a model in training mode.

    peft adds its layers in training mode, and only their dropout cares; so may be, below the model itself, what is the
    same in both modes.
    """
    for name, module in model.named_modules():
        if module.training and (module is model or not _same_in_training(module)):
            raise ValueError(
                f"expected a model in eval mode, got {name or 'model'} in training mode: call eval() on the model"
            )


def own_cache(model: nn.Module) -> str | None:
    """The cache of diffusers' that is on `model`, by `enable_cache` or as hooks; None without one."""
    if (config := getattr(model, "_cache_config", None)) is not None:
        return type(config).__name__
    registries = (vars(module).get("_diffusers_hook") for module in model.modules())
    hooks = (hook for registry in registries if registry is not None for hook in registry.hooks.values())
    # Of diffusers' hooks its caches alone keep a state; those that offload or cast do not
    return next((type(hook).__name__ for hook in hooks if hook._is_stateful), None)


def _same_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout):
        return module.p == 0.0
    return isinstance(module, SAME_IN_TRAINING) or type(module).__module__.startswith("peft.")


def check_model(model: nn.Module, float32_parts: Collection[str] = ()) -> tuple[torch.dtype, torch.device]:
    """The one floating dtype and device of an eval-mode model.

    Args:
        float32_parts: as in `Adapter`.
    """
    check_eval(model)
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError("expected ordinary parameters, got some made under torch.inference_mode()")
    kinds: set[tuple[torch.dtype, torch.device]] = set()
    wide: set[tuple[torch.dtype, torch.device]] = set()
    for name, p in model.named_parameters():
        if not p.dtype.is_floating_point:  # packed: the layer that holds it makes it plain
            wide.add((p.dtype, p.device))
            continue
        may = p.dtype == torch.float32 and not set(float32_parts).isdisjoint(name.split("."))
        (wide if may else kinds).add((p.dtype, p.device))
    if len(kinds) != 1 or len({device for _, device in kinds | wide}) != 1:
        kinds |= wide
        raise ValueError(f"expected parameters of one dtype on one device, got {sorted(map(str, kinds))}")
    dtype, device = kinds.pop()
    if device.type == "meta":
        raise ValueError("expected parameters with data, got some on the meta device")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expected parameters in float32, float16 or bfloat16, got {dtype}")
    return dtype, device
