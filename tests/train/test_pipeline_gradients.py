"""Learning through pipelines: a learned run is the compiled one, and gradients are true."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import harmonica_rt as hrt
from harmonica_rt.train.contexts import ContextWeights, Schedules, every
from harmonica_rt.train.pipeline_task import PipelineTask
from harmonica_rt.train.reusing import CHECKPOINTS
from harmonica_rt.train.sampled import Sampled

from .pipeline_cases import CALLS, LEVELS, generation_of, latents, relative

CASES = [(name, level, "shared") for name in CALLS for level in LEVELS]
CASES += [(name, level, "own") for name in ("flux", "wan") for level in LEVELS]  # whose guidance is a call of its own


def spoilt(task: PipelineTask, channels: bool, contexts: str = "shared") -> Schedules:
    """Schedules whose numbers are all other than the forecast's, and than each other's; so are an own one's steps."""
    carry = 0.5 if task.carry else 0.0
    schedule: Schedules = task.schedule([0, 2, 3], 2, carry)
    if contexts == "own":
        steps = ([0, 2, 3], [0, 1, 3, 4])
        schedule = {name: task.schedule(own, 2, carry) for name, own in zip(task.named_contexts(), steps, strict=True)}
    weights = ContextWeights(schedule, carry=task.carry, width=task.width if channels else None, entered=task.entered)
    change = torch.randn(len(weights.change), generator=torch.Generator().manual_seed(0))
    return weights.to_schedule(0.1 * change)


@pytest.fixture
def any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences need float64, which the runtime refuses at level branches."""
    checked = "harmonica_rt.branch_engine.check_model"
    monkeypatch.setattr(checked, lambda model, parts: (next(model.parameters()).dtype, torch.device("cpu")))


@pytest.mark.parametrize(("name", "level", "contexts"), CASES)
def test_a_learned_run_is_the_compiled_one(name: str, level: str, contexts: str) -> None:
    """Also of two denoisers (wan), of guidance in two calls (flux, qwen, wan) and in one, of padded prompts (qwen)."""
    generation = generation_of(name, alike=(name, level) == ("qwen", "branches"))
    sampled = Sampled(generation.pipeline)
    with sampled.ready():
        task = PipelineTask(sampled, generation, level, size=2)
        schedule = spoilt(task, level != "output", contexts)
        got = task.starts("full", 2, 5)
        learned, arguments = got.result(schedule, None, 0, 2), got.generation.arguments(range(2))
        hrt.compile(sampled.pipeline, schedule, backend="eager")
        expected = latents(sampled, arguments)
    assert relative(learned, expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "level", "contexts"),
    [
        ("flux", "blocks", "shared"),
        ("wan", "blocks", "shared"),
        ("pixart", "branches", "shared"),
        ("flux", "branches", "own"),
        ("wan", "blocks", "own"),
    ],
)
@pytest.mark.usefixtures("any_dtype")
def test_gradients_are_those_of_differences(name: str, level: str, contexts: str) -> None:
    """With checkpoints and without; of each image its own, and of each context with weights of its own."""
    generation = generation_of(name)
    for model in Sampled(generation.pipeline).denoisers.values():
        model.double()
    generation.pipeline.to(torch.float64)
    sampled = Sampled(generation.pipeline)
    with sampled.ready():
        task = PipelineTask(sampled, generation, level, size=2)
        schedule = spoilt(task, True, contexts)
        weights, starts = (
            ContextWeights(schedule, carry=task.carry, width=task.width, entered=task.entered),
            task.starts("full", 2, 5),
        )
        starts.ends[0, 2] = torch.zeros_like(starts.end(0, 2))

        def errors(change: Tensor, checkpointing: str = "none") -> Tensor:
            result = starts.result(schedule, weights(change), 0, 2, checkpointing)
            return result.flatten(1).double().square().mean(1)

        change = torch.zeros(2, len(weights.change), dtype=torch.float64, requires_grad=True)
        gradients = [torch.autograd.grad(errors(change, kept).sum(), change)[0] for kept in CHECKPOINTS]
        for more in gradients[1:]:
            assert torch.allclose(gradients[0], more, rtol=1e-9, atol=1e-12)
        sizes = [len(own.change) for own in every(weights.own)]
        assert len(sizes) == (2 if contexts == "own" else 1)
        for part in range(len(sizes)):
            direction = torch.randn(change.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            for other, values in enumerate(direction.split(sizes)):
                values *= other == part
            with torch.no_grad():
                step = 3e-2 * direction  # samplers keep float32
                difference = (errors(change + step) - errors(change - step)) / 6e-2
            expected = gradients[0] @ direction
            assert expected.abs().min() > 0
            assert torch.allclose(difference, expected, rtol=2e-2, atol=2e-3 * expected.abs().max().item())


def test_contexts_of_equal_weights_are_as_shared_ones() -> None:
    """The same run; the gradient of what they share is the sum of theirs."""
    generation = generation_of("flux")
    sampled = Sampled(generation.pipeline)
    with sampled.ready():
        task = PipelineTask(sampled, generation, "blocks", size=2)
        schedule, starts = spoilt(task, channels=True), task.starts("full", 2, 5)

        def run(schedules: Schedules) -> tuple[Tensor, Tensor]:
            weights = ContextWeights(schedules, carry=True, width=task.width)
            change = torch.zeros(2, len(weights.change), requires_grad=True)
            result = starts.result(schedules, weights(change), 0, 2)
            return result, torch.autograd.grad(starts.errors(result, 0, 2).sum(), change)[0]

        (shared, whole), (own, parts) = run(schedule), run({"cond": schedule, "uncond": schedule})
        assert torch.equal(shared, own)
        cond, uncond = parts.chunk(2, dim=1)
        assert relative(cond + uncond, whole) < 1e-4 and relative(cond, uncond) > 0.1
        with pytest.raises(
            ValueError, match=r"context: expected one of \('cond',\), which have schedules, got 'uncond'"
        ):
            run({"cond": schedule})
