"""SmoothCache: layers of a kind reuse together where calibration finds their outputs change little.

The published wheel has the helper but no calibration: the rule of its paper (2411.10510) makes the schedule here.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from bench.models.pipelines import PixelPipeline
from bench.models.reference import noise

from .base import Peer, Running, branch_names, with_denoiser

FURTHEST = 3  # steps that one value may serve


class Quiet(Running):
    """`model` with the helper's counters reset before each run, and without its print for every module and step."""

    def __init__(self, model: nn.Module, helper: Any, steps: int) -> None:
        super().__init__(model, steps)
        self.helper = helper

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.count():
            self.helper.reset_state()
        return self.model(*args, **kwargs)


def changes(pipeline: PixelPipeline, steps: int) -> dict[str, Tensor]:
    """Relative L1 change of a kind's outputs between steps, mean over layers: [steps, steps]."""
    own = pipeline.around(copy.deepcopy(pipeline.transformer))
    seen: dict[str, list[list[Tensor]]] = {kind: [] for kind in branch_names(own.transformer)}
    for block in own.transformer.transformer_blocks:
        for kind, layers in seen.items():
            layers.append([])
            getattr(block, kind).register_forward_hook(partial(_keep, layers[-1]))
    own(own.examples(8), num_inference_steps=steps, latents=noise(pipeline, 8, 1), output_type="latent")
    found = {}
    for kind, layers in seen.items():
        errors = []
        for outputs in layers:
            flat = torch.stack(outputs).flatten(1)
            errors.append(torch.cdist(flat, flat, p=1) / flat.abs().sum(1).clamp_min(1e-9)[None])
        found[kind] = torch.stack(errors).mean(0)
    return found


def _keep(outputs: list[Tensor], module: nn.Module, inputs: Any, output: Tensor) -> None:
    outputs.append(output.detach())


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    from SmoothCache import smooth_cache_helper

    if not any(isinstance(module, BasicTransformerBlock) for module in pipeline.transformer.modules()):
        raise ValueError(
            f"SmoothCache: expected a model of blocks of the kind BasicTransformerBlock, got "
            f"{type(pipeline.transformer).__name__}"
        )
    smooth_cache_helper.print = lambda *said: None  # it tells of every module and step
    alpha, schedule = float(setting), {}
    for kind, change in changes(pipeline, steps).items():
        plan, last = [], 0
        for step in range(steps):
            reuse = step > 0 and step - last <= FURTHEST and change[step, last].item() < alpha
            last = last if reuse else step
            plan.append(int(not reuse))
        schedule[kind] = plan
    helper = smooth_cache_helper.SmoothCacheHelper(
        pipeline.transformer, BasicTransformerBlock, branch_names(pipeline.transformer), schedule
    )
    helper.enable()
    return with_denoiser(pipeline, Quiet(pipeline.transformer, helper, steps))


PEER = Peer("SmoothCache", ("0.12", "0.2", "0.3"), prepare, package="SmoothCache")
