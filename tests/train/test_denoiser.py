"""The training forward against diffusers' own, with and without checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harmonica_rt.train.denoiser import Denoiser, compute
from harmonica_rt.train.sdt import Gating, sdt

from ..conftest import make_dit, relative_error
from .conftest import make_router, make_task


@pytest.mark.parametrize(
    "config",
    [{}, {"layers": 1}, {"patch_size": 4, "sample_size": 16}, {"heads": 1, "out_channels": 2}, {"norm_eps": 1e-3}],
    ids=str,
)
def test_computing_everything_is_the_diffusers_model(config: dict[str, Any]) -> None:
    model = make_dit(**config)
    size = model.config.sample_size
    x, labels, times = torch.randn(3, 2, size, size), torch.tensor([0, 5, 2]), torch.tensor([981, 400, 7])
    denoiser = Denoiser.of(model)
    rows = denoiser.modulation(times, (labels,), x.dtype)
    for step, t in enumerate(times):
        with torch.no_grad():
            expected = model(x, timestep=t.expand(3), class_labels=labels).sample
            assert relative_error(denoiser(x, rows[step], compute), expected) <= 1e-5


def test_the_model_is_frozen() -> None:
    assert not any(p.requires_grad for p in make_task().model.parameters())


def test_checkpointing_recomputes_and_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        task, router = make_task(checkpointing=checkpointing), make_router()
        with FlopCounterMode(display=False) as flops:
            gradients = [
                torch.autograd.grad(step.mse, router.logits[step.step])[0]
                for step in sdt(task, router, Gating(), task.draw(2, 1))
            ]
        found.append((gradients, flops.get_total_flops()))
    (plain, cost), (recomputed, more) = found
    assert len(plain) == 5 and all(g.abs().max() > 0 for g in plain)
    for a, b in zip(recomputed, plain):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    assert more > 1.1 * cost
