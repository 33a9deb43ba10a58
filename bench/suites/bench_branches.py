"""A computed branch, from its normed input into its slot, against diffusers' module of the same block."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import harmonica_rt as hrt
from bench.models.pipelines import PixelPipeline
from bench.models.reference import load_pipeline
from harmonica_rt.executor import Plan
from harmonica_rt.kernels.gelu import compiled_gelu
from harmonica_rt.lowering import lower
from harmonica_rt.models import adapt
from harmonica_rt.models.base import Shape

from .conftest import inductor

SIZES = {"dit-s-2": ("attn", "mlp"), "pixart-alpha-256": ("attn", "cross_attn", "mlp")}  # branches of a block
BATCH = 2  # an image with guidance
BRANCHES = [(size, branch) for size, branches in SIZES.items() for branch in branches]
# What inductor compiles of a branch is pointwise work: attention has none
CASES = [(*branch, how) for branch in BRANCHES for how in ("diffusers", "eager")]
CASES += [inductor(size, "mlp") for size in SIZES]


@cache
def one_block(size: str) -> PixelPipeline:
    return load_pipeline(size, layers=1)


@cache
def text(size: str) -> Tensor | None:
    """What cross-attention reads, [batch, context tokens, width]."""
    pipeline = one_block(size)
    return None if pipeline.context is None else torch.randn(BATCH, pipeline.context, pipeline.transformer.inner_dim)


@cache
def plan(size: str) -> Plan:
    """Of one block, on the eager backend."""
    model = one_block(size).transformer
    adapter, side, read = adapt(model), model.config.sample_size, text(size)
    shape = Shape(
        (BATCH, adapter.in_channels, side, side),
        torch.float32,
        torch.device("cpu"),
        0 if read is None else read.shape[1],
    )
    made = Plan(adapter, *adapter.bind(), lower(hrt.Schedule.full(model, 1)), shape, "eager")
    if read is not None:
        attention = model.transformer_blocks[0].attn2
        made.buffers.held["context"].copy_(torch.stack([attention.to_k(read), attention.to_v(read)]))
        made.buffers.held["bias"].zero_()
    return made


def diffusers(size: str, branch: str) -> Callable[[Tensor], Tensor]:
    """The block's module; its cross-attention projects the text at every step, a plan once a run."""
    block, read = one_block(size).transformer.transformer_blocks[0], text(size)
    if branch == "cross_attn":
        return lambda y: block.attn2(y, encoder_hidden_states=read)
    return block.attn1 if branch == "attn" else block.ff


def eager(size: str, branch: str) -> Callable[[Tensor], Tensor]:
    """A plan's own calls."""
    made = plan(size)
    body = made.program.steps[0].body
    entry = made.adapter.branches.index(branch)
    (_, instruction), (_, compute) = body[entry], made.calls(0)[0][entry]
    slot = made.buffers.slots[instruction.slot]

    def run(y: Tensor) -> Tensor:
        compute(y)
        return slot

    return run


def compiled(size: str, branch: str) -> Callable[[Tensor], Tensor]:
    """The calls an inductor plan makes for an MLP; such a plan itself would compile much that no branch runs."""
    made = plan(size)
    up, gelu, down = made.branches[made.adapter.branches.index(branch)].stages
    out, held = torch.empty_like(made.buffers.x), made.buffers.held
    hidden = out.new_empty(*out.shape[:2], len(up.weight))
    threads = torch.get_num_threads()
    activate = compiled_gelu(gelu.approximate, tuple(hidden.shape), hidden.dtype, hidden.device, threads)

    def run(y: Tensor) -> Tensor:
        activate(up.into(y, held, hidden))
        return down.into(hidden, held, out)

    return run


IMPLEMENTATIONS = {"diffusers": diffusers, "eager": eager, "inductor": compiled}


@pytest.mark.parametrize(("size", "branch", "implementation"), CASES)
def test_branch(benchmark: Any, size: str, branch: str, implementation: str) -> None:
    benchmark.group = f"{branch} branch, {size}"
    adapter = plan(size).adapter
    benchmark.extra_info["macs"] = adapter.macs(None, None, BATCH).branches[adapter.branches.index(branch)]
    with torch.no_grad():
        run, y = IMPLEMENTATIONS[implementation](size, branch), torch.randn(plan(size).buffers.stream)
        benchmark.pedantic(run, args=(y,), rounds=8, warmup_rounds=1)
