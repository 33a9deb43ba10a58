"""Reuse at module level on the diffusers model itself, in eager mode: what the papers' code does.

The naive baseline of the benchmarks, and the tests' oracle: it shares nothing with the runtime but the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from harmonica_rt import Schedule

# Where a branch's modules live in a block, by model class and branch name
MODULES = {
    "DiTTransformer2DModel": {"attn": ["attn1"], "mlp": ["ff"]},
    "PixArtTransformer2DModel": {"attn": ["attn1"], "cross_attn": ["attn2"], "mlp": ["ff"]},
    "FluxTransformer2DModel": {"attn": ["attn"], "mlp": ["ff", "ff_context"], "block": ["proj_out"]},
}


class ModuleReuse(nn.Module):
    """`model` whose branch modules, or itself, return a weighted sum of their last outputs where `schedule` says reuse.

    Steps are counted: call `reset()` before each run. `remove()` gives the model its modules back.
    """

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.model, self.step = model, 0
        self.config = model.config
        self.dtype, self.device = model.dtype, model.device
        self.computed = self.reused = self.outputs_reused = 0
        self.output, self.output_weights = schedule.output.tolist(), schedule.output_weights.tolist()
        self.output_channels = schedule.output_channels
        self.outputs: list[Tensor] = []  # newest first
        self.wrapped: list[tuple[nn.Module, str]] = []
        compute = schedule.compute.reshape(schedule.steps, -1)
        weights = schedule.weights.reshape(*compute.shape, -1)
        channels = schedule.channels
        if channels is not None:
            channels = torch.from_numpy(channels.reshape(*weights.shape, -1).copy())
        blocks = ((block, group.branches) for group in schedule.groups for block in getattr(model, group.name))
        for entry, (block, name) in enumerate((block, name) for block, branches in blocks for name in branches):
            plan = list(zip(compute[:, entry].tolist(), weights[:, entry].tolist()))
            if channels is not None:
                own = channels[:, entry]
                plan = [(c, [w + each for w, each in zip(ws, rows)]) for (c, ws), rows in zip(plan, own)]
            for attribute in MODULES[schedule.model][name]:
                setattr(block, attribute, _Cached(self, getattr(block, attribute), plan))
                self.wrapped.append((block, attribute))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.output[self.step]:
            output = self._reuse_output(kwargs.get("return_dict", True))
        else:
            output = self.model(*args, **kwargs)
            self.outputs = [output[0], *(self.outputs if self.step else [])][: len(self.output_weights[0])]
        self.step += 1
        return output

    def _reuse_output(self, return_dict: bool) -> Any:
        self.outputs_reused += 1
        weights = self.output_weights[self.step]
        if self.output_channels is not None:
            own = torch.from_numpy(self.output_channels[self.step].copy())
            weights = [w + each.view(-1, 1, 1) for w, each in zip(weights, own)]
        terms = zip(weights, self.outputs)
        sample = sum(weight * output for weight, output in terms)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def reset(self) -> None:
        self.step = 0

    def remove(self) -> nn.Module:
        for block, attribute in self.wrapped:
            setattr(block, attribute, getattr(block, attribute).module)
        self.wrapped.clear()
        return self.model


class _Cached(nn.Module):
    def __init__(self, owner: ModuleReuse, module: nn.Module, plan: list[tuple[bool, list[Any]]]) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)
        self.module, self.plan = module, plan
        self.values: list[Tensor] = []  # newest first, of joint attention both segments

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        computed, weights = self.plan[self.owner.step]
        if computed:
            self.owner.computed += 1
            value = self.module(*args, **kwargs)
            self.values = [value, *(self.values if self.owner.step else [])][: len(weights)]
            return value
        self.owner.reused += 1
        if isinstance(self.values[0], tuple):
            return tuple(_sum(weights, values) for values in zip(*self.values))
        return _sum(weights, self.values)


def _sum(weights: Sequence[float | Tensor], values: Sequence[Tensor]) -> Tensor:
    total = None
    for weight, value in zip(weights, values):
        if isinstance(weight, Tensor):
            total = weight * value if total is None else total + weight * value
        elif weight == 1.0 and total is None:
            total = value
        elif weight != 0.0:
            total = weight * value if total is None else torch.add(total, value, alpha=weight)
    return torch.zeros_like(values[0]) if total is None else total
