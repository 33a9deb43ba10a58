"""The model's own calls at level branches, compiled by backend inductor: which are, which run as they are, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt.compiled_calls import CompiledCall
from harmonica_rt.kernels import traces

from .conftest import assert_close, needs_compiler
from .pairings.made import MODELS, STEPS, Sampler

pytestmark = needs_compiler


def made(model: nn.Module) -> nn.Module:
    return hrt.compile(model, hrt.Schedule.uniform(model, STEPS, 2, level="branches"), backend="inductor")


def stages(fast: nn.Module) -> list[object]:
    (plan,) = fast._plans.values()
    return [stage for own in plan.ops.stages for stage in own]


def test_all_calls_are_compiled_and_layers_share_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_compiled", type(traces._compiled)())
    model, sampler = MODELS["flux"](), Sampler("flux")
    joint, single = len(model.transformer_blocks), len(model.single_transformer_blocks)
    fast = made(model)
    sampler.run(fast)
    assert all(isinstance(stage, CompiledCall) for stage in stages(fast)) and len(stages(fast)) == 2 * joint + single
    assert len(traces._compiled) == 3, "attention, feed-forward, single block"
    assert fast.report().plans[0].uncompiled == {}


def test_it_launches_less() -> None:
    model, sampler = MODELS["flux"](), Sampler("flux")
    plain = hrt.compile(model, hrt.Schedule.uniform(model, STEPS, 2, level="branches"), backend="eager")
    fast = made(model)
    for own in (plain, fast):
        sampler.run(own)
    assert max(fast.report().plans[0].launches) < max(plain.report().plans[0].launches)


class Looks(nn.Module):
    """Looks at values, which no trace can."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(x) if x.abs().sum() > 0 else x


def test_what_cannot_be_traced_runs_as_it_is_and_the_report_says_so() -> None:
    model, sampler = MODELS["flux"](), Sampler("flux")
    feed = model.transformer_blocks[0].ff
    feed.net[2] = Looks(feed.net[2]).eval()
    fast = made(model)
    assert_close(sampler.run(fast), sampler.run(hrt.compile(model, fast.schedule, backend="eager")), 1e-5)
    (reason,) = (uncompiled := fast.report().plans[0].uncompiled).values()
    assert [*uncompiled] == [1] and "DataDependent" in reason
    assert f"1 calls of the model's own modules not compiled: {reason}" in str(fast.report())


def test_weights_that_are_loaded_into_place_are_read() -> None:
    model, sampler = MODELS["flux"](), Sampler("flux")
    fast = made(model)
    before = sampler.run(fast)
    model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()})
    after = sampler.run(fast)
    assert_close(after, sampler.run(hrt.compile(model, fast.schedule, backend="eager")), 1e-5)
    assert not torch.allclose(after[0], before[0])
