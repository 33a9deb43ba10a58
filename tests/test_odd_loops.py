"""What loops may do that diffusers' do not, and models whose calls are hard to tell apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harmonica_rt as hrt

from .odd_models import Small, compiled, levels, noise


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


# ---- calls that cannot be told apart


@levels
def test_a_context_that_begins_before_the_first_one_is_noticed(level: str) -> None:
    """Its first call is taken for the other's; the next one shows it, and the run ends."""
    fast = compiled(Small(), level=level)
    x, cond, uncond = noise(1, 3, 8), noise(1, 8), noise(1, 8)
    for t in (6.0, 5.0, 4.0):
        fast(x + t, t, cond)
    fast(x + 3, 3.0, uncond)
    with pytest.raises(RuntimeError, match=r"calls of a step without names: .* cache_context\(name\)"):
        fast(x + 3, 3.0, cond)


@levels
def test_a_call_less_than_before_is_noticed_where_order_alone_told_them_apart(level: str) -> None:
    fast, x = compiled(Small(), level=level), noise(1, 3, 8)
    for t in (6.0, 5.0, 4.0):
        for _ in range(2):
            fast(x + t, t, noise(1, 8))  # conditioned anew each time
    fast(x + 3, 3.0, noise(1, 8))
    with pytest.raises(RuntimeError, match="calls of a step without names: expected 2 calls"):
        fast(x + 2, 2.0, noise(1, 8))


@levels
def test_the_same_run_after_one_of_a_single_step_is_not_taken_for_another_context(level: str) -> None:
    fast, x, text = compiled(Small(), level=level), noise(1, 3, 8), noise(1, 8)
    fast(x, 6.0, text)
    first = fast(x, 6.0, text)
    fast(x + 1, 5.0, text)
    with pytest.raises(RuntimeError, match=r"expected 2 calls .* got 1; .* the same run once more, .* reset\(\)"):
        fast(x + 2, 4.0, text)
    fast.reset()
    assert torch.equal(fast(x, 6.0, text)[0], first[0])
    for step in (1, 2):
        fast(x + step, 6.0 - step, text)


def test_contexts_may_be_left_in_another_order(dit: nn.Module) -> None:
    fast = compiled(Small())
    a, b = fast.cache_context("a"), fast.cache_context("b")
    for enter in (a, b):
        enter.__enter__()
    for leave in (a, b):
        leave.__exit__(None, None, None)
    fast(noise(1, 3, 8), 6.0)
    assert [plan.context for plan in fast.report().plans] == [0]
    for wrong in ({"name": ["a"]}, {"name": "a", "step_index": "x"}, {"name": "a", "step_index": -1}):
        with pytest.raises(TypeError, match="cache_context: expected"), fast.cache_context(**wrong):
            pass


@levels
def test_an_argument_that_is_the_sample_of_another_model_is_none_here(level: str) -> None:
    class Other(Small):
        def forward(self, x: Tensor, timestep: Any, vision_tokens: Tensor | None = None) -> Any:
            return super().forward(x, timestep, vision_tokens)

    fast, samples = compiled(Other(), level=level), noise(6, 1, 3, 8)
    assert [len(fast(sample, 6.0 - step)) for step, sample in enumerate(samples)] == [1] * 6


def test_two_calls_a_step_of_a_model_that_writes_into_its_sample() -> None:
    class Writes(Small):
        def forward(self, x: Tensor, timestep: Any, cond: Tensor | None = None) -> Any:
            return super().forward(x.add_(0.0), timestep, cond)

    model, texts = Writes(), noise(2, 1, 8)
    schedule = hrt.Schedule.uniform(model, 4, 2, level="output", order=0, timesteps=[4.0, 3.0, 2.0, 1.0])
    fast = hrt.compile(model, schedule)
    for step, sample in enumerate(noise(4, 1, 3, 8)):
        got = [fast(sample, 4.0 - step, text)[0] for text in texts]
        if step % 2 == 0:
            kept = [model(sample, 4.0 - step, text)[0] for text in texts]
        torch.testing.assert_close(got, kept)
