"""What else conditions a call: IP-adapters, ControlNet residuals, skipped layers; given or dropped midway."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn

import harmonica_rt as hrt
from tests.conftest import assert_close

from .made import (
    BLOCK_WAYS,
    COMPUTED,
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
from .test_lora import HOW as BUILDS
from .test_lora import make_pipe

how = pytest.mark.parametrize(("build", "tolerance"), BUILDS.values(), ids=BUILDS)


# ---- IP-adapters


def with_ip_adapter() -> nn.Module:
    """As `load_ip_adapter` leaves a Flux: processors with weights of their own, and a projection of images."""
    model = make_flux()
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 8, num_tokens=(4,), scale=[1.0]))
    images = ImageProjection(cross_attention_dim=8, image_embed_dim=6, num_image_text_embeds=4)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([images])
    for name, parameter in model.named_parameters():
        if "ip_adapter" in name or "encoder_hid_proj" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def ip_images(pipe: FluxPipeline, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 5, 8, generator=generator), torch.randn(1, 6, generator=generator)
    image = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(seed))
    return pipe(
        prompt_embeds=embeds[0], pooled_prompt_embeds=embeds[1], height=64, width=64, num_inference_steps=STEPS,
        generator=generator, output_type="latent", ip_adapter_image_embeds=[image],
        negative_ip_adapter_image_embeds=[torch.zeros(1, 1, 6)],  # else an encoder makes them
    ).images  # fmt: skip


@over(WAYS)
def test_an_ip_adapter_of_a_pipeline(way: dict[str, Any]) -> None:
    pipe, plain = make_pipe(with_ip_adapter()), make_pipe(with_ip_adapter())
    schedule = hrt.Schedule.uniform(plain.transformer, STEPS, **way)
    full = hrt.compile(make_pipe(with_ip_adapter()), hrt.Schedule.full(plain.transformer, STEPS, **way))
    assert torch.equal(ip_images(full), ip_images(plain))
    hrt.compile(pipe, schedule)
    first = ip_images(pipe)
    assert not torch.equal(ip_images(pipe, seed=1), first)
    assert torch.equal(ip_images(pipe), first)
    pipe.set_ip_adapter_scale(0.2)
    plain.set_ip_adapter_scale(0.2)
    assert torch.equal(ip_images(pipe), ip_images(hrt.compile(plain, schedule)))
    assert not torch.equal(ip_images(pipe), first)


@over(WAYS)
@how
def test_an_ip_adapter_and_its_scale(build: Any, tolerance: float, way: dict[str, Any]) -> None:
    image = torch.randn(2, 1, 6)
    sampler = Sampler("flux", each=lambda _: {"joint_attention_kwargs": {"ip_adapter_image_embeds": [image]}})
    fast = build(with_ip_adapter(), way)
    check(fast, sampler, way, tolerance)

    def scale() -> None:
        for block in fast.transformer_blocks:
            block.attn.processor.scale = [0.1]

    check_follows(fast, sampler, way, scale, tolerance)


# ---- ControlNet


def residuals(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    double, single = ([torch.randn(2, 16, 32, generator=generator) for _ in range(count)] for count in (2, 3))
    return {"controlnet_block_samples": double, "controlnet_single_block_samples": single}


def unet_residuals(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    shapes = [(8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4)]
    down = tuple(torch.randn(2, *shape, generator=generator) for shape in shapes)
    middle = torch.randn(2, 16, 4, 4, generator=generator)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def dropped(given: Any, steps: Any) -> Any:
    return lambda step: given(step) if step in steps else {}


WHEN = {"always": range(STEPS), "dropped": range(3), "dropped where reused": range(1), "taken up": range(2, STEPS)}


@over(WAYS)
@how
@over(WHEN, "steps")
def test_controlnet_residuals(build: Any, tolerance: float, way: dict[str, Any], steps: Any) -> None:
    sampler = Sampler("flux", each=dropped(residuals, steps))
    fast = build(make_flux(), way)
    first = check(fast, sampler, way, tolerance)
    assert_close(check(fast, sampler, way, tolerance), first, tolerance)
    check(fast, Sampler("flux"), way, tolerance)
    check(fast, sampler, way, tolerance)


@over(WHEN, "steps")
def test_controlnet_residuals_of_a_unet(steps: Any) -> None:
    check_works(make_unet(), Sampler("unet", each=dropped(unet_residuals, steps)), WAYS["output"])


@over(WAYS)
def test_controlnet_residuals_of_an_sd3(way: dict[str, Any]) -> None:
    def given(step: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        return {"block_controlnet_hidden_states": [torch.randn(2, 16, 32, generator=generator) for _ in range(2)]}

    check_works(make_sd3(), Sampler("sd3", each=given), way)
    check_works(make_sd3(), Sampler("sd3", each=dropped(given, range(3))), way)


@over(BLOCK_WAYS)
def test_text_that_grows_midway_is_refused(way: dict[str, Any]) -> None:
    fast, sampler = compiled(make_flux(), way), Sampler("flux")
    sampler.call(fast, 0)
    sampler.fixed |= {"encoder_hidden_states": torch.randn(2, 7, 8), "txt_ids": torch.zeros(7, 3)}
    with pytest.raises(ValueError, match=r"has samples of .*\[2, 5, 8\].*, got .*\[2, 7, 8\]"):
        sampler.call(fast, 1)


class Joined(nn.Module):
    """Text that is optional, in one stream with the image."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor | None = None) -> Tensor:
        x = sample if text is None else torch.cat([text, sample], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, x.shape[1] - sample.shape[1] :]


