"""Training for models that read text: its run is diffusers'; prompts; routers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harmonica_rt.train import models
from harmonica_rt.train.denoiser import compute
from harmonica_rt.train.sdt import Gating, sdt
from harmonica_rt.train.task import Task, Trajectory, prompts

from ..conftest import make_dit, make_pixart, relative_error
from .conftest import ddim, make_router, make_text_task


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_computing_everything_is_the_diffusers_model(sized: bool, guidance: float) -> None:
    task = make_text_task(guidance=guidance, double=True, use_additional_conditions=sized)
    run = Trajectory(task, batch := task.draw(3, 5))
    arguments = task.adapter.arguments(task.conditioning(batch))
    for step, t in enumerate(task.scheduler.timesteps):
        x = torch.randn(len(run.rows[0]), 2, 8, 8, dtype=torch.float64)
        with torch.no_grad():
            expected = task.model(x, timestep=t.expand(len(x)), **arguments).sample
            got = task.denoiser(x, run.rows[step], compute, run.held)
        assert relative_error(got, expected) <= 1e-10


def test_a_router_learns() -> None:
    task = make_text_task()
    router = make_router(torch.zeros(task.steps, 9), branches=3)
    for step in sdt(task, router, Gating(), task.draw(2, 1)):
        (gradient,) = torch.autograd.grad(step.mse, router.logits[step.step])
        assert gradient.abs().max() > 0


def test_prompts_are_drawn_with_their_masks_and_the_last_is_the_empty_one() -> None:
    model = make_pixart(use_additional_conditions=True)
    states, mask = torch.arange(4.0)[:, None, None].expand(4, 5, 10), torch.arange(4)[:, None].expand(4, 5)
    draw = prompts(model, states, mask)
    on, off = draw(50, torch.Generator().manual_seed(0))
    resolution, aspect, text, text_mask = on
    assert resolution.unique().tolist() == [64.0] and aspect.unique().tolist() == [1.0]
    assert text[:, 0, 0].unique().tolist() == [0, 1, 2] and torch.equal(text[:, 0, 0], text_mask[:, 0].float())
    assert off[2].unique().tolist() == [3.0]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = make_pixart()
    with pytest.raises(ValueError, match="conditions: expected some for PixArtTransformer2DModel, which reads text"):
        Task(model, ddim(), 4)
    with pytest.raises(ValueError, match=r"states \[2 or more, tokens, 10\] .* got \[3, 4, 9\] and \[3, 4\]"):
        prompts(model, torch.ones(3, 4, 9), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"expected --features FILE .* got none"):
        models.conditions("some/pixart", model)
    with pytest.raises(ValueError, match=r"classes: expected none .* reads text"):
        models.conditions("some/pixart", model, classes=(1, 2))
    file = tmp_path / "features.safetensors"
    with pytest.raises(ValueError, match="features: expected none for DiTTransformer2DModel"):
        models.conditions("some/dit", make_dit(), file)
    save_file({"states": torch.ones(3, 4, 10)}, file)
    with pytest.raises(ValueError, match=r"tensors named states and mask, got \['states'\]"):
        models.conditions("some/pixart", model, file)
    file.write_bytes(b"no")
    with pytest.raises(ValueError, match="not a safetensors file"):
        models.conditions("some/pixart", model, file)
    save_file({"states": torch.ones(3, 4, 10), "mask": torch.ones(3, 4)}, file)
    on, _ = models.conditions("some/pixart", model, file)(2, torch.Generator())
    assert [list(t.shape) for t in on] == [[2, 4, 10], [2, 4]]
