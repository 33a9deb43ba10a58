"""Compiled pipelines are cast, sliced, fused and offloaded as diffusers' tests do with every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import SlicedAttnProcessor
from torch import nn

import harmonica_rt as hrt

from ..conftest import relative_error
from ..pairings.test_offload import sequential
from ..test_pixart_pipelines import offload
from .clients import TOLERANCE, Client, over

CPU = torch.device("cpu")
Change = Callable[[DiffusionPipeline], Any]
FORWARD = ("blocks", "output")  # levels that run the model's own forward


def denoisers(client: Client, pipe: DiffusionPipeline) -> list[Any]:
    return [getattr(pipe, name) for name in client.made.denoisers]


def parts(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def check_switched(client: Client, switch: Change, tolerance: float = TOLERANCE, **call: Any) -> DiffusionPipeline:
    """Before compiling and after, it is what a plain pipeline with the same switch is by hand. The one after."""
    plain = client.made.make()
    switch(plain)
    before = client.made.make()
    switch(before)
    client.check(client.compiled(before), plain, tolerance, **call)
    after = client.compiled()
    client.call(after, **call)
    switch(after)
    client.check(after, plain, tolerance, **call)
    return after


def check_refused(client: Client, switch: Change, message: str) -> None:
    """Level branches says what it does not take, before compiling and at the next run."""
    pipe = client.made.make()
    switch(pipe)
    with pytest.raises(hrt.UnsupportedModelError, match=message):
        client.compiled(pipe)
    pipe = client.compiled()
    client.call(pipe)
    switch(pipe)
    with pytest.raises(hrt.UnsupportedModelError, match=message):
        client.call(pipe)


# ---- where and in what numbers


@over()
def test_to_a_device(client: Client) -> None:
    pipe = client.compiled()
    latents = client.call(pipe)
    assert pipe.to("cpu") is pipe and pipe.device == CPU
    assert {part.device for part in parts(pipe)} == {CPU}
    assert torch.equal(client.call(pipe), latents)


@over()
def test_to_half_precision_and_back(client: Client) -> None:
    """Every part, the compiled ones too; back in float32 the weights are what rounding left of them."""
    pipe, plain = client.compiled(), client.made.make()
    whole = client.call(pipe)
    for dtype in (torch.bfloat16, torch.float32):
        for each in (pipe, plain):
            each.to(dtype=dtype)
        assert {part.dtype for part in parts(pipe)} == {dtype} == {pipe.dtype}
        assert {p.dtype for model in denoisers(client, pipe) for p in model.parameters()} == {dtype}
        half = dtype is torch.bfloat16
        rounded = client.check(pipe, plain, (0.1 if client.level == "branches" else 1e-3) if half else TOLERANCE)
        assert relative_error(rounded.float(), whole) > 1e-4


# ---- slices, tiles, projections


@over()
def test_attention_slicing(client: Client) -> None:
    """The pipeline's own switch, which of these families' parts reaches none."""
    pipe = client.compiled()
    latents = client.call(pipe)
    for size in (1, 2, "auto"):
        pipe.enable_attention_slicing(size)
        assert torch.equal(client.call(pipe), latents)
    pipe.disable_attention_slicing()
    assert torch.equal(client.call(pipe), latents)


def slice_attention(pipe: DiffusionPipeline) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.attn1.set_attention_slice(1)
        assert isinstance(block.attn1.processor, SlicedAttnProcessor)


@over("pixart", "dit")
def test_slicing_of_the_transformers_attention(client: Client) -> None:
    """By the modules' switch; other families' modules have no sliced attention that runs."""
    if client.level == "branches":
        return check_refused(client, slice_attention, "got SlicedAttnProcessor")
    latents = client.call(client.compiled())
    pipe = check_switched(client, slice_attention)
    assert relative_error(client.call(pipe), latents) < TOLERANCE


@over()
def test_sliced_decoding(client: Client) -> None:
    """Of three images one by one."""
    call = client.of(0, 1, 2) | {"output_type": "np"}
    whole = client.check(client.compiled(), **call)
    pipe = check_switched(client, lambda pipe: pipe.vae.enable_slicing(), **call)
    assert pipe.vae.use_slicing
    assert relative_error(client.call(pipe, **call), whole) < TOLERANCE


def tile(pipe: DiffusionPipeline) -> None:
    if hasattr(pipe.vae, "tile_sample_min_height"):
        pipe.vae.enable_tiling(8, 8, 8, 8)
    else:
        pipe.vae.enable_tiling()
        pipe.vae.tile_sample_min_size = pipe.vae.tile_latent_min_size = 4


@over()
def test_tiled_decoding(client: Client) -> None:
    whole = client.call(client.compiled(), output_type="np")
    pipe = check_switched(client, tile, output_type="np")
    assert relative_error(client.call(pipe, output_type="np"), whole) > TOLERANCE, "there are tiles"


def fuse(pipe: DiffusionPipeline) -> None:
    for name in ("transformer", "transformer_2"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).fuse_qkv_projections()


@over("pixart", "flux", "sd3", "qwen", "wan")
def test_fused_projections(client: Client) -> None:
    """DiT has no such switch; of SD3 diffusers' own fused attention leaves out norms, by hand too."""
    if (client.family, client.level) == ("pixart", "branches"):
        return check_refused(client, fuse, "got FusedAttnProcessor2_0")
    check_switched(client, fuse)


