"""What stages say of themselves, against what they do; how backends run them, whatever follows what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import harmonica_rt as hrt
from bench.measure.launches import CountLaunches
from harmonica_rt.backends import OPS, LinearGelu, fused
from harmonica_rt.buffers import Buffers
from harmonica_rt.counting import CountMacs
from harmonica_rt.lowering import lower
from harmonica_rt.models import adapt
from harmonica_rt.models.base import Shape
from harmonica_rt.models.branch import Branch, Norm
from harmonica_rt.models.stages import CrossAttention, Gelu, Held, Linear, SelfAttention, Stage, scratch_columns

from ..conftest import BACKENDS, assert_close, make_dit, make_pixart

BATCH, TOKENS, WIDTH, TEXT = 2, 16, 16, 5


def linear(before: int, columns: int, bias: bool = True) -> Linear:
    return Linear(torch.randn(columns, before) / before**0.5, torch.randn(columns) if bias else None)


def held() -> Held:
    return Held(context=torch.randn(3, 2, BATCH, TEXT, WIDTH), bias=torch.randn(BATCH, 1, 1, TEXT))


def stream(columns: int = WIDTH) -> Tensor:
    return torch.randn(BATCH, TOKENS, columns)


STAGES = {
    "linear": lambda: (linear(WIDTH, 24), WIDTH),
    "linear without bias": lambda: (linear(WIDTH, 24, bias=False), WIDTH),
    "gelu": lambda: (Gelu("tanh"), WIDTH),
    "self-attention": lambda: (SelfAttention(2), 3 * WIDTH),
    "cross-attention": lambda: (CrossAttention(2, context=1), WIDTH),
    "linear and gelu": lambda: (LinearGelu(*vars(linear(WIDTH, 24)).values()), WIDTH),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_does_what_it_says(name: str) -> None:
    stage, columns = STAGES[name]()
    h, run = stream(columns).requires_grad_(), held()
    with CountMacs() as counted:
        computed = stage.compute(h, run)
    assert computed.shape == (BATCH, TOKENS, stage.columns(columns))
    assert counted.macs == stage.macs(BATCH, TOKENS, columns, TEXT)
    assert torch.autograd.grad(computed.sum(), h)[0].abs().max() > 0
    assert stage.weights == (24 * WIDTH if isinstance(stage, Linear) else 0)
    if isinstance(stage, LinearGelu):
        return  # `into` is CUDA's
    out = torch.full_like(computed, torch.nan)
    with torch.no_grad(), CountLaunches() as counter:
        assert stage.into(h.detach(), run, out) is out
    assert_close([out], [computed.detach()], 1e-6)
    assert counter.count == stage.launches + stage.copies


def test_cross_attention_reads_its_own_set() -> None:
    run, h = held(), stream()
    one, other = (CrossAttention(2, context=i).compute(h, run) for i in (0, 1))
    assert not torch.allclose(one, other)
    run["context"].select(0, 0).copy_(run["context"].select(0, 1))  # as a plan fills it anew
    assert torch.equal(CrossAttention(2, context=0).compute(h, run), other)


CHAINS = {
    "an MLP": lambda: (linear(WIDTH, 24), Gelu("tanh"), linear(24, WIDTH)),
    "the exact GELU": lambda: (linear(WIDTH, 24), Gelu("none"), linear(24, WIDTH)),
    "attention": lambda: (linear(WIDTH, 3 * WIDTH), SelfAttention(2), linear(WIDTH, WIDTH)),
    "GEMMs in a row": lambda: (linear(WIDTH, 24), linear(24, 40), Gelu("tanh"), linear(40, 24), linear(24, WIDTH)),
    "one stage": lambda: (linear(WIDTH, WIDTH),),
    "GELU first, and on attention": lambda: (
        *(Gelu("tanh"), linear(WIDTH, 3 * WIDTH), SelfAttention(2), Gelu("tanh"), linear(WIDTH, WIDTH)),
    ),
    "what does not write is copied": lambda: (linear(WIDTH, 3 * WIDTH), SelfAttention(2)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHAINS)
def test_backends_run_any_chain_of_stages(name: str, backend: str) -> None:
    stages: tuple[Stage, ...] = CHAINS[name]()
    branch, model = Branch(stages, Norm(0, 1, 1e-6), 2), make_dit()
    shape = Shape((BATCH, 4, 8, 8), torch.float32, torch.device("cpu"))
    widest = max(scratch_columns(stages), default=0)
    buffers = Buffers(adapt(model), lower(hrt.Schedule.full(model, 1)), shape, widest)
    ops = OPS[backend]([branch], Norm(0, 1, 1e-6), buffers)
    call, out, y = ops.branch(0), torch.full(buffers.stream, torch.nan), stream()
    kept = y.clone()
    with torch.no_grad(), CountLaunches() as counter:
        call(out, y)
    assert_close([out], [branch.compute(kept, None)], 1e-5)
    assert torch.equal(y, kept), "nothing is written over what a branch reads"
    if backend == "eager":
        assert counter.count == ops.branch_launches(0)


def test_a_gemm_ends_in_the_activation_that_cuda_has() -> None:
    up, down = linear(WIDTH, 24), linear(24, WIDTH)
    (both, last) = fused((up, Gelu("tanh"), down))
    assert type(both) is LinearGelu and both.weight is up.weight and last is down
    assert (both.launches, scratch_columns((both, last))) == (1, [24])
    y = stream()
    assert torch.equal(both.compute(y, None), Gelu("tanh").compute(up.compute(y, None), None))
    exact, bare = (up, Gelu("none"), down), (linear(WIDTH, 24, bias=False), Gelu("tanh"), down)
    assert (tuple(fused(exact)), tuple(fused(bare))) == (exact, bare)


@pytest.mark.parametrize("make", [make_dit, make_pixart])
def test_counting_a_layer_leaves_the_model_as_it_is(make: object) -> None:
    model = make()
    adapter, places = adapt(model), [p.data_ptr() for p in model.parameters()]
    counted = adapter.branch_macs(BATCH, TOKENS, TEXT)
    assert [p.data_ptr() for p in model.parameters()] == places
    bound, _ = adapter.bind()
    assert [p.data_ptr() for p in model.parameters()] != places
    assert counted == tuple(b.macs(BATCH, TOKENS, adapter.width, TEXT) for b in bound[: len(adapter.branches)])
