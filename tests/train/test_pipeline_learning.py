"""Learning through pipelines: it is better than the forecast, meets its target, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    ChromaPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FluxImg2ImgPipeline,
)
from PIL import Image

import harmonica_rt as hrt
from harmonica_rt.generating import Generation
from harmonica_rt.schedule import Schedule
from harmonica_rt.train import converged
from harmonica_rt.train import learn as learning
from harmonica_rt.train.budget import Costs
from harmonica_rt.train.contexts import every
from harmonica_rt.train.pipeline import own_captions
from harmonica_rt.train.pipeline_task import MET, PipelineTask
from harmonica_rt.train.sampled import Sampled
from harmonica_rt.train.weights import VALIDATION_SEED, WeightTrainer

from ..pipelines.folders import (
    labelled_dit,
    t5,
    t5_tokenizer,
    text_flux,
)
from ..pipelines.images import chroma
from ..pipelines.parts import quiet
from .commands import refused, run, succeeded
from .pipeline_cases import CALLS, SMALL, STEPS, generation_of, latents, relative

HELD_OUT = 4


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "TRIAL", 3)
    monkeypatch.setattr(PipelineTask, "held_out", HELD_OUT)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("level", ["auto", "output"])
def test_learning_is_better_than_the_forecast_and_leaves_the_pipeline_alone(level: str) -> None:
    make, call = CALLS["flux"]
    pipeline = make()
    before, encoded = dict(vars(pipeline)), []
    encode = pipeline.text_encoder.forward
    pipeline.text_encoder.forward = lambda *args, **kwargs: encoded.append(1) or encode(*args, **kwargs)
    wanted = [p.requires_grad for p in pipeline.transformer.parameters()]
    better: list[Schedule] = []
    schedule = hrt.learn(
        pipeline, ["a cat", "red fox"], target_speedup=1.5, level=level, iterations=12, batch=2, validation=2,
        on_better=better.append, num_inference_steps=STEPS, **call,
    )  # fmt: skip
    found = re.search(r"([\d.-]+) dB SNR to the full run .* the forecast ([\d.-]+);", schedule.note)
    reached, forecast = map(float, found.groups())
    assert reached > forecast + 0.5 and better and schedule.learned
    assert schedule.level == ("blocks", "output")[level != "auto"]
    assert {k: v for k, v in vars(pipeline).items() if k in before and v is not before[k]}.keys() <= {
        "_guidance_scale", "_num_timesteps", "_current_timestep", "_joint_attention_kwargs", "_interrupt",
    }  # fmt: skip
    assert [p.requires_grad for p in pipeline.transformer.parameters()] == wanted
    assert not any(p.grad is not None for p in pipeline.transformer.parameters())
    assert pipeline(["a cat"], num_inference_steps=2, output_type="latent", **call)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("help_", [True, False])
def test_weights_per_channel_are_learned_where_they_help(help_: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is held out, after as many iterations of the first start with them as without."""
    make, call = CALLS["flux"]
    seen: list[tuple[str, bool]] = []
    run = WeightTrainer.run

    def spied(trainer: WeightTrainer, *args: Any) -> Any:
        result = run(trainer, *args)
        seen.append((trainer.weights.schedules.compute.tobytes(), trainer.settings.channels))
        worse = 0.0 if trainer.settings.channels == help_ else 100.0
        trainer.best = dataclasses.replace(trainer.best, errors=trainer.best.errors + worse)
        return result

    monkeypatch.setattr(WeightTrainer, "run", spied)
    options = {"iterations": 2, "batch": 2, "validation": 2, "num_inference_steps": STEPS, **call}
    hrt.learn(make(), ["a cat"], target_speedup=1.5, **options)
    assert [channels for _, channels in seen[:2]] == [True, False] and seen[0][0] == seen[1][0]
    assert all(channels == help_ for _, channels in seen[2:]) and len(seen) > 2
    seen.clear()
    hrt.learn(make(), ["a cat"], target_speedup=1.5, channels=True, **options)
    assert all(channels for _, channels in seen)


def test_prompts_are_encoded_once() -> None:
    generation, calls = generation_of("flux"), []
    encoder = generation.pipeline.text_encoder
    encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    sampled = Sampled(generation.pipeline)
    with sampled.ready():
        for _ in range(3):
            sampled.run(generation, [0, 1])
    assert len(calls) == 2  # prompts and the negative one


