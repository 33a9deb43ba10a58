"""Schedules compared on whole pipelines, with text encoders and autoencoders, of images and of videos."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.generating import Generation
from harmonica_rt.pictures import psnr_of, samples_of, ssim_of

from .pipelines.folders import labelled_dit, text_flux, text_pixart, text_wan
from .pipelines.images import sd3

STEPS = 6
SMALL = {"num_inference_steps": STEPS, "height": 16, "width": 16, "max_sequence_length": 16}
CLIP = {"num_inference_steps": STEPS, "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
EAGER = {"backend": "eager"}
PROMPTS = ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("make", "prompts", "call", "specs"),
    [
        (text_flux, PROMPTS, SMALL, ("uniform:2", "branches:2", "blocks:3:carry=0.5", "output:3")),
        (text_pixart, PROMPTS, SMALL | {"use_resolution_binning": False, "clean_caption": False}, ("uniform:2",)),
        (labelled_dit, [1, "tench"], {"num_inference_steps": STEPS}, ("trunk:2", "output:2")),
        (text_wan, PROMPTS, CLIP | {"negative_prompt": "bad"}, ("uniform:2", "output:3")),
    ],
    ids=["flux", "pixart", "dit", "wan, two denoisers"],
)
def test_figures_are_those_of_runs_by_hand(make, prompts, call, specs) -> None:
    pipe = make()
    denoisers = dict(pipe.components)
    compared = hrt.compare(pipe, specs, prompts, **EAGER, **call)
    assert [row.name for row in compared.rows] == ["full run", *specs]
    assert all(pipe.components[name] is part for name, part in denoisers.items())
    generation = Generation(pipe, prompts, **call)
    full = [samples_of(generation.generation([n], output_type="np"))[0] for n in range(2)]
    own = hrt.compile(pipe, compared.schedules[specs[-1]], backend="eager")
    own = [samples_of(generation.generation([n], output_type="np"))[0] for n in range(2)]
    theory = pipe.transformer.report().plans
    last, figures = compared.rows[-1], compared.figures()
    for number in range(2):
        assert last.quality[number]["psnr"] == pytest.approx(psnr_of(own[number], full[number]), abs=0.01)
        assert last.quality[number]["ssim"] == pytest.approx(ssim_of(own[number], full[number]), abs=1e-5)
        assert 10 < last.quality[number]["psnr"] < 100
    assert figures[-1]["psnr_worst"] == min(quality["psnr"] for quality in last.quality.values())
    assert figures[-1]["theory"] == pytest.approx(theory[0].full_macs / theory[0].macs, rel=1e-6)
    for row, own in zip(compared.rows[1:], figures[1:]):
        ratios = [compared.full.seconds[at] / row.seconds[at] for at in row.seconds]
        assert own["calls"] == len(row.seconds) == 4  # two passes make at least 3
        assert own["speedup"] == pytest.approx(np.median(ratios))
        assert own["realised"] == pytest.approx(own["speedup"] / own["theory"])
        assert own["slots"] > 0 and own["peak_mib"] > 50 and own["backend"] == "eager"
        assert row.first_call > 0 and own["step_ms"] == pytest.approx(1e3 * np.median([*row.seconds.values()]) / STEPS)


def test_a_full_schedule_makes_the_same_images() -> None:
    compared = hrt.compare(text_flux(), ["full"], ["a cat"], rounds=1, **EAGER, **SMALL)
    assert compared.figures()[1]["psnr"] > 100 and compared.figures()[1]["theory"] == 1.0


def test_several_images_a_prompt() -> None:
    compared = hrt.compare(text_flux(), "output:2", PROMPTS, rounds=1, num_images_per_prompt=2, **EAGER, **SMALL)
    row = compared.rows[1]
    assert row.images == 2 and len(row.seconds) == 2
    assert compared.figures()[1]["seconds"] == pytest.approx(np.median([*row.seconds.values()]) / 2)


def test_schedules_for_contexts_and_from_files(tmp_path: Path) -> None:
    pipe = text_wan()
    own = Schedule.uniform(pipe.transformer, STEPS, 3, level="output")
    own.save(tmp_path / "mine.json")
    both = {"cond": own, "uncond": own.replace(output=np.arange(STEPS) % 2 > 0)}
    given = {"by context": both, "file": tmp_path / "mine.json"}
    call = {k: v for k, v in CLIP.items() if k != "num_inference_steps"}  # the files'
    compared = hrt.compare(pipe, given, ["a cat"], rounds=1, **EAGER, **call)
    assert compared.steps == STEPS
    assert compared.save(tmp_path)[4:] == ["by-context-cond.json", "by-context-uncond.json", "file.json"]
    assert Schedule.load(tmp_path / "by-context-uncond.json") == both["uncond"]


@pytest.mark.parametrize(
    ("schedules", "more", "error"),
    [
        (["uniform:2", "blocks"], {}, "expected full, uniform:N.* got 'blocks'"),
        ([], {}, "schedules: expected at least one, got none"),
        (["uniform:2"], {"rounds": 0}, "rounds: expected a positive integer, got 0"),
        (["uniform:2"], {"backend": "x"}, "backend: expected one of"),
        (["uniform:2"], {"num_frames": 3}, "num_frames: FluxPipeline takes no such argument"),
        (["short"], {}, "short: expected a schedule of 6 steps, as many as the call makes, got 4; schedule.between"),
        (["other"], {}, r"uniform, every 2: .* model expected FluxTransformer2DModel, got DiTT"),
    ],
    ids=str,
)
def test_refused_before_anything_runs(schedules, more, error) -> None:
    pipe, calls = text_flux(), []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    files = {
        "short": Schedule.uniform(pipe.transformer, 4, note="short"),
        "other": Schedule.uniform(labelled_dit().transformer, STEPS),
    }
    wanted = [files.get(name, name) for name in schedules]
    with pytest.raises((ValueError, TypeError), match=error):
        hrt.compare(pipe, wanted, PROMPTS, **{**EAGER, **SMALL, **more})
    assert not calls and type(pipe.transformer).__name__ == "FluxTransformer2DModel"


def test_a_compiled_pipeline_is_refused() -> None:
    pipe = text_flux()
    hrt.compile(pipe, Schedule.uniform(pipe.transformer, STEPS), backend="eager")
    with pytest.raises(ValueError, match="expected the pipeline as it came, got a compiled one"):
        hrt.compare(pipe, ["uniform:2"], PROMPTS, **SMALL)


def test_an_error_midway_leaves_the_pipeline_as_it_was(monkeypatch) -> None:
    pipe = text_flux()
    model, decoded, decode = pipe.transformer, [], pipe.vae.decode

    def fail(*args, **kwargs):
        decoded.append(1)
        if len(decoded) == 3:
            raise RuntimeError("the decoder broke")
        return decode(*args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", fail)
    with pytest.raises(RuntimeError, match="the decoder broke"):
        hrt.compare(pipe, ["uniform:2"], PROMPTS, **EAGER, **SMALL)
    assert pipe.transformer is model


def test_what_fails_at_its_first_call_is_a_row_that_says_so(monkeypatch) -> None:
    pipe = text_flux()
    forward = hrt.CompiledTransformer._forward

    def small(self, *args, **kwargs):
        if self.schedule.level == "blocks":
            raise torch.OutOfMemoryError("expected 80 GB")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(hrt.CompiledTransformer, "_forward", small)
    compared = hrt.compare(pipe, ["blocks:2", "output:2"], ["a cat"], rounds=1, **EAGER, **SMALL)
    assert "blocks:2: OutOfMemoryError: expected 80 GB" in str(compared)
    assert compared.figures()[1]["speedup"] is None and compared.figures()[2]["speedup"] > 0
    assert "expected 80 GB" in compared.page() and compared.sheet().size[0] > 0


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    said, pipe = [], text_flux()
    model = pipe.transformer

    def show(phase: str, text: str, share: float, left: float | None) -> None:
        said.append((phase, text, share, left))
        if text == "output:2, prompt 2 of 3":
            raise KeyboardInterrupt

    compared = hrt.compare(pipe, ["uniform:2", "output:2"], [*PROMPTS, "a fish"], show=show, **EAGER, **SMALL)
    assert compared.ended_early and compared.numbers == [0, 1] and pipe.transformer is model
    assert [len(row.seconds) for row in compared.rows] == [2, 2, 1]
    assert compared.figures()[2]["speedup"] > 0 and "2 of 3 prompts, ended early" in str(compared)
    compared.save(tmp_path)
    shares, left = [each[2] for each in said], [each[3] for each in said]
    assert shares == sorted(shares) and shares[0] == 0 and left[0] is None and left[-1] > 0
    with pytest.raises(KeyboardInterrupt):  # nothing to keep yet
        hrt.compare(pipe, ["uniform:2"], PROMPTS, show=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), **SMALL)


class Page(HTMLParser):
    """Tags that are open, and pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag == "img":
            self.sources.append(dict(attributes)["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_files(tmp_path: Path) -> None:
    prompts = ["a <b>cat</b> & more", "a dog"]
    compared = hrt.compare(text_flux(), ["uniform:2", "output:3"], prompts, rounds=1, **EAGER, **SMALL)
    compared.command = "harmonica try --prompts 'my prompts'"
    folder = tmp_path / "out"
    names = compared.save(folder)
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    with Image.open(folder / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.ndim == 3 and (pixels < 50).all(-1).mean() > 0.02  # differences are dark
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert not page.open and len(page.sources) == 2 * (1 + 2 * 2)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "a &lt;b&gt;cat&lt;/b&gt; &amp; more" in text and not re.search(r"<script|https?://|<link", text)
    assert "harmonica try --prompts" in text and 'Schedule.load("uniform-2.json")' in text.replace("&quot;", '"')
    rows = list(csv.DictReader(io.StringIO((folder / "figures.csv").read_text())))
    read = json.loads((folder / "figures.json").read_text())
    assert (
        [row["name"] for row in rows] == [row["name"] for row in read["rows"]] == ["full run", "uniform:2", "output:3"]
    )
    assert float(rows[1]["psnr"]) == pytest.approx(compared.figures()[1]["psnr"])
    assert [each["prompt"] for each in read["rows"][1]["by_prompt"]] == prompts
    assert Schedule.load(folder / "output-3.json") == compared.schedules["output:3"]


def test_model_offload(monkeypatch) -> None:
    """Its hooks are on parts that all candidates share: each call must find one on its denoiser, once a step."""
    plain = hrt.compare(text_flux(), ["uniform:2", "output:3"], PROMPTS, rounds=1, **EAGER, **SMALL)
    brought: list[str] = []

    def bring(self, module, *args, **kwargs):  # moving to "cpu:0" would make new weights at each step
        brought.append(type(module).__name__)
        return args, kwargs

    monkeypatch.setattr("accelerate.hooks.CpuOffload.pre_forward", bring)
    pipe = text_flux()
    pipe.enable_model_cpu_offload(device="cpu")
    compared = hrt.compare(pipe, ["uniform:2", "output:3"], PROMPTS, rounds=1, **EAGER, **SMALL)
    for own, expected in zip(compared.rows[1:], plain.rows[1:]):
        for number in range(2):
            assert own.quality[number] == pytest.approx(expected.quality[number], rel=1e-4)
    assert brought.count("FluxTransformer2DModel") == STEPS * 3
    assert brought.count("CompiledTransformer") == STEPS * 2 * 3
    brought.clear()
    pipe(PROMPTS[0], **SMALL)
    assert brought.count("FluxTransformer2DModel") == STEPS


def test_denoisers_that_guide_in_one_batch_without_encoders() -> None:
    made = sd3()
    embeds = {"prompt_embeds": torch.randn(1, 5, 12), "negative_prompt_embeds": torch.randn(1, 5, 12)}
    embeds |= {"pooled_prompt_embeds": torch.randn(1, 10), "negative_pooled_prompt_embeds": torch.randn(1, 10)}
    compared = hrt.compare(made, ["blocks:2"], num_inference_steps=4, height=8, width=8, **embeds, **EAGER)
    assert compared.subjects == [None] and compared.figures()[1]["speedup"] > 0 and "image 1" in compared.page()
