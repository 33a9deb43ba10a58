"""Launches of a DiT's steps: of diffusers' model as recorded, of backend cudagraph from a program's instructions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

import harmonica_rt as hrt
from bench.by_hand.module_reuse import ModuleReuse
from bench.models.reference import REFERENCES
from harmonica_rt.backends import fused
from harmonica_rt.lowering import lower
from harmonica_rt.models import Adapter
from harmonica_rt.models.stages import walk

from .gpu_time import Launch
from .record import Record, attention

SIZE = 2  # bytes of a bf16 number


def build(name: str, size: int | None = None, layers: int | None = None) -> nn.Module:
    reference = REFERENCES[name]
    with torch.device("meta"):
        config = {**reference.config, "sample_size": size or reference.size}
        config["num_layers"] = layers or config["num_layers"]
        model = DiTTransformer2DModel(**config)
    return model.to(torch.bfloat16).eval()


def diffusers_launches(model: nn.Module, schedule: hrt.Schedule, samples: int, reuse: bool) -> list[list[Launch]]:
    """Launches of each step of the diffusers model in eager mode, with module-level reuse if `reuse`."""
    size, steps = model.config.sample_size, []
    x = torch.empty(samples, model.config.in_channels, size, size, dtype=torch.bfloat16, device="meta")
    numbers = torch.empty(samples, dtype=torch.int64, device="meta")
    wrapped = ModuleReuse(model, schedule) if reuse else model
    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = attention
    try:
        for _ in range(schedule.steps if reuse else 1):
            with torch.no_grad(), Record() as record:
                wrapped(x, timestep=numbers, class_labels=numbers)
            steps.append(record.launches)
    finally:
        nn.functional.scaled_dot_product_attention = original
        if reuse:
            wrapped.remove()
    return steps if reuse else steps * schedule.steps


def program_launches(adapter: Adapter, schedule: hrt.Schedule, samples: int, shared: int) -> list[list[Launch]]:
    """Launches of each step of the cudagraph backend, from the program's instructions."""
    config = adapter.model.config
    tokens, width = adapter.tokens(config.sample_size, config.sample_size), adapter.width
    rows = samples * tokens
    stream, row = SIZE * rows * width, SIZE * samples * width
    branches, _ = adapter.bind()

    def branch(entry: int) -> list[Launch]:
        launches = []
        for stage, columns in walk(fused(branches[entry].stages), width):
            numbers = rows * (columns + stage.columns(columns)) + stage.weights
            launches.append(Launch(2 * stage.macs(samples, tokens, columns, 0), SIZE * numbers))
        return launches

    steps = []
    for step in lower(schedule).steps:
        launches = around_launches(adapter, samples, shared)
        for gap in step.gaps:
            gates = len({term.entry for term in gap.terms})
            launches.append(Launch(0, stream * (2 + len(gap.terms) + bool(gap.terms)) + row * (2 + gates)))
            if gap.norm < len(branches):
                launches += branch(gap.norm)
        steps.append(launches)
    return steps


def around_launches(adapter: Adapter, samples: int, shared: int) -> list[Launch]:
    """A step's launches outside the blocks; `shared`: how many steps' modulation one call computes."""
    config, width = adapter.model.config, adapter.width
    rows = samples * adapter.tokens(config.sample_size, config.sample_size)
    inputs, outputs = (config.patch_size**2 * n for n in (config.in_channels, adapter.model.out_channels))
    macs = adapter.macs(None, None, samples)
    return [
        _gemm(rows, inputs, width),
        Launch(0, 3 * SIZE * rows * width),  # positions
        Launch(0, 2 * SIZE * rows * inputs),  # the sample's copy in
        Launch(0, 4),  # the step's number
        Launch(2 * macs.fixed, SIZE * samples * adapter.rows * width + SIZE * macs.fixed / samples / shared),
        _gemm(rows, width, outputs),
        *[Launch(0, 2 * SIZE * rows * outputs)] * 2,  # unpatchify, the output's copy out
    ]


def _gemm(rows: int, k: int, n: int) -> Launch:
    return Launch(2 * rows * k * n, SIZE * (rows * k + k * n + rows * n))


@dataclass(frozen=True)
class Counts:
    """Launches of a step: of a computed block, of a reused one (ours: of any run of them), around the blocks."""

    computed: float
    reused: float
    around: float


def diffusers_counts(name: str, samples: int) -> Counts:
    """Counted on the model with all its blocks and with one: the difference is the blocks'."""
    counts = []
    for layers in (None, 1):
        model = build(name, layers=layers)
        counts.append([len(s) for s in diffusers_launches(model, hrt.Schedule.uniform(model, 2, 2), samples, True)])
    more = REFERENCES[name].config["num_layers"] - 1
    computed, reused = ((many - one) / more for many, one in zip(*counts))
    return Counts(computed, reused, counts[1][0] - computed)


def program_counts(adapter: Adapter, samples: int) -> Counts:
    """Counted on the program: any run of reused blocks is part of one Gap."""
    schedule = hrt.Schedule.uniform(adapter.model, 2, 2)
    computed, reused = map(len, program_launches(adapter, schedule, samples, shared=2))
    around = len(around_launches(adapter, samples, shared=2))
    return Counts((computed - reused) / adapter.layers, reused - around, around)