def test_a_pipeline_in_use_is_refused_and_what_it_does_not_take() -> None:
    pipeline = text_flux()
    with pytest.raises(TypeError, match="guidance: FluxPipeline takes no such argument"):
        hrt.learn(pipeline, ["a cat"], guidance=3.0)
    with pytest.raises(ValueError, match=r"target speed-up: expected 1.00 to .* for 6 steps, got 9"):
        hrt.learn(pipeline, ["a cat"], target_speedup=9, num_inference_steps=STEPS, **SMALL)
    with pytest.raises(ValueError, match="channels: expected False at level output, got True"):
        hrt.learn(
            pipeline, ["a cat"], target_speedup=2, level="output", channels=True, num_inference_steps=STEPS, **SMALL
        )
    assert type(pipeline.transformer).__name__ == "FluxTransformer2DModel" and pipeline.vae.__class__ is not None
    hrt.compile(pipeline, Schedule.uniform(pipeline.transformer, STEPS))
    with pytest.raises(
        ValueError, match="expected one that is not compiled, got a compiled transformer: uncompile it first"
    ):
        hrt.learn(pipeline, ["a cat"])


def test_contexts_that_have_no_weights_of_their_own_are_refused() -> None:
    def refused(pipeline: Any, error: str, contexts: str = "own", **call: Any) -> None:
        with pytest.raises(ValueError, match=error):
            hrt.learn(pipeline, call.pop("prompts", ["a cat"]), target_speedup=1.5, contexts=contexts, **call)

    small = {"num_inference_steps": STEPS, **SMALL}
    once = "contexts: expected 'shared' where {} calls its denoiser once a step .*, got 'own'"
    refused(text_flux(), once.format("FluxPipeline"), **small)
    refused(labelled_dit(), once.format("DiTPipeline"), prompts=[0], num_inference_steps=STEPS, guidance_scale=3.0)
    own = {"text_encoder": t5(), "tokenizer": t5_tokenizer()}
    unnamed = ChromaPipeline(**chroma().components | own)
    error = r"contexts: expected 'shared' for ChromaPipeline, which does not name all its 2 calls of a step, got 'own'"
    refused(unnamed, error, level="output", negative_prompt="", guidance_scale=3.0, **small)
    refused(text_flux(), r"contexts: expected one of \('shared', 'own'\), got 'both'", contexts="both", **small)


@pytest.mark.usefixtures("short")
def test_groups_that_cannot_carry_learn_weights_alone() -> None:
    """Chroma's last blocks return text and image as one stream, which no block takes at first."""
    pipeline = ChromaPipeline(**chroma().components | {"text_encoder": t5(), "tokenizer": t5_tokenizer()})
    options = {"iterations": 2, "batch": 2, "validation": 2, "num_inference_steps": STEPS, **SMALL}
    schedule = hrt.learn(pipeline, ["a cat"], target_speedup=1.5, **options)
    assert schedule.level == "blocks" and not schedule.carry.any()


def test_captions_of_our_own() -> None:
    captions = own_captions()
    assert len(captions) == len(set(captions)) == 200 and all(3 <= len(caption.split()) <= 16 for caption in captions)


def test_whole_steps_meet_the_target() -> None:
    generation = generation_of("dit")
    sampled = Sampled(generation.pipeline)
    with sampled.ready():
        task = PipelineTask(sampled, generation, "blocks")
        for speedup in (1.0, 1.5, 2.0, 3.0):
            chosen = task.spread(speedup)
            least = MET * speedup
            assert task.speedup(len(chosen)) >= least and (
                len(chosen) == STEPS or task.speedup(len(chosen) + 1) < least
            )
            schedule = task.schedule(chosen, 1)
            hrt.compile(sampled.pipeline, schedule, backend="eager")
            latents(sampled, generation.arguments([0]))
            plan = sampled.pipeline.transformer.report().plans[0]
            assert plan.full_macs / plan.macs == pytest.approx(task.speedup(len(chosen)))
            hrt.uncompile(sampled.pipeline)
        assert task.spreads(1.5) == [(0, 2, 4), (0, 3, 5)], "even, and with falling gaps"
        task.costs = Costs(np.array([0.995]), 0.005)
        assert task.spread(2.0) == [0, 2, 4], "half of the steps, though a model's ends take 2x to 1.99x"


def test_a_second_denoiser_s_first_step_is_within_the_target() -> None:
    generation = generation_of("wan")
    sampled = Sampled(generation.pipeline)
    with sampled.ready():
        task = PipelineTask(sampled, generation, "output")
        assert task.entered and not {*task.entered} & {0, 2, 4}, "between evenly spread steps"
        for speedup, count in ((1.0, 6), (1.5, 4), (2.0, 3), (3.0, 2)):
            for power in (1.0, 0.65):
                chosen = task.spread(speedup, power)
                assert len(chosen) <= count and {0, *task.entered} <= {*chosen}
                assert np.flatnonzero(~task.schedule(chosen, 1).output).tolist() == chosen
        with pytest.raises(ValueError, match=r"target speed-up: expected 1\.00 to 3\.00 for 6 steps, got 6"):
            task.spread(6.0)


