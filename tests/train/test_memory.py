"""Memory of learning: what is said before the run is what the run holds, and parts that are not needed leave."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt.train.contexts import ContextWeights
from harmonica_rt.train.memory import Live, Memory, count_step, counted, nbytes
from harmonica_rt.train.pipeline import warn_of
from harmonica_rt.train.pipeline_task import PipelineTask
from harmonica_rt.train.sampled import Sampled
from harmonica_rt.train.weights import WeightSettings

from .pipeline_cases import generation_of

GIB = 2**30
CASES = [("flux", "blocks", "steps"), ("flux", "blocks", "blocks"), ("flux", "branches", "steps")]
CASES += [("sd3", "blocks", "steps"), ("pixart", "branches", "steps"), ("wan", "blocks", "steps")]


@pytest.mark.parametrize(("name", "level", "kept"), CASES)
def test_what_is_predicted_is_what_is_held(name: str, level: str, kept: str) -> None:
    """By counts of the very iteration, weights apart; tiny models, of which small things are a larger share."""
    generation = generation_of(name, alike=True)
    sampled = Sampled(generation.pipeline)
    with sampled.ready():
        task = PipelineTask(sampled, generation, level, size=2)
        schedule = task.schedule([0, 2, 3], 2)
        settings = WeightSettings(
            iterations=1, batch=2, pool=2, carry=task.carry, channels=level == "blocks", checkpointing=kept
        )
        memory = task.memory(schedule, settings)
        width = task.width if settings.channels else None
        weights, starts = (
            ContextWeights(schedule, carry=task.carry, width=width, entered=task.entered),
            task.starts("full", 2, 5),
        )
        starts.end(0, 2)

        def iterate() -> None:
            change = weights.change.repeat(2, 1).requires_grad_()
            errors = starts.errors(starts.result(schedule, weights(change), 0, 2, kept), 0, 2)
            torch.autograd.grad(errors.sum(), change)

        iterate()  # plans are made
        gc.collect()
        parts = [t for model in sampled.denoisers.values() for t in (*model.parameters(), *model.buffers())]
        with Live(parts) as live:
            iterate()
    assert memory.weights == nbytes(parts)
    assert memory.working == pytest.approx(live.peak, rel=0.2)


class Line(nn.Module):
    """Two layers whose activations are counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.b(torch.nn.functional.gelu(self.a(hidden_states)))


def test_a_step_is_counted_by_shapes() -> None:
    """Without data: a copy that has none gives the counts of the model itself, which is left as it was."""
    model, sample = Line().requires_grad_(False), torch.randn(16, 8)
    got, own = count_step(model, ((sample,), {})), counted(model, ((sample.clone(),), {}))
    assert got == own
    assert got.forward_macs == got.backward_macs == 2 * 16 * 8 * 32
    assert got.peak <= 4 * (16 * 8 * 2 + 3 * 16 * 32), "the inner values, their gradient, and no weights"
    assert not sample.requires_grad and type(next(model.parameters())) is nn.Parameter


def made(**more: Any) -> Memory:
    sizes = {"weights": 20 * GIB, "step": 40 * GIB, "values": 4 * GIB, "numbers": GIB, "samples": 0, "libraries": 0}
    return Memory(**sizes | {"images": 4, "accumulate": 1, "available": 80 * GIB} | more)


def test_what_does_not_fit_is_told_with_what_to_change() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of(made())
    with pytest.warns(UserWarning, match=r"will not fit: 65.0 GiB of 40.0 GiB .*--accumulate 4"):
        warn_of(made(available=40 * GIB))
    assert "--height" in made(available=30 * GIB).advice
    assert "--level auto" in made(available=30 * GIB, values=200 * GIB).advice
    assert "--channels no" in made(available=30 * GIB, numbers=200 * GIB).advice


def test_learning_keeps_one_blocks_activations_where_a_steps_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = generation_of("flux")
    told: list[Memory] = []
    options = {"iterations": 1, "batch": 2, "validation": 2, "target_speedup": 1.5, **generation.call}
    monkeypatch.setattr(PipelineTask, "held_out", 2)
    prompts = generation.subjects
    hrt.learn(generation.pipeline, prompts, on_memory=told.append, **options)
    room = told[0].total - 1
    monkeypatch.setattr("harmonica_rt.train.pipeline_task.available", lambda device: room)
    hrt.learn(generation.pipeline, prompts, on_memory=told.append, **options)
    assert told[1].step < told[0].step and told[1].fits


# ---- parts that leave


def test_text_encoders_are_there_for_prompts_alone() -> None:
    generation = generation_of("flux")
    pipeline, sampled = generation.pipeline, Sampled(generation.pipeline)
    moved: list[str] = []
    encoders = {"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2, "vae": pipeline.vae}
    for name, part in encoders.items():
        to = part.to
        part.to = lambda device, name=name, to=to: moved.append(f"{name} {device}") or to(device)
    with sampled.ready():
        assert moved == ["text_encoder cpu", "text_encoder_2 cpu", "vae cpu"]
        assert not any(isinstance(getattr(sampled.pipeline, name), nn.Module) for name in encoders)
        moved.clear()
        sampled.encode(generation, 2)
        assert moved == ["text_encoder cpu", "text_encoder_2 cpu"] * 2, "there and away again, once for all prompts"
        moved.clear()
        sampled.run(generation, range(2))
        assert not moved, "encoded already"
    back = ["text_encoder cpu", "text_encoder_2 cpu", "vae cpu"]
    assert sorted(moved) == back, "to where they were, not by the device"
    assert all(getattr(pipeline, name) is part for name, part in encoders.items())