def test_a_stream_that_an_argument_dropped_midway_shortens_is_refused() -> None:
    model = Joined().eval()
    fast = hrt.compile(model, hrt.Schedule.uniform(model, STEPS, level="blocks"))
    x, text = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    for step in (1, 2):  # reused, computed
        fast.reset()
        for before in range(step):
            fast(x, torch.tensor(9.0 - before), text)
        with pytest.raises(ValueError, match=r"expected .*\[2, 8, 4\] float32 .*, got .*\[2, 3, 4\] float32"):
            fast(x, torch.tensor(9.0 - step))


# ---- skipped layers


@over(WAYS)
@how
def test_layers_skipped_at_every_step(build: Any, tolerance: float, way: dict[str, Any]) -> None:
    sampler = Sampler("sd3", each=lambda _: {"skip_layers": [1, 3]})
    fast = build(make_sd3(), way)
    check(fast, sampler, way, tolerance)
    check(fast, sampler, way, tolerance)


@over(WAYS)
def test_layers_skipped_in_a_context_of_their_own(way: dict[str, Any]) -> None:
    """Skip-layer guidance: one more call of each step."""
    model, plain, skipping = make_sd3(), Sampler("sd3"), Sampler("sd3", each=lambda _: {"skip_layers": [1, 2]})
    fast = compiled(model, way)
    wanted = [sampler.run(compiled(model, way)) for sampler in (plain, skipping)]
    for named in (True, False):
        got: list[list[Tensor]] = [[], []]
        for step in range(STEPS):
            for outputs, sampler, name in zip(got, (plain, skipping), ("cond", "skip")):
                if named:
                    with fast.cache_context(name), torch.no_grad():
                        outputs.append(sampler.call(fast, step))
                else:
                    outputs.append(sampler.call(fast, step).detach())
        for own, want in zip(got, wanted):
            assert_close(own, want, 0.0)


@over(BLOCK_WAYS)
def test_layers_skipped_from_some_step_on_are_refused(way: dict[str, Any]) -> None:
    """Level output takes it."""
    sampler = Sampler("sd3", each=lambda step: {"skip_layers": [1, 2]} if step > 1 else {})
    with pytest.raises(ValueError, match=r"calls of its blocks as at the first call, got .*level 'output' takes"):
        sampler.run(compiled(make_sd3(), way))
    outputs = sampler.run(compiled(make_sd3(), WAYS["output"]))
    plain = sampler.run(make_sd3())
    assert_close([outputs[step] for step in COMPUTED], [plain[step] for step in COMPUTED], 0.0)


def sd3_images(pipe: StableDiffusion3Pipeline, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    text = [torch.randn(1, 5, 12, generator=generator) for _ in range(2)]
    pooled = [torch.randn(1, 6, generator=generator) for _ in range(2)]
    return pipe(
        prompt_embeds=text[0], negative_prompt_embeds=text[1], pooled_prompt_embeds=pooled[0],
        negative_pooled_prompt_embeds=pooled[1], height=64, width=64, num_inference_steps=STEPS, guidance_scale=4.0,
        generator=generator, output_type="latent", **options,
    ).images  # fmt: skip


@over(WAYS)
def test_skip_layer_guidance_of_a_pipeline(way: dict[str, Any]) -> None:
    """Its calls are told apart without names: another batch, no guidance, fewer layers."""

    def pipe() -> StableDiffusion3Pipeline:
        made = StableDiffusion3Pipeline(
            make_sd3(), FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, None, None
        )
        made.set_progress_bar_config(disable=True)
        return made

    guidance = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.7}
    full = hrt.compile(pipe(), hrt.Schedule.full(make_sd3(), STEPS, **way))
    assert torch.equal(sd3_images(full, **guidance), sd3_images(pipe(), **guidance))
    fast = hrt.compile(pipe(), hrt.Schedule.uniform(make_sd3(), STEPS, **way))
    first = sd3_images(fast, **guidance)
    assert torch.equal(sd3_images(fast, **guidance), first)
    assert not torch.equal(first, sd3_images(pipe(), **guidance))
    assert torch.equal(sd3_images(fast), sd3_images(hrt.compile(pipe(), fast.transformer.schedule)))
