"""Functions that read weights, compiled: which share code, what is baked in, what is read anew."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from harmonica_rt.kernels import traces

from ..conftest import assert_close, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_compiled", type(traces._compiled)())


def shared(module: nn.Module, x: Tensor) -> tuple[object, Tensor]:
    """`module` compiled, and where its result goes."""
    out = torch.empty_like(x)
    return traces.compile_shared(lambda h, into: into.copy_(module(h)), (x, out)), out


def mlp(width: int = 16, approximate: str = "tanh") -> nn.Module:
    return nn.Sequential(nn.Linear(width, 24), nn.GELU(approximate), nn.Linear(24, width)).requires_grad_(False)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_does_what_the_module_does(dtype: torch.dtype, approximate: str) -> None:
    module, x = mlp(approximate=approximate).to(dtype), torch.randn(2, 5, 16, dtype=dtype)
    run, out = shared(module, x)
    run(x, out)
    assert_close([out], [module(x)], 1e-5 if dtype == torch.float32 else 1e-2)


def test_modules_that_do_the_same_share_code_and_others_do_not() -> None:
    x = torch.randn(2, 5, 16)
    modules = [mlp(), mlp(), mlp(approximate="none"), nn.Sequential(*mlp(), nn.Identity())]
    for module in modules:
        run, out = shared(module, x)
        run(x, out)
        assert_close([out], [module(x)], 1e-5)
    assert len(traces._compiled) == 2, "by what they do, not by what they are"
    shared(modules[0], torch.randn(3, 5, 16))
    assert len(traces._compiled) == 3, "another shape"


def test_weights_are_read_where_they_lie_and_numbers_are_baked_in() -> None:
    module, x = mlp(), torch.randn(2, 5, 16)
    module.scale = 2.0
    out = torch.empty_like(x)
    run = traces.compile_shared(lambda h, into: into.copy_(module.scale * module(h)), (x, out))
    with torch.no_grad():
        module[0].weight.mul_(3)
    module.scale = 5.0
    run(x, out)
    assert_close([out], [2 * module(x)], 1e-5)


def test_a_tensor_that_is_read_twice_is_one_input() -> None:
    weight, x = torch.randn(16), torch.randn(2, 5, 16)
    out = torch.empty_like(x)
    run = traces.compile_shared(lambda h, into: into.copy_(h * weight + weight), (x, out))
    run(x, out)
    assert_close([out], [x * weight + weight], 1e-6)
    ((_, kinds, _),) = traces._compiled
    assert len(kinds) == 3


def test_what_looks_at_values_is_refused() -> None:
    x = torch.randn(2, 5, 16)
    with pytest.raises(Exception, match=r"(?i)data.dependent|item"):
        traces.compile_shared(lambda h, into: into.copy_(h if h.sum() > 0 else -h), (x, torch.empty_like(x)))
    assert not traces._compiled


def test_the_last_ones_used_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "KEPT", 2)
    one, x = mlp(), [torch.randn(batch, 5, 16) for batch in (1, 2, 3)]
    for batch in (0, 1, 0, 2):
        shared(one, x[batch])
    assert [kinds[0][0][0] for _, kinds, _ in traces._compiled] == [1, 3]


def test_it_keeps_no_module_alive() -> None:
    module, x = mlp(), torch.randn(2, 5, 16)
    weight = weakref.ref(module[0].weight)
    shared(module, x)
    del module
    gc.collect()
    assert weight() is None