@pytest.mark.parametrize("name", ["flux", "wan", "dit"])
def test_the_converged_run_has_more_steps_and_leaves_the_sampler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the limit the run itself comes there: its error falls as its steps grow."""
    monkeypatch.setattr(converged, "STEPS", 24)
    monkeypatch.setattr(converged, "FLOW_STEPS", 24)
    generation = generation_of(name)
    sampled = Sampled(generation.pipeline)
    with sampled.ready():
        scheduler = sampled.pipeline.scheduler
        aim = sampled.converged(generation, [0])
        assert sampled.pipeline.scheduler is scheduler and generation.steps == STEPS
        errors = [relative(sampled.run(generation.with_call(num_inference_steps=n), [0]), aim) for n in (STEPS, 16)]
        assert errors[1] < errors[0]
        for own in ("timesteps", "sigmas"):
            with pytest.raises(ValueError, match=f"target converged: expected a call without {own}, got"):
                sampled.converged(generation.with_call(**{own: [1.0, 0.5]}), [0])
        with pytest.raises(ValueError, match=r"expected a call without noise, eta 0, got eta=0\.5"):
            sampled.converged(generation.with_call(eta=0.5), [0])
        sampled.pipeline.scheduler = DDIMScheduler(clip_sample=True)
        with pytest.raises(ValueError, match="a sampler that does not clip, got DDIMScheduler with clip_sample=True"):
            sampled.converged(generation, [0])
        sampled.pipeline.scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
        with pytest.raises(ValueError, match=r"got DPMSolverMultistepScheduler with sde-dpmsolver\+\+"):
            sampled.converged(generation, [0])
        sampled.pipeline.scheduler = DDPMScheduler()
        with pytest.raises(ValueError, match=r"a deterministic sampler of .*got DDPMSched"):
            sampled.converged(generation, [0])


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("contexts", ["shared", "own"])
def test_going_on_from_a_schedule(contexts: str) -> None:
    """What it computes stays, in parts too; its weights are where the learning starts."""
    make, call = CALLS["flux"]
    common = {"iterations": 1, "batch": 2, "validation": 2, "num_inference_steps": STEPS, **call}
    pipeline, prompts = make(), ["a cat", "red fox"]
    first = hrt.learn(pipeline, prompts, level="branches", contexts=contexts, channels=False, **common)
    own = every(first)[0]
    compute = own.compute.copy()
    compute[2, :1] = ~compute[2, :1]
    spoilt = own.replace(compute=compute, weights=None).replace(note="before")
    init = dict.fromkeys(first, spoilt) if contexts == "own" else spoilt
    if contexts == "own":
        init["uncond"] = own.replace(note="before")
    again = hrt.learn(pipeline, prompts, init=init, lr=1e-9, target="full", **common)
    for one, was in zip(every(again), every(init), strict=True):
        assert (one.compute == was.compute).all() and np.allclose(one.weights, was.weights, atol=1e-5)
        assert (", 1 in parts, " in one.note) == (was is spoilt) and "before" not in one.note
    for wrong, text in (
        ({"init": init, "target_speedup": 2.0}, "target_speedup: expected None beside init, got 2.0"),
        ({"init": init, "level": "output"}, "level: expected branches beside init, got output"),
        ({"init": init, "order": 0}, "order: expected 2 beside init, got 0"),
        ({"init": own.replace(sampler="DDIMScheduler")}, "schedule with sampler FlowMatchEuler.*, got DDIM"),
        ({"init": {"cond": own}}, "init: expected schedules of contexts .*'cond', 'uncond'.*, got .'cond'"),
        ({"target": "real"}, "target: expected one of .*, got 'real'"),
    ):
        with pytest.raises(ValueError, match=text):
            hrt.learn(pipeline, prompts, **wrong, **common)


@pytest.mark.usefixtures("short")
def test_learning_towards_the_converged_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converged, "FLOW_STEPS", 12)
    make, call = CALLS["flux"]
    common = {"batch": 2, "validation": 2, "num_inference_steps": STEPS, **call}
    schedule = hrt.learn(make(), ["a cat", "red fox"], target="converged", target_speedup=1.5, iterations=12, **common)
    reached, full, forecast = re.search(
        r"([\d.-]+) dB SNR to the converged run \(full run ([\d.-]+)\) on 4 .* forecast ([\d.-]+)", schedule.note
    ).groups()
    assert float(reached) > float(forecast) and math.isfinite(float(full))


@pytest.mark.usefixtures("short")
def test_learning_towards_the_converged_run_of_a_sampler_that_keeps_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan's UniPC keeps outputs of the run before, with their gradients."""
    monkeypatch.setattr(converged, "STEPS", 8)
    make, call = CALLS["wan"]
    common = {"batch": 2, "validation": 2, "num_inference_steps": STEPS, "level": "output", **call}
    schedule = hrt.learn(make(), ["a cat", "red fox"], target="converged", target_speedup=1.5, iterations=2, **common)
    assert "dB SNR to the converged run" in schedule.note


