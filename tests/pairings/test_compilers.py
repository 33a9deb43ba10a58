"""torch.compile over blocks, over the whole model, and diffusers' other switches of how a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import FasterCacheConfig, TaylorSeerCacheConfig, apply_faster_cache, apply_first_block_cache
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import harmonica_rt as hrt
from tests.conftest import assert_close, make_pixart
from tests.emulator import Emulator

from .made import (
    BLOCK_WAYS,
    STEPS,
    WAYS,
    Sampler,
    check,
    check_follows,
    check_works,
    compiled,
    make_flux,
    make_sd3,
    make_unet,
    over,
)  # fmt: skip
from .test_lora import captured, latents, make_pipe

WHEN = {"before": True, "after": False}
COMPILES: dict[str, Callable[[Any], Any]] = {
    "repeated blocks": lambda model: model.compile_repeated_blocks(backend="eager"),
    "each block": lambda model: [b.compile(backend="eager") for b in model.transformer_blocks],
    "one block": lambda model: model.transformer_blocks[1].compile(backend="eager"),
    "aot": lambda model: model.compile_repeated_blocks(backend="aot_eager", fullgraph=True),
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@over(WAYS)
@over(COMPILES, "over_blocks")
@over(WHEN, "before")
def test_compiled_blocks(way: dict[str, Any], over_blocks: Any, before: bool) -> None:
    model, sampler = make_flux(), Sampler("flux")
    wanted = sampler.run(compiled(make_flux(), way))
    if before:
        over_blocks(model)
    fast = compiled(model, way)
    if not before:
        over_blocks(fast)
    assert_close(check(fast, sampler, way, 1e-6), wanted, 1e-6)
    blocks = [b for b in model.modules() if b._compiled_call_impl is not None]
    assert blocks
    assert all("_Intercepted" not in type(b._compiled_call_impl).__name__ for b in blocks)


def test_compiled_blocks_are_compiled_once() -> None:
    """As often as without us."""
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def count(model: torch.nn.Module) -> int:
        torch._dynamo.reset()
        graphs.clear()
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
        for _ in range(2):
            Sampler("flux").run(model)
        return len(graphs)

    assert count(compiled(make_flux(), WAYS["groups"])) == count(make_flux()) > 0


def test_a_model_that_torch_compiles_whole() -> None:
    """Level output, with a schedule made for the plain model or for it; level blocks is refused."""
    whole, sampler = torch.compile(make_flux(), backend="eager"), Sampler("flux")
    schedules = [hrt.Schedule.uniform(model, STEPS, level="output") for model in (whole, make_flux())]
    assert schedules[0].model == schedules[1].model == "FluxTransformer2DModel"
    for schedule in schedules:
        fast = hrt.compile(whole, schedule)
        assert_close(sampler.run(fast), sampler.run(compiled(make_flux(), WAYS["output"])), 1e-6)
    assert hrt.Schedule.uniform(whole, STEPS).level == "output"
    for way in BLOCK_WAYS.values():
        with pytest.raises(hrt.UnsupportedModelError, match=r"torch.compile.*expected level 'output', got 'blocks'"):
            hrt.Schedule.uniform(whole, STEPS, **way)
        with pytest.raises(hrt.UnsupportedModelError, match=r"torch.compile.*level 'output' takes it"):
            hrt.compile(whole, hrt.Schedule.uniform(make_flux(), STEPS, **way))


def test_a_pipeline_whose_transformer_torch_compiles_whole() -> None:
    pipe, plain = make_pipe(), make_pipe()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    schedule = hrt.Schedule.uniform(plain.transformer, STEPS, level="output")
    got = latents(hrt.compile(pipe, schedule))
    assert_close([got], [latents(hrt.compile(plain, schedule))], 1e-6)
    assert type(hrt.uncompile(pipe).transformer).__name__ == "OptimizedModule"


def test_a_transformer_compiled_in_place() -> None:
    """`pipe.transformer.compile()`: what computed steps run, and level blocks says that it cannot look within."""
    pipe, plain, graphs = make_pipe(), make_pipe(), []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipe.transformer.compile(backend=backend)
    schedule = hrt.Schedule.uniform(plain.transformer, STEPS, level="output")
    got = latents(hrt.compile(pipe, schedule))
    assert_close([got], [latents(hrt.compile(plain, schedule))], 1e-6)
    assert graphs
    hrt.compile(pipe, hrt.Schedule.uniform(plain.transformer, STEPS, level="blocks"))
    with pytest.raises(hrt.UnsupportedModelError, match="got no call of any: level 'output' takes this model"):
        latents(pipe)


def test_torch_compile_of_what_is_compiled_is_refused() -> None:
    for way in WAYS.values():
        fast = compiled(make_flux(), way)
        for refused in (fast.compile, lambda fast=fast: torch.compile(fast, backend="eager")):
            with pytest.raises(RuntimeError, match="compiled already, by harmonica_rt"):
                refused()


# ---- attention


class Halves(FluxAttnProcessor):
    factor = 0.5

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(t * self.factor for t in super().__call__(*args, **kwargs))


class Thirds(FluxAttnProcessor):
    """What single blocks get: one stream."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        return tuple(t / 3 for t in out) if isinstance(out, tuple) else out / 3


HOW = pytest.mark.parametrize(("build", "tolerance"), [(compiled, 0.0), (captured, 1e-5)], ids=["launched", "captured"])


