"""What is done to any model: modes, dtypes, autocast, copies, files, state dicts, at levels output and blocks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import harmonica_rt as hrt
from tests.conftest import assert_close, relative_error

from .made import (
    BLOCK_MODELS,
    MODELS,
    STEPS,
    WAYS,
    Sampler,
    check,
    check_follows,
    check_works,
    compiled,
    make_flux,
    over,
)
from .test_lora import HOW, latents, make_pipe

how = pytest.mark.parametrize(("build", "tolerance"), HOW.values(), ids=HOW)


@over(WAYS)
def test_modes(way: dict[str, Any]) -> None:
    fast, sampler = compiled(make_flux(), way), Sampler("flux")
    whole = sampler.run(fast)
    assert fast.eval() is fast
    with pytest.raises(RuntimeError, match=r"a compiled transformer samples only: train its \.model"):
        fast.train()
    fast.model.train()
    with pytest.raises(ValueError, match="eval mode, got model in training mode"):
        sampler.run(fast)
    fast.eval()
    assert_close(check(fast, sampler, way), whole, 0.0)
    fast.requires_grad_(False)
    assert not any(p.requires_grad for p in fast.parameters())
    assert_close(check(fast, sampler, way), whole, 0.0)


@over(WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*BLOCK_MODELS, "unet"])
def test_half_precision(name: str, dtype: torch.dtype, way: dict[str, Any]) -> None:
    if name == "unet" and way["level"] == "blocks":
        return
    fast = check_works(MODELS[name]().to(dtype), Sampler(name, dtype=dtype), way)
    assert Sampler(name, dtype=dtype).run(fast)[1].dtype is dtype


@over(WAYS)
@how
def test_cast_after(build: Any, tolerance: float, way: dict[str, Any]) -> None:
    fast = build(make_flux(), way)
    wanted = Sampler("flux").run(fast)
    fast.to(torch.bfloat16)
    got = check(fast, Sampler("flux", dtype=torch.bfloat16), way, tolerance)
    assert relative_error(got[1].float(), wanted[1]) < 0.1
    fast.float()
    check(fast, Sampler("flux"), way, tolerance)


@over(WAYS)
def test_cast_midway_cuts_the_run_short(way: dict[str, Any]) -> None:
    fast, sampler = compiled(make_flux(), way), Sampler("flux")
    sampler.call(fast, 0)
    fast.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="the run was cut short"):
        Sampler("flux", dtype=torch.bfloat16).call(fast, 1)
    check(fast, Sampler("flux", dtype=torch.bfloat16), way)


@over(WAYS)
@how
def test_autocast(build: Any, tolerance: float, way: dict[str, Any]) -> None:
    """A run in it and one without are two plans."""
    fast, sampler = build(make_flux(), way), Sampler("flux")
    plain = check(fast, sampler, way, tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        cast = check(fast, sampler, way, tolerance)
    assert 1e-4 < relative_error(cast[0].float(), plain[0].float()) < 0.1
    assert_close(check(fast, sampler, way, tolerance), plain, tolerance)


GRADIENTS: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enabled": torch.enable_grad,
}


@over(WAYS)
@how
@over(GRADIENTS, "mode")
def test_gradient_modes(build: Any, tolerance: float, way: dict[str, Any], mode: Any) -> None:
    """Runs in one mode after runs in another."""
    fast, sampler = build(make_flux(), way), Sampler("flux")
    wanted = sampler.run(fast)
    for _ in range(2):
        with mode():
            outputs = [sampler.call(fast, step) for step in range(STEPS)]
        assert not any(t.requires_grad for t in outputs)
        assert_close([t.clone() for t in outputs], wanted, tolerance)
        assert_close(sampler.run(fast), wanted, tolerance)
    sampler.samples[0].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="needs no gradient"):
        sampler.call(fast, 0)


@over(WAYS)
def test_inputs_and_weights_of_inference_mode(way: dict[str, Any]) -> None:
    with torch.inference_mode():
        model, sampler = make_flux(), Sampler("flux")
    check_works(model, sampler, way)


@over(WAYS)
@how
def test_copies(build: Any, tolerance: float, way: dict[str, Any]) -> None:
    fast, sampler = build(make_flux(), way), Sampler("flux")
    whole = sampler.run(fast)
    twin = copy.deepcopy(fast)
    twin._recorder = fast._recorder
    assert twin.model is not fast.model
    fast.model.proj_out.weight.data.mul_(2)
    assert_close(sampler.run(twin), whole, tolerance)
    check(fast, sampler, way, tolerance)


@over(WAYS)
@how
def test_a_state_dict_there_and_back(build: Any, tolerance: float, way: dict[str, Any]) -> None:
    fast, sampler = build(make_flux(), way), Sampler("flux")
    kept = {name: t.clone() for name, t in fast.state_dict().items()}
    assert kept.keys() == make_flux().state_dict().keys()
    other = {name: t + 0.05 for name, t in kept.items()}
    check_follows(fast, sampler, way, lambda: fast.load_state_dict(other), tolerance)
    check_follows(fast, sampler, way, lambda: fast.load_state_dict(kept, assign=True), tolerance)
    check_follows(fast, sampler, way, lambda: fast.model.load_state_dict(other), tolerance)


@over(WAYS)
def test_save_and_load(way: dict[str, Any], tmp_path: Path) -> None:
    fast, sampler = compiled(make_flux(), way), Sampler("flux")
    whole = sampler.run(fast)
    fast.save_pretrained(tmp_path / "model")
    fast.schedule.save(tmp_path / "s.json")
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "model")
    again = hrt.compile(model, hrt.Schedule.load(tmp_path / "s.json"))
    assert_close(sampler.run(again), whole, 0.0)
    pipe = make_pipe()
    hrt.compile(pipe, fast.schedule)
    wanted = latents(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    others = {name: None for name in pipe.config if name not in ("scheduler", "transformer")}
    loaded = type(pipe).from_pretrained(tmp_path / "pipe", **others)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents(hrt.compile(loaded, fast.schedule)), wanted)


@over(WAYS)
def test_hooks_of_torch_run_where_their_modules_do(way: dict[str, Any]) -> None:
    """Before and after compile, on a block, in one, and on all modules."""
    model, sampler, ran = make_flux(), Sampler("flux"), []
    model.transformer_blocks[0].register_forward_hook(lambda *_: ran.append("block"))
    fast = compiled(model, way)
    fast.single_transformer_blocks[1].attn.register_forward_pre_hook(lambda *_: ran.append("part"))
    fast.proj_out.register_forward_hook(lambda *_: ran.append("end"))
    sampler.run(fast)
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda module, *_: ran.append("all") if isinstance(module, FluxTransformer2DModel) else None
    )
    with contextlib.ExitStack() as stack:
        stack.callback(everywhere.remove)
        for step in range(STEPS):
            ran.clear()
            sampler.call(fast, step)
            computed, ends = step % 2 == 0, step % 2 == 0 or way["level"] == "blocks"
            own = ["block", "part"] * computed + ["end"] * ends
            assert [name for name in ran if name != "all"] == own, step
