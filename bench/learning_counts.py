"""COUNTED memory and work of learning on large models at their real sizes, and the time at 400 TFLOP/s.

    python bench/learning_counts.py [--model flux.1-dev ...]

Models are on the meta device: nothing is computed, no weights are needed. One image a call, every third step computed,
order 2, a step's activations kept at a time or of it a block's. The prediction is the one that `harmonica learn
--pipeline` makes before it runs (`train/memory.py`), which picks the second where the first does not fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from torch import Tensor

import harmonica_rt as hrt
from bench.counts import count
from bench.models.real_sizes import CASES, Case
from harmonica_rt.train.contexts import ContextWeights
from harmonica_rt.train.memory import counted, nbytes, predict
from harmonica_rt.train.reusing import CHECKPOINTS
from harmonica_rt.train.weights import WeightSettings

FLOPS = 400e12  # a second
EVERY, ORDER, BATCH = 3, 2, 4  # computed steps, of the forecast, images an iteration one after the other
RUNS = {"flux.1-dev": (28, 1), "qwen-image": (50, 2), "wan2.1-1.3b": (50, 2), "wan2.1-14b": (50, 2)}  # steps, contexts
LEVELS: dict[str, dict[str, Any]] = {
    "one group": {"level": "blocks", "carry": 1.0},
    "4 groups": {"level": "blocks", "groups": 4, "carry": 1.0},
    "branches": {"level": "branches"},
}


def flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Attention as CUDA does it: the meta device would take the unfused form."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


class Norm(torch.autograd.Function):
    """RMS norm as CUDA does it, in one kernel that keeps its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return Norm.apply(x)


def row(name: str, case: Case, level: str, kept: str) -> str:
    """A line of the table, in Markdown.

    Args:
        kept: activations, "steps" or "blocks".
    """
    steps, contexts = RUNS[name]
    model, options = case.build().requires_grad_(False), LEVELS[level]
    schedule = hrt.Schedule.uniform(model, steps, EVERY, ORDER, **options)
    values = count(model, case.arguments(), **options).slot_bytes // 2  # kept of two computed steps
    with mock.patch.multiple("torch.nn.functional", scaled_dot_product_attention=flash, rms_norm=norm):
        step = counted(model, ((), case.arguments()), kept == "blocks")
    channels = options["level"] == "blocks"
    settings = WeightSettings(
        batch=BATCH, accumulate=BATCH, pool=BATCH, carry=channels, channels=channels, checkpointing=kept
    )
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim if channels else None
    memory = predict(
        step,
        ContextWeights(schedule, "cpu", channels, width),
        settings,
        weights=nbytes([*model.parameters(), *model.buffers()]),
        values=values,
        sample=nbytes([case.arguments()["hidden_states"]]),
        contexts=contexts,
        images=1,
        libraries=2 * 32 * 2**20,
        available=80 * 10**9,
    )
    computed = int(schedule.compute.reshape(steps, -1).any(1).sum())
    whole = 2 * contexts * computed * (2 * step.forward_macs + step.backward_macs)
    target = 2 * contexts * steps * step.forward_macs
    cells = [name, level, kept, f"{steps} x {contexts}", f"{computed}"]
    cells += [f"{part / 1e9:.1f}" for part in (memory.weights, memory.step, memory.values, memory.numbers)]
    cells += [f"{memory.total / 1e9:.1f}", "yes" if memory.fits else "**no**"]
    cells += [f"{whole / 1e12:.0f}", f"{whole / FLOPS:.1f}", f"{target / FLOPS:.1f}"]
    return f"| {' | '.join(cells)} |"


HEADS = (
    "model", "level", "activations", "steps x calls", "computed", "weights, GB", "one step", "kept values",
    "what is learned", "all", "in 80 GB", "TFLOP an image and iteration", "s at 400 TFLOP/s", "s a target",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=RUNS, nargs="*", default=list(RUNS))
    print("| " + " | ".join(HEADS) + " |\n" + "| --- " * len(HEADS) + "|")
    for name in parser.parse_args(argv).model:
        for level in LEVELS:
            for kept in CHECKPOINTS[1:]:
                print(row(name, CASES[name], level, kept), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
