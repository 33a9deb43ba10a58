"""flux-emoji: pictures from diffusers' own FluxPipeline, both of its contexts in every figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from torch import Tensor

import harmonica_rt as hrt
from bench import generate, run_latency
from bench.by_hand.block_reuse import by_hand
from bench.compare.comparison import Bench, Job
from bench.measure import costs, quality
from bench.models.flux_pipeline import PixelFluxPipeline, PixelVae
from bench.models.reference import load_pipeline, noise
from bench.models.schedule_specs import parse_schedule
from bench.peers import PEERS

from ..conftest import relative_error

STEPS = 6


@pytest.fixture(scope="module")
def flux() -> PixelFluxPipeline:
    return load_pipeline("flux-emoji")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Job("flux-emoji", steps=4, count=1, batch=1, rounds=1))


def sample(pipeline: PixelFluxPipeline, guidance: float = 4.0, count: int = 2, steps: int = STEPS) -> Tensor:
    call = {"num_inference_steps": steps, "latents": noise(pipeline, count), "output_type": "latent"}
    return pipeline(pipeline.examples(count), guidance, **call).images


def test_pictures_are_fluxpipelines_own(flux: PixelFluxPipeline) -> None:
    """With the stand-in autoencoder any FluxPipeline makes them in one call."""
    plain = FluxPipeline(flux.scheduler, PixelVae(), None, None, None, None, flux.transformer)
    plain.set_progress_bar_config(disable=True)
    prompts, start = flux.examples(2), noise(flux, 2)
    states, pooled = flux.features(prompts)
    empty, empty_pooled = flux.features([""] * 2)
    negative = {"negative_prompt_embeds": empty, "negative_pooled_prompt_embeds": empty_pooled}
    wanted = plain(
        prompt_embeds=states, pooled_prompt_embeds=pooled, **negative, true_cfg_scale=4.0, guidance_scale=1.0,
        height=32, width=32, num_inference_steps=3, latents=flux.packed(start), output_type="pt",
    ).images  # fmt: skip
    got = flux(prompts, num_inference_steps=3, latents=start, output_type="pt").images
    assert got.shape == (2, 3, 32, 32) and torch.equal(got, wanted)
    around = flux(prompts, num_inference_steps=3, latents=start, output_type="latent").images
    assert torch.allclose((around / 2 + 0.5).clamp(0, 1), wanted, atol=1e-6)
    assert not torch.allclose(got, flux(prompts, 1.0, num_inference_steps=3, latents=start, output_type="pt").images)


def test_pictures_show_their_prompts(flux: PixelFluxPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    (circle,) = flux("large red circle", generator=generator).images
    assert circle.size == (32, 32)
    (red, green, blue), corner = circle.getpixel((16, 16)), circle.getpixel((0, 0))
    assert red > 180 and max(green, blue) < 110 and min(corner) > 220


def test_latents_are_squares_of_pixels(flux: PixelFluxPipeline) -> None:
    pixels = noise(flux, 2)
    tokens = flux.packed(pixels)
    assert pixels.shape == (2, 3, 32, 32) and tokens.shape == (2, 64, 48)
    assert torch.equal(flux.pictures(tokens), pixels)
    states, pooled = flux.features(["egg", ""])
    mask = flux.prompts(["egg", ""])[1].bool()
    assert (states[~mask] == 0).all()
    assert torch.allclose(pooled[0], states[0][mask[0]].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "slots"),
    [
        ("blocks:2:1", 2 * 80 * 128),
        ("blocks:3:0:carry=0.5", 2 * 80 * 128),
        ("blocks:2:2:groups=4:carry=1", 2 * 3 * 8 * 80 * 128),
        ("output:2:1", 2 * 64 * 48),
    ],
)
def test_reuse_by_hand_in_both_contexts(flux: PixelFluxPipeline, spec: str, slots: int) -> None:
    """`slots`: floats that a context keeps of an image."""
    schedule = parse_schedule(spec, flux, STEPS)
    reuse = by_hand(flux.transformer, schedule)
    expected = sample(flux.around(reuse))
    assert reuse.steps == {"cond": STEPS, "uncond": STEPS}
    reused = int((~schedule.compute).sum())
    assert reuse.reused == 2 * reused and reuse.outputs_reused == 2 * schedule.output.sum()
    reuse.remove()
    fast = hrt.compile(flux.around(flux.transformer), schedule, backend="eager")
    assert relative_error(sample(fast), expected) < 2e-5  # forecasts of order 2 weigh rounding by 3, -3 and 1
    report = fast.transformer.report()
    assert [plan.context for plan in report.plans] == ["cond", "uncond"]
    assert costs.slot_bytes(report) == 2 * 2 * slots * 4
    assert costs.theoretical(report) == pytest.approx(report.plans[0].full_macs / report.plans[0].macs)
    assert relative_error(sample(fast, 1.0), sample(flux, 1.0)) > 1e-3


def test_without_guidance_there_is_one_context(flux: PixelFluxPipeline) -> None:
    fast = hrt.compile(flux.around(flux.transformer), parse_schedule("output:2", flux, STEPS), backend="eager")
    sample(fast, 1.0)
    assert [plan.context for plan in fast.transformer.report().plans] == ["cond"]


def test_run_latency(tmp_path: Path) -> None:
    arguments = ["--model", "flux-emoji", "--schedule", "blocks:2", "--steps", "4", "--rounds", "1"]
    arguments += ["--backend", "eager", "--no-compile", "--json", str(tmp_path / "r.json")]
    assert run_latency.main(arguments) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["layers"], result["size"], result["guidance"]) == (10, 32, 4.0)
    assert 1.9 < result["theoretical"] < 2
    _, naive, ours = result["rows"]
    assert ours["slot_bytes"] == 2 * 2 * 80 * 128 * 4 and naive["psnr"] == pytest.approx(ours["psnr"], abs=0.01)


def test_profile_wants_branches(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    arguments = ["--model", "flux-emoji", "--schedule", "output:2", "--profile", str(tmp_path / "p.png")]
    assert run_latency.main(arguments) == 2
    assert "expected a schedule of level branches, got one of level output" in capsys.readouterr().out


def test_run_quality() -> None:
    options = {"steps": 8, "count": 2, "seed": 0, "fewer": (4,), "model": "flux-emoji"}
    result = quality.measure(("full", "blocks:2:0"), **options)
    full, reused, fewer = result["rows"]
    assert full["worst"] > 90 and 15 < reused["mean"] < 60 and 10 < fewer["mean"] < 60
    assert (full["theoretical"], result["sampler"]) == (1.0, "FlowMatchEulerDiscreteScheduler")


def test_generate(tmp_path: Path) -> None:
    pipeline, job = generate.prepare("flux-emoji", "output:2", count=3, steps=2, shard=4, batch=2, backend="eager")
    generate.generate(pipeline, job, tmp_path)
    shard = load_file(tmp_path / "shard-00000.safetensors")
    assert shard["images"].shape == (3, 3, 32, 32) and shard["prompts"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("name", "cur"), [("output", 0.5), ("taylorseer", 0.25)])
def test_a_peers_point(bench: Bench, name: str, cur: float) -> None:
    row = bench.row(PEERS[name], PEERS[name].settings[0])
    assert row["error"] is None and row["drift"] < 1e-5 and 5 < row["psnr"] < 80
    assert row["cur"] == pytest.approx(cur)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("faster-cache", "FasterCache: expected both halves of guidance in one batch, got a call for each"),
        ("pyramid", "PyramidAttentionBroadcast: expected both halves of guidance in one batch, got a call for each"),
    ],
)
def test_who_cannot_take_it_says_so(bench: Bench, name: str, error: str) -> None:
    assert bench.row(PEERS[name], PEERS[name].settings[0])["error"].startswith(f"ValueError: {error}")


def test_stronger_samplers_run_by_a_flow_s_sigmas(bench: Bench) -> None:
    """At the sampler's own count of steps, its run is another than Euler's, and near it."""
    row = bench.row(PEERS["samplers"], PEERS["samplers"].settings[0])
    assert row["error"] is None and 5 < row["psnr"] < 80