# ---- weights elsewhere


@over()
def test_model_offloading(client: Client) -> None:
    """In whichever order, twice; every part is brought as it is called, the denoisers at every call."""
    wanted = client.call(client.compiled())
    for compile_first in (True, False):
        pipe = client.made.make()
        kinds = {type(model).__name__ for model in denoisers(client, pipe)}
        steps: list[Change] = [client.compiled, offload]
        for do in steps if compile_first else reversed(steps):
            do(pipe)
        assert torch.equal(client.call(pipe), wanted)
        moved = offload(pipe)  # diffusers puts its hooks on anew after each call
        assert torch.equal(client.call(pipe), wanted)
        assert sum(moved.count(kind) for kind in kinds) == len(client.made.calls)
        pipe.remove_all_hooks()
        assert torch.equal(client.call(pipe), wanted)


def offload_layers(pipe: DiffusionPipeline) -> None:
    """As `enable_sequential_cpu_offload` with a device, which accelerate cannot be told is the CPU."""
    for part in parts(pipe):
        sequential(part)


@over(levels=FORWARD)
def test_sequential_offloading(client: Client) -> None:
    """A run leaves each weight where a plain pipeline's leaves it."""

    def where(pipe: DiffusionPipeline) -> dict[str, str]:
        models = enumerate(denoisers(client, pipe))
        return {f"{n}.{name}": p.device.type for n, model in models for name, p in model.named_parameters()}

    wanted, plain = client.call(client.compiled()), client.made.make()
    offload_layers(plain)
    client.call(plain)
    left = where(plain)
    assert "meta" in left.values()
    steps: list[Change] = [client.compiled, offload_layers]
    for order in (steps, steps[::-1]):
        pipe = client.made.make()
        for do in order:
            do(pipe)
        for _ in range(2):
            assert torch.equal(client.call(pipe), wanted)
            assert where(pipe) == left


GROUP = {
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaf": {"offload_type": "leaf_level"},
}


@over("pixart", "flux", "sd3", "qwen", "wan", levels=FORWARD)
@pytest.mark.parametrize("group", GROUP.values(), ids=GROUP)
def test_group_offloading(client: Client, group: dict[str, Any]) -> None:
    """DiT's class is said not to support it."""

    def offload_groups(pipe: DiffusionPipeline) -> None:
        pipe.enable_group_offload(CPU, CPU, **group, exclude_modules=["vae"])

    wanted = client.call(client.compiled())
    steps: list[Change] = [client.compiled, offload_groups]
    for order in (steps, steps[::-1]):
        pipe = client.made.make()
        for do in order:
            do(pipe)
        assert any(hasattr(module, "_diffusers_hook") for module in pipe.transformer.modules())
        for _ in range(2):
            assert torch.equal(client.call(pipe), wanted)


def cast_layers(pipe: DiffusionPipeline) -> None:
    pipe.to(dtype=torch.bfloat16)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)


@over(levels=FORWARD)
def test_layers_kept_in_eight_bits(client: Client) -> None:
    check_switched(client, cast_layers, 1e-3)


@over(levels=("branches",))
@pytest.mark.parametrize("switch", [offload_layers, cast_layers])
def test_hooks_on_layers_are_refused(client: Client, switch: Change) -> None:
    check_refused(client, switch, "no forward hooks, got some")
