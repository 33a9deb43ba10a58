"""The DiT adapter: what it refuses, what it joins, what it counts."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import FusedAttnProcessor2_0, SlicedAttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import harmonica_rt as hrt
from harmonica_rt.models import adapt
from harmonica_rt.models.parts import join_rows

from ..conftest import make_dit


class Quantised(torch.nn.Linear):
    pass


class Other(DiTTransformer2DModel):
    pass


class OtherBlock(BasicTransformerBlock):
    pass


def recast(path: str, kind: type) -> torch.nn.Module:
    model = make_dit()
    (model.get_submodule(path) if path else model).__class__ = kind
    return model


def replace(path: str, module: torch.nn.Module) -> torch.nn.Module:
    model = make_dit()
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: replace("transformer_blocks.1.attn1.to_q", Quantised(16, 16)), r"blocks\.1\.attn1\.to_q: .*Quantised"),
        (lambda: replace("transformer_blocks.2.ff.net.2", Quantised(64, 16)), r"blocks\.2\.ff\.net\.2: .*plain Linear"),
        (lambda: replace("proj_out_2", Quantised(16, 16)), r"proj_out_2: .*Quantised"),
        (lambda: replace("transformer_blocks.0.norm3", torch.nn.RMSNorm(16)), r"norm3: expected a plain LayerNorm"),
        (lambda: recast("", Other), r"model: expected a plain DiTTransformer2DModel, got .*Other"),
        (lambda: recast("transformer_blocks.1", OtherBlock), r"blocks\.1: expected a plain BasicTransformerBlock"),
        (lambda: replace("norm_out", torch.nn.LayerNorm(16)), r"norm_out: .*without weight and bias"),
        (
            lambda: replace("transformer_blocks.0.attn1.to_out.1", torch.nn.ReLU()),
            r"to_out\.1: expected a plain Dropout",
        ),
        (lambda: make_dit(activation_fn="geglu"), r"ff\.net\.0: expected a plain GELU, got .*GEGLU"),
    ],
)
def test_what_cannot_be_expressed_is_named(model: object, match: str) -> None:
    with pytest.raises(hrt.UnsupportedModelError, match=match):
        adapt(model())


@pytest.mark.parametrize("processor", [FusedAttnProcessor2_0, lambda: SlicedAttnProcessor(1)])
def test_other_attention_processors_are_named(processor: object) -> None:
    model = make_dit()
    model.transformer_blocks[1].attn1.processor = processor()
    with pytest.raises(hrt.UnsupportedModelError, match=r"blocks\.1\.attn1: .*AttnProcessor2_0, got \w+"):
        adapt(model)


def test_tied_projections_are_named() -> None:
    model = make_dit()
    model.transformer_blocks[1].attn1.to_q.weight = model.transformer_blocks[0].attn1.to_q.weight
    with pytest.raises(hrt.UnsupportedModelError, match=r"blocks\.0\.attn1\.to_q: expected parameters of its own"):
        adapt(model)


def test_a_hook_on_all_modules_is_refused() -> None:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(hrt.UnsupportedModelError, match="got one on all modules"):
            adapt(make_dit())
    finally:
        handle.remove()


def test_hooks_are_refused_when_compiling_and_when_they_come_later() -> None:
    model = make_dit()
    schedule = hrt.Schedule.full(model, 1)
    fast = hrt.compile(model, schedule, backend="eager")
    handle = model.transformer_blocks[1].register_forward_hook(lambda *args: None)
    assert hrt.Schedule.full(model, 1).level == "blocks"
    for refused in (
        lambda: hrt.compile(model, schedule),
        lambda: fast(torch.randn(1, 2, 8, 8), torch.tensor([9]), torch.tensor([0])),
    ):
        with pytest.raises(hrt.UnsupportedModelError, match=r"transformer_blocks\.1: expected no forward hooks"):
            refused()
    handle.remove()
    fast(torch.randn(1, 2, 8, 8), torch.tensor([9]), torch.tensor([0]))


def test_adapting_changes_nothing() -> None:
    model = make_dit()
    before = [p.data_ptr() for p in model.parameters()]
    hrt.compile(model, hrt.Schedule.full(model, 1))
    assert [p.data_ptr() for p in model.parameters()] == before


def test_join_rows_joins_once() -> None:
    parameters = [torch.nn.Parameter(torch.randn(n, 3)) for n in (2, 4, 1)]
    values = torch.cat([p.data.clone() for p in parameters])
    joined = join_rows(parameters)
    assert torch.equal(joined, values)
    parameters[1].data.zero_()
    assert torch.equal(joined[2:6], torch.zeros(4, 3)), "one storage"
    assert join_rows(parameters).data_ptr() == joined.data_ptr(), "neighbours stay where they are"
    parameters[1].data = torch.ones(4, 3)
    again = join_rows(parameters)
    assert torch.equal(again[2:6], torch.ones(4, 3))
    assert again.data_ptr() != joined.data_ptr()


def test_join_rows_is_not_fooled_by_order_or_transposition() -> None:
    storage = torch.randn(4, 3)
    swapped = [torch.nn.Parameter(storage[2:]), torch.nn.Parameter(storage[:2])]
    assert torch.equal(join_rows(swapped), torch.cat([storage[2:], storage[:2]]))
    turned = [torch.nn.Parameter(torch.randn(3, 2).t()), torch.nn.Parameter(torch.randn(2, 3))]
    values = torch.cat([p.data.clone() for p in turned])
    assert torch.equal(join_rows(turned), values)


@pytest.mark.parametrize("size", [8, 12])
@pytest.mark.parametrize("layers", [1, 3])
def test_macs_are_what_diffusers_does(layers: int, size: int) -> None:
    model = make_dit(layers, sample_size=size)
    # torch's counter knows no CPU flash attention: the same attention as two batched products
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(3, 2, size, size), timestep=torch.zeros(3), class_labels=torch.zeros(3, dtype=torch.long))
    macs = adapt(model).macs(None, None, 3)
    assert 2 * (macs.fixed + layers * sum(macs.branches)) == counter.get_total_flops()


def test_sizes_that_do_not_fit_the_patches() -> None:
    model = make_dit()
    fast = hrt.compile(model, hrt.Schedule.full(model, 1), backend="eager")
    with pytest.raises(ValueError, match="multiples of the patch, 2, got 8x9"):
        fast(torch.randn(1, 2, 8, 9), torch.tensor([9]), torch.tensor([0]))


def test_other_sizes_have_their_own_positions() -> None:
    """diffusers takes squares; there ours must agree on sizes other than the configured one."""
    model = make_dit()
    fast = hrt.compile(model, hrt.Schedule.full(model, 1), backend="eager")
    call = (torch.randn(2, 2, 12, 12), torch.tensor([9, 9]), torch.tensor([0, 1]))
    with torch.no_grad():
        torch.testing.assert_close(fast(*call).sample, model(*call).sample, rtol=1e-4, atol=1e-4)
