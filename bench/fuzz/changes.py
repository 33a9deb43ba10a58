"""Weights that change between runs, alike on a model and its twin."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .case import Change
from .subject import Subject

LORA = ("lora", "lora scale", "lora off", "lora on")
KINDS = ("in place", "parameter", "load", "load compiled", *LORA)
SHARE = 0.2  # of a parameter's size, by which it changes


def apply(change: Change, subject: Subject, fast: nn.Module) -> None:
    """Change both models of `subject`; `fast` is what its first is compiled to."""
    if change.kind in LORA:
        subject.dirty = True
    for model, compiled in ((subject.model, fast), (subject.twin, None)):
        generator = torch.Generator().manual_seed(change.seed)
        _change(change, model, compiled, generator)


def _change(change: Change, model: nn.Module, compiled: Any, generator: torch.Generator) -> None:
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    match change.kind:
        case "in place":
            with torch.no_grad():
                for p in parameters:
                    p.data.add_(_noise(p, generator))
        case "parameter":
            layers = [module for module in model.modules() if type(module) is nn.Linear]
            chosen = torch.randperm(len(layers), generator=generator)[: 1 + len(layers) // 3].tolist()
            for number in sorted(chosen):
                weight = layers[number].weight
                layers[number].weight = nn.Parameter(weight.detach() + _noise(weight, generator))
        case "load" | "load compiled":
            state = {name: value.clone() for name, value in model.state_dict().items()}
            for value in state.values():
                if value.is_floating_point():
                    value.add_(_noise(value, generator))
            (compiled if change.kind == "load compiled" and compiled is not None else model).load_state_dict(state)
        case "lora":
            _add_lora(model, change.seed)
        case "lora scale":
            for layer in _lora_layers(model):
                layer.set_scale("default", 0.25 * (1 + change.seed % 7))
        case "lora off" | "lora on":
            for layer in _lora_layers(model):
                layer.enable_adapters(change.kind == "lora on")
        case _:
            raise ValueError(f"change: expected one of {KINDS}, got {change.kind!r}")


def _noise(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    scale = SHARE * t.detach().float().std(unbiased=False).item()
    return (scale * torch.randn(t.shape, generator=generator)).to(t.dtype)


def _add_lora(model: nn.Module, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    linear = sorted({name for name, module in model.named_modules() if type(module) is nn.Linear})
    generator = torch.Generator().manual_seed(seed)
    chosen = [linear[i] for i in torch.randperm(len(linear), generator=generator)[: 1 + len(linear) // 3].tolist()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=chosen, init_lora_weights=False), model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.eval()


def _lora_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