def test_a_converged_run_starts_where_a_strength_s_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converged, "FLOW_STEPS", 24)
    pipeline = quiet(FluxImg2ImgPipeline(**text_flux().components))
    call = {"image": torch.zeros(1, 3, 16, 16), "height": 16, "width": 16, "max_sequence_length": 8}
    for strength, error in (
        (0.5, None),
        (0.6, "start where the run does.* a strength of whole steps, got 0.6"),
    ):
        generation = Generation(pipeline, ["a cat"], num_inference_steps=6, strength=strength, **call)
        sampled = Sampled(pipeline)
        with sampled.ready(), pytest.raises(ValueError, match=error) if error else nullcontext():
            assert sampled.converged(generation, [0]).isfinite().all()


@pytest.mark.usefixtures("short")
def test_qwen_at_branches_says_what_to_do_about_padded_prompts() -> None:
    make, call = CALLS["qwen"]
    arguments = {
        "level": "branches",
        "target_speedup": 2,
        "iterations": 1,
        "validation": 2,
        "num_inference_steps": STEPS,
    }
    with pytest.raises(ValueError, match=r"mask: expected none .*one prompt a call .*--batch 4 --accumulate 4"):
        hrt.learn(make(), ["a cat", "red fox"], batch=2, **arguments, **call)
    assert hrt.learn(make(), ["a cat", "red fox"], batch=2, accumulate=2, **arguments, **call).level == "branches"


@pytest.mark.usefixtures("short")
def test_from_the_command_line(tmp_path: Path) -> None:
    folder, prompts = tmp_path / "flux", tmp_path / "prompts.txt"
    text_flux().save_pretrained(folder)
    prompts.write_text("a cat\nred fox\n\nold house\n")
    common = ("learn", "--pipeline", folder, "--prompts", prompts, "--steps", STEPS, "--height", 16, "--width", 16)
    common += ("--target-speedup", 1.5, "--iterations", 2, "--batch", 2)
    for name, channels in (("s.json", "auto"), ("s.safetensors", "yes")):
        out = tmp_path / name
        said = " ".join(succeeded(run(*common, "--out", out, "--channels", channels)).split())
        assert f"dB SNR to the full run on {HELD_OUT} noises held out" in said
        assert re.search(r"[34] of 6 steps computed, 1\.\d\dx in theory; learned on the end error", said)
        schedule = Schedule.load(out)
        assert schedule.level == "blocks" and schedule.steps == STEPS and np.isfinite(schedule.weights).all()
        assert (schedule.channels is not None) == (name == "s.safetensors")
    plain = tmp_path / "plain.safetensors"
    succeeded(run(*common, "--out", plain, "--channels", "no"))
    assert Schedule.load(plain).channels is None
    refused(
        run(*common, "--out", tmp_path / "s.json", "--channels", "yes"), "--channels yes: expected a .safetensors file"
    )
    going_on = common[: common.index("--target-speedup")]
    going_on += ("--iterations", 1, "--batch", 2, "--out", tmp_path / "more.json")
    succeeded(run(*going_on, "--init", tmp_path / "s.json", "--target", "full"))
    assert Schedule.load(tmp_path / "more.json").compute.tolist() == Schedule.load(tmp_path / "s.json").compute.tolist()
    refused(run(*going_on, "--init", "nowhere.json"), "--init: expected a schedule file, or cond=FILE,uncond=FILE, got")
    own = ("--contexts", "own")
    refused(run(*common, "--out", out, *own), "contexts: expected 'shared' where FluxPipeline calls its denoiser once")
    assert "Missing option '--pipeline'" in click.unstyle(run("learn", "--out", out).stderr)
    refused(run(*common, "--out", out, "--call", "nonsense=1"), "nonsense: FluxPipeline takes no such argument")
    refused(run("learn", "--pipeline", tmp_path / "none", "--out", out), "expected a folder or a hub name")


