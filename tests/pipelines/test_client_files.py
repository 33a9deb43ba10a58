"""Compiled pipelines are saved, loaded and made into other pipelines as diffusers' tests do with every one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    PixArtAlphaPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from torch import Tensor, nn

import harmonica_rt as hrt

from ..conftest import relative_error
from .clients import TOLERANCE, Client, over

HALVES = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # by the dtype's own rounding, summed over a run
CLIPPING = ("flux", "qwen")  # their blocks clip what is float16


def saved(pipe: DiffusionPipeline, folder: Path, **options: Any) -> Path:
    pipe.save_pretrained(folder, **options)
    return folder


def loaded(pipe: DiffusionPipeline, folder: Path, **options: Any) -> DiffusionPipeline:
    """As a plain pipeline of its class."""
    again = type(pipe).from_pretrained(folder, **options)
    again.set_progress_bar_config(disable=True)
    return again


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parameters(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


@over()
def test_a_saved_pipeline_is_the_plain_one(client: Client, tmp_path: Path) -> None:
    """File by file; loaded it runs as the plain one, and compiled anew, by a schedule from a file, as before."""
    pipe, plain = client.compiled(), client.made.make()
    latents, wanted = client.call(pipe), client.call(plain)
    saved(pipe, tmp_path / "compiled")
    saved(plain, tmp_path / "plain")
    assert files(tmp_path / "compiled") == files(tmp_path / "plain")
    schedule = client.schedule(plain)
    schedule.save(tmp_path / "schedule.json")
    again = loaded(pipe, tmp_path / "compiled")
    assert relative_error(client.call(again), wanted) < TOLERANCE
    hrt.compile(again, hrt.Schedule.load(tmp_path / "schedule.json"), backend="eager")
    assert relative_error(client.call(again), latents) < TOLERANCE
    assert torch.equal(client.call(pipe), latents), "saving changes nothing"
    assert torch.equal(client.call(hrt.uncompile(pipe)), wanted)


@over()
def test_variants(client: Client, tmp_path: Path) -> None:
    pipe = client.compiled()
    latents = client.call(pipe)
    saved(pipe, tmp_path / "fp16", variant="fp16")
    for name in client.made.denoisers:
        assert any(".fp16." in path.name for path in (tmp_path / "fp16" / name).iterdir()), name
    again = loaded(pipe, tmp_path / "fp16", variant="fp16")
    wanted = parameters(pipe)
    assert {name: value.shape for name, value in parameters(again).items()} == {n: v.shape for n, v in wanted.items()}
    assert all(torch.equal(value, wanted[name]) for name, value in parameters(again).items())
    assert relative_error(client.call(client.compiled(again)), latents) < TOLERANCE
    saved(pipe, tmp_path / "plain")
    with pytest.raises(ValueError, match="variant=fp16"):
        loaded(pipe, tmp_path / "plain", variant="fp16")


@over()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_loads_and_saves(client: Client, dtype: torch.dtype, tmp_path: Path) -> None:
    """Parts that a model keeps in float32 are kept; a compiled pipeline in half precision is saved so."""
    folder = saved(client.made.make(), tmp_path / "float32")
    pipe = loaded(client.made.make(), folder, dtype=dtype)
    if dtype is torch.float16 and client.level == "branches" and client.family in CLIPPING:
        with pytest.raises(hrt.UnsupportedModelError, match=r"got float16.*Level 'blocks' takes"):
            client.compiled(pipe)
        return
    client.compiled(pipe)
    assert all(getattr(part, "dtype", dtype) == dtype for part in pipe.components.values())
    tolerance = HALVES[dtype] if client.level == "branches" else 1e-3
    latents = client.check(pipe, loaded(pipe, folder, dtype=dtype), tolerance)
    again = loaded(pipe, saved(pipe, tmp_path / "half"), dtype=dtype)
    kept = {name: value.dtype for name, value in parameters(pipe).items()}
    assert {name: value.dtype for name, value in parameters(again).items()} == kept
    assert relative_error(client.call(client.compiled(again)), latents) < tolerance


@over()
def test_loaded_by_a_device_map(client: Client, tmp_path: Path) -> None:
    pipe = client.compiled()
    latents = client.call(pipe)
    again = loaded(pipe, saved(pipe, tmp_path), device_map="cpu")
    assert relative_error(client.call(client.compiled(again)), latents) < TOLERANCE


# ---- parts that may be missing


def without(pipe: DiffusionPipeline, *names: str) -> DiffusionPipeline:
    for name in names:
        setattr(pipe, name, None)
    return pipe


def check_without(client: Client, pipe: DiffusionPipeline, plain: DiffusionPipeline, folder: Path, **call: Any) -> None:
    """A compiled pipeline and a plain one that lack the same parts: the same runs, and so once saved and loaded."""
    latents = client.check(pipe, plain, **call)
    missing = {name for name, part in plain.components.items() if part is None}
    again = loaded(pipe, saved(pipe, folder))
    assert {name for name, part in again.components.items() if part is None} == missing
    assert relative_error(client.call(client.compiled(again), **call), latents) < TOLERANCE


@over("flux", "sd3")
def test_without_optional_parts(client: Client, tmp_path: Path) -> None:
    names = ("image_encoder", "feature_extractor")
    assert set(names) <= set(client.made.make()._optional_components)
    check_without(client, without(client.compiled(), *names), without(client.made.make(), *names), tmp_path)


@over("sd3")
def test_without_its_third_text_encoder(client: Client) -> None:
    """The pipeline asks the transformer how wide the zeros in its place are."""
    names = ("text_encoder_3", "tokenizer_3")
    pipe = client.compiled()
    whole = client.call(pipe)
    latents = client.check(without(pipe, *names), without(client.made.make(), *names))
    assert relative_error(latents, whole) > 100 * TOLERANCE


@over("pixart")
def test_without_text_encoders(client: Client, tmp_path: Path) -> None:
    encoder, arguments = client.made.make(), client.made.arguments()
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    with torch.no_grad():
        states = encoder.encode_prompt(arguments["prompt"], max_sequence_length=arguments["max_sequence_length"])
    call = dict(zip(names, states)) | {"prompt": None, "negative_prompt": None}
    missing = ("text_encoder", "tokenizer")
    check_without(client, without(client.compiled(), *missing), without(encoder, *missing), tmp_path, **call)


BOUNDARY = {"transformer": 1.0, "transformer_2": None}  # of the pipeline that lacks the denoiser


@over("wan")
@pytest.mark.parametrize("missing", BOUNDARY)
def test_without_one_of_its_denoisers(client: Client, missing: str, tmp_path: Path) -> None:
    """Taken away after compiling, and before: the other one makes all steps."""
    (other,) = set(BOUNDARY) - {missing}
    one = client.using(other)

    def lacking(pipe: DiffusionPipeline) -> DiffusionPipeline:
        pipe.register_to_config(boundary_ratio=BOUNDARY[missing])
        return without(pipe, missing)

    after = lacking(client.compiled())
    check_without(one, after, lacking(client.made.make()), tmp_path)
    assert torch.equal(one.call(one.compiled(lacking(client.made.make()))), one.call(after))
    assert getattr(hrt.uncompile(after), missing) is None


# ---- other pipelines of the same parts


def unchanged(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


@over()
def test_a_pipeline_of_its_components(client: Client, tmp_path: Path) -> None:
    """As many as the plain one has, and a pipeline of them runs the same: they share the scheduler."""
    pipe, plain = client.compiled(), client.made.make()
    latents = client.call(pipe)
    assert pipe.components.keys() == plain.components.keys()
    more = {name: plain.config[name] for name in ("boundary_ratio",) if name in plain.config}
    other = type(pipe)(**pipe.components, **more)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(client.call(other), latents) and torch.equal(client.call(pipe), latents)
    assert unchanged(other.config) == unchanged(plain.config)
    client.call(plain)  # which tells its tokenizers how to pad
    assert files(saved(other, tmp_path / "other")) == files(saved(plain, tmp_path / "plain"))


RELATED: dict[str, Callable[..., DiffusionPipeline]] = {
    "flux": FluxImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
    "qwen": QwenImageImg2ImgPipeline,
    "pixart": PixArtAlphaPipeline,
}


@over(*RELATED)
def test_there_and_back_by_from_pipe(client: Client) -> None:
    """To another pipeline of the family, and to its own class again: the same parts, configuration and run."""
    pipe = client.compiled()
    latents, config = client.call(pipe), unchanged(pipe.config)
    there = RELATED[client.family].from_pipe(pipe)
    assert there.transformer is pipe.transformer
    back = type(pipe).from_pipe(there)
    assert unchanged(back.config) == config and unchanged(pipe.config) == config
    for again in (back, pipe):
        again.set_progress_bar_config(disable=True)
        assert torch.equal(client.call(again), latents)


@over("dit", "wan")
def test_from_pipe_to_its_own_class(client: Client) -> None:
    pipe = client.compiled()
    latents, config = client.call(pipe), unchanged(pipe.config)
    more = {"id2label": {0: "tench"}} if client.family == "dit" else {}
    again = type(pipe).from_pipe(pipe, **more)
    assert unchanged(again.config) == config
    again.set_progress_bar_config(disable=True)
    assert torch.equal(client.call(again), latents) and torch.equal(client.call(pipe), latents)
