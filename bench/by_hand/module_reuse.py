"""Reuse at module level on the diffusers model itself, in eager mode: what the papers' code does.

The naive baseline of the benchmarks, and the tests' oracle: it shares nothing with the runtime but the schedule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from harmonica_rt import Schedule

from .wrapper import Wrapper

# Where a branch's modules live in a block, by model class and branch name
MODULES = {
    "DiTTransformer2DModel": {"attn": ["attn1"], "mlp": ["ff"]},
    "PixArtTransformer2DModel": {"attn": ["attn1"], "cross_attn": ["attn2"], "mlp": ["ff"]},
    "WanTransformer3DModel": {"attn": ["attn1"], "cross_attn": ["attn2"], "ffn": ["ffn"]},
    "SD3Transformer2DModel": {"attn": ["attn"], "mlp": ["ff", "ff_context"]},
    "QwenImageTransformer2DModel": {"attn": ["attn"], "mlp": ["img_mlp", "txt_mlp"]},
    "FluxTransformer2DModel": {"attn": ["attn"], "mlp": ["ff", "ff_context"], "block": ["proj_out"]},
    "LTXVideoTransformer3DModel": {"attn": ["attn1"], "cross_attn": ["attn2"], "mlp": ["ff"]},
}


class Reuse(Wrapper):
    """`model`, which returns a weighted sum of its last outputs where `schedule` says so.

    Steps are counted, those of each context apart: call `reset()` before each run.
    """

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__(model)
        self.output, self.output_weights = schedule.output.tolist(), schedule.output_weights.tolist()
        self.output_channels = schedule.output_channels
        self.computed = self.reused = self.outputs_reused = 0
        self.reset()

    @property
    def step(self) -> int:
        return self.steps[self.context]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.outputs[self.context]  # newest first
        if self.output[self.step]:
            output = self._reuse_output(outputs, kwargs.get("return_dict", True))
        else:
            output = self.model(*args, **kwargs)
            self.outputs[self.context] = [output[0], *outputs][: len(self.output_weights[0])]
        self.steps[self.context] += 1
        return output

    def _reuse_output(self, outputs: list[Tensor], return_dict: bool) -> Any:
        self.outputs_reused += 1
        weights = self.output_weights[self.step]
        if self.output_channels is not None:
            own = torch.from_numpy(self.output_channels[self.step].copy())
            weights = [w + each.view(-1, *(1,) * (outputs[0].ndim - 2)) for w, each in zip(weights, own)]
        terms = zip(weights, outputs)
        sample = sum(weight * output for weight, output in terms)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def reset(self) -> None:
        self.steps: dict[str | None, int] = defaultdict(int)
        self.outputs: dict[str | None, list[Tensor]] = defaultdict(list)


class ModuleReuse(Reuse):
    """`model` whose branch modules, or itself, return a weighted sum of their last outputs where `schedule` says reuse.

    `remove()` gives the model its modules back.
    """

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__(model, schedule)
        self.wrapped: list[tuple[nn.Module, str]] = []
        compute = schedule.compute.reshape(schedule.steps, -1)
        weights = schedule.weights.reshape(*compute.shape, -1)
        channels = schedule.channels
        if channels is not None:
            channels = torch.from_numpy(channels.reshape(*compute.shape, *channels.shape[-2:]).copy())
        groups = [group for group in schedule.groups if group.name != "trunk"]  # whose entry is the last, if there is
        blocks = ((block, group.branches) for group in groups for block in getattr(model, group.name))
        for entry, (block, name) in enumerate((block, name) for block, branches in blocks for name in branches):
            plan = list(zip(compute[:, entry].tolist(), weights[:, entry].tolist()))
            if channels is not None:
                own = channels[:, entry]
                plan = [(c, [w + each for w, each in zip(ws, rows)]) for (c, ws), rows in zip(plan, own)]
            for attribute in MODULES[schedule.model][name]:
                setattr(block, attribute, _Cached(self, getattr(block, attribute), plan))
                self.wrapped.append((block, attribute))

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
        # Newest first; of joint attention both segments
        self.values: dict[str | None, list[Tensor | tuple[Tensor, ...]]] = defaultdict(list)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        owner, values = self.owner, self.values[self.owner.context]
        computed, weights = self.plan[owner.step]
        if computed:
            owner.computed += 1
            value = self.module(*args, **kwargs)
            self.values[owner.context] = [value, *(values if owner.step else [])][: len(weights)]
            return value
        owner.reused += 1
        if isinstance(values[0], tuple):
            return tuple(_sum(weights, segment) for segment in zip(*values))
        return _sum(weights, values)


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