@pytest.mark.usefixtures("short")
def test_own_weights_of_contexts_from_the_command_line(tmp_path: Path) -> None:
    folder, prompts, out = tmp_path / "flux", tmp_path / "prompts.txt", tmp_path / "mine.safetensors"
    text_flux().save_pretrained(folder)
    prompts.write_text("a cat\nred fox\n")
    call = ("--pipeline", folder, "--prompts", prompts, "--height", 16, "--width", 16, "--true-cfg", 3)
    call += ("--negative-prompt", "bad")
    text = succeeded(
        run(
            "learn", *call, "--steps", STEPS, "--target-speedup", 1.5, "--iterations", 4, "--batch", 2,
            "--contexts", "own", "--channels", "yes", "--out", out,
        )
    )  # fmt: skip
    files = {name: tmp_path / f"mine-{name}.safetensors" for name in ("cond", "uncond")}
    assert not out.exists() and all(f"wrote {file}" in text for file in files.values())
    cond, uncond = map(Schedule.load, files.values())
    assert cond != uncond and (cond.compute == uncond.compute).all() and cond.learned and uncond.learned
    assert uncond.note.endswith("; own weights of context uncond, of cond and uncond")
    pair, tried = ",".join(f"{name}={file}" for name, file in files.items()), tmp_path / "tried"
    succeeded(run("try", *call, "--schedule", pair, "--schedule", files["cond"], "--rounds", 1, "--out", tried))
    rows = json.loads((tried / "figures.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["full run", "mine", "mine-cond"]
    assert rows[1]["psnr"] != rows[2]["psnr"]
    loaded = ", ".join(f'"{name}": hrt.Schedule.load("{file.name}")' for name, file in files.items())
    assert f"hrt.compile(pipe, {{{loaded}}})" in html.unescape((tried / "index.html").read_text())
    refused(run("try", *call, "--schedule", f"cond={out},uncond={out}", "--out", tried), "a schedule file for cond")


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (16, 16), (25 * i, 90, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"wall {'abcdefgh'[i]}")
    return folder


def test_pictures_stay_with_their_captions(tmp_path: Path) -> None:
    """Those held out, too."""
    inputs = pictures(tmp_path / "inputs", 8)
    generation = Generation(text_flux(FluxImg2ImgPipeline), inputs=inputs, num_inference_steps=STEPS, **SMALL)
    sampled = Sampled(generation.pipeline)
    with sampled.ready():
        task = PipelineTask(sampled, generation, "output")
        for seed, count in ((0, 6), (VALIDATION_SEED, 2)):
            chosen = task.starts("full", count, seed).generation
            assert len({*chosen.subjects}) == count
            for caption, picture in zip(chosen.subjects, chosen.images, strict=True):
                assert picture.with_suffix(".txt").read_text() == caption
            given = chosen.arguments([1])
            assert given["image"][0].getpixel((0, 0))[0] == 25 * "abcdefgh".index(given["prompt"][0][-1])


@pytest.mark.usefixtures("short")
def test_pipelines_that_start_from_a_picture(tmp_path: Path) -> None:
    inputs, folder, out = pictures(tmp_path / "inputs", 2), tmp_path / "pipeline", tmp_path / "s.json"
    text_flux(FluxImg2ImgPipeline).save_pretrained(folder)
    common = ("--pipeline", folder, "--steps", STEPS, "--height", 16, "--width", 16)
    learn = ("learn", *common, "--target-speedup", 1.5, "--iterations", 1, "--batch", 2, "--out", out)
    succeeded(run(*learn, "--inputs", inputs))
    missing = "FluxImg2ImgPipeline takes an image: expected a folder of pictures and captions (--inputs), got none"
    refused(run(*learn), missing)
    attempt = ("try", *common, "--schedule", out, "--out", tmp_path / "out")
    succeeded(run(*attempt, "--inputs", inputs, "--rounds", 1))
    (tmp_path / "prompts.txt").write_text("a cat")
    refused(run(*attempt, "--prompts", tmp_path / "prompts.txt"), missing)


def test_accelerator_of_one_process_judges_all() -> None:
    generation = generation_of("dit")
    sampled = Sampled(generation.pipeline)
    with sampled.ready():
        task = PipelineTask(sampled, generation, "output", size=2)
        starts = task.starts("full", 3, 1)
        errors = starts.judge(task.schedule([0, 1, 2, 3, 4, 5], 0), Accelerator(cpu=True))
    assert len(errors) == 3 and (errors < -100).all()  # nothing reused: the same run