@over(WAYS)
@HOW
def test_attention_processors_swapped(build: Any, tolerance: float, way: dict[str, Any]) -> None:
    fast, sampler = build(make_flux(), way), Sampler("flux")
    check_follows(fast, sampler, way, lambda: fast.set_attn_processor(Thirds()), tolerance)
    half = fast.transformer_blocks[0].attn.set_processor
    check_follows(fast, sampler, way, lambda: half(Halves()), tolerance)
    processor = fast.transformer_blocks[0].attn.processor
    check_follows(fast, sampler, way, lambda: setattr(processor, "factor", 2.0), tolerance)


def test_another_attention_backend_is_captured_anew() -> None:
    recorders: list[Emulator] = []
    fast, sampler = compiled(make_flux(), WAYS["trunk"], backend="cudagraph"), Sampler("flux")
    fast._recorder = lambda device: recorders.append(Emulator()) or recorders[-1]
    for _ in range(2):
        sampler.run(fast)
    count = len(recorders[0].graphs)
    sampler.run(fast)
    assert len(recorders[0].graphs) == count
    fast.set_attention_backend("_native_math")
    sampler.run(fast)
    assert len(recorders[0].graphs) > count
    fast.set_attention_backend("native")


@over(WAYS)
def test_attention_backends(way: dict[str, Any]) -> None:
    model, sampler = make_flux(), Sampler("flux")
    wanted = sampler.run(compiled(make_flux(), way))
    model.set_attention_backend("native")
    fast = check_works(model, sampler, way)
    assert_close(sampler.run(fast), wanted, 0.0)
    fast.set_attention_backend("_native_math")
    assert {b.attn.processor._attention_backend for b in fast.transformer_blocks} == {"_native_math"}
    assert_close(check(fast, sampler, way), wanted, 1e-5)
    fast.set_attention_backend("native")  # for all models: diffusers keeps the last one as everybody's
    assert_close(check(fast, sampler, way), wanted, 0.0)


@over(WAYS)
@HOW
def test_fused_projections(build: Any, tolerance: float, way: dict[str, Any]) -> None:
    sampler = Sampler("flux")
    fast = build(make_flux(), way)
    wanted = sampler.run(fast)
    fast.fuse_qkv_projections()
    assert_close(check(fast, sampler, way, tolerance), wanted, 1e-5)
    fast.unfuse_qkv_projections()
    assert_close(check(fast, sampler, way, tolerance), wanted, 1e-5)


def test_slicing_chunking_and_channels_last_of_a_unet() -> None:
    way, sampler = WAYS["output"], Sampler("unet")
    fast = compiled(make_unet(), way)
    wanted = sampler.run(fast)
    for change in (
        lambda: fast.set_attention_slice("auto"),
        lambda: fast.set_attn_processor(AttnProcessor()),
        lambda: fast.to(memory_format=torch.channels_last),
        lambda: fast.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6),
    ):
        change()
        got = check(fast, sampler, way)
    assert not torch.equal(got[0], wanted[0]), "FreeU changes what a UNet makes"
    fast.disable_freeu()
    assert_close(check(fast, sampler, way), wanted, 1e-4)
    assert fast.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    check_works(make_unet().to(memory_format=torch.channels_last), sampler, way)


@over(WAYS)
def test_chunked_feed_forward_and_checkpointing(way: dict[str, Any]) -> None:
    sampler = Sampler("sd3")
    fast = compiled(make_sd3(), way)
    wanted = sampler.run(fast)
    fast.enable_forward_chunking(chunk_size=1, dim=1)
    assert_close(check(fast, sampler, way), wanted, 1e-5)
    fast.enable_gradient_checkpointing()
    assert_close(check(fast, sampler, way), wanted, 1e-5)
    with pytest.raises(ModuleNotFoundError, match="xformers"):
        fast.enable_xformers_memory_efficient_attention()
    assert_close(check(fast, sampler, way), wanted, 1e-5)


# ---- diffusers' own caches


def broadcast() -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500,
        spatial_attention_block_identifiers=("transformer_blocks",),
    )  # fmt: skip


CACHES: dict[str, Callable[[Any], Any]] = {
    "first block": lambda model: model.enable_cache(FirstBlockCacheConfig(threshold=0.2)),
    "broadcast": lambda model: model.enable_cache(broadcast()),
    "taylorseer": lambda model: model.enable_cache(TaylorSeerCacheConfig()),
    "applied": lambda model: apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.2)),
    "faster": lambda model: apply_faster_cache(
        model, FasterCacheConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    ),
}


@over(WAYS)
@over(CACHES, "cache")
def test_another_cache_is_refused(way: dict[str, Any], cache: Any) -> None:
    model, sampler = make_flux(), Sampler("flux")
    fast = compiled(model, way)
    wanted = sampler.run(fast)
    cache(fast)
    message = r"a model without a cache of its own, got one with \w+: take that off first"
    with pytest.raises(hrt.UnsupportedModelError, match=message):
        sampler.run(fast)
    with pytest.raises(hrt.UnsupportedModelError, match=message):
        compiled(model, way)
    if model.is_cache_enabled:
        fast.disable_cache()
        assert_close(check(fast, sampler, way), wanted, 0.0)


def test_a_cache_at_level_branches_is_refused() -> None:
    model = make_pixart()
    fast = hrt.compile(model, hrt.Schedule.uniform(model, STEPS), backend="eager")
    apply_first_block_cache(fast, FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(hrt.UnsupportedModelError, match=r"no forward hooks, got some \(a cache"):
        Sampler("pixart").run(fast)
    with pytest.raises(hrt.UnsupportedModelError, match="a cache of its own"):
        hrt.compile(model, hrt.Schedule.uniform(model, STEPS, level="blocks"))
