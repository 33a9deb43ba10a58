"""Models by name and by folder: what the command line finds is what the benchmarks run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bench.models.reference import MODELS, REFERENCES, TRAINED, load_pipeline, prompt_features
from harmonica_rt.models import UnsupportedModelError, adapt
from harmonica_rt.train import models
from harmonica_rt.train.denoiser import SAMPLED

from ..conftest import make_dit, make_pixart


@pytest.mark.parametrize("name", TRAINED)
def test_a_reference_is_what_the_benchmarks_run(name: str) -> None:
    pipeline = load_pipeline(name)
    model, _ = models.load(name, "ddim")
    wanted = pipeline.transformer.state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())
    assert not model.training and model.dtype == torch.float32
    if type(model).__name__ in SAMPLED:
        assert models.guidance(adapt(model)) == REFERENCES[name].guidance
    for sampler in models.SAMPLERS:
        wanted = models.scheduler(sampler, pipeline.scheduler.config).config
        assert models.load(name, sampler)[1].config == wanted, sampler


def test_a_model_that_cannot_be_learned_on_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"learning: expected .*PixArt.*, got FluxTransformer2DModel"):
        models.conditions("flux-emoji", models.load("flux-emoji", "ddim")[0])


def test_a_text_reference_reads_the_benchmarks_prompts() -> None:
    model, _ = models.load("pixart-emoji", "ddim")
    known = prompt_features("pixart-emoji")
    wanted = models.prompts(model, known.states, known.mask)
    for name in ("pixart-emoji", str(MODELS / "pixart-emoji")):
        got = models.conditions(name, model)
        for drawn, expected in zip(*(draw(3, torch.Generator().manual_seed(0)) for draw in (got, wanted))):
            assert all(map(torch.equal, drawn, expected))


def test_names_are_those_of_the_trained_references() -> None:
    assert models.references() == sorted(TRAINED)


def test_a_name_and_its_folder_are_the_same(tmp_path: Path) -> None:
    copied = shutil.copytree(MODELS / "dit-fashion", tmp_path / "model")
    (one, one_sampler), (other, other_sampler) = (models.load(n, "ddim") for n in ("dit-fashion", str(copied)))
    assert all(map(torch.equal, one.parameters(), other.parameters())) and one_sampler.config == other_sampler.config


@pytest.mark.parametrize(
    ("stored", "shards", "given", "loaded"),
    [
        ((None,), "5GB", None, None),
        (("fp16",), "5GB", None, "fp16"),
        (("fp16",), "8KB", None, "fp16"),
        ((None, "fp16"), "5GB", None, None),
        ((None, "fp16"), "5GB", "fp16", "fp16"),
        (("fp16", "bf16"), "5GB", "bf16", "bf16"),
    ],
    ids=str,
)
def test_the_variant_is_the_folders_only_one_unless_given(
    stored: tuple[str | None, ...], shards: str, given: str | None, loaded: str | None, tmp_path: Path
) -> None:
    written = {variant: make_dit(seed=seed) for seed, variant in enumerate(stored)}
    for variant, model in written.items():
        model.save_pretrained(tmp_path, variant=variant, max_shard_size=shards)
    model, _ = models.load(str(tmp_path), "ddim", variant=given)
    assert all(map(torch.equal, model.parameters(), written[loaded].parameters()))


def test_of_two_variants_one_must_be_given(tmp_path: Path) -> None:
    for variant in ("fp16", "bf16"):
        make_dit().save_pretrained(tmp_path, variant=variant)
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        models.load(str(tmp_path), "ddim")


def test_a_text_model_without_prompts_says_what_it_wants(tmp_path: Path) -> None:
    model = make_pixart()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected --features FILE .*, got none, and no prompt_features.safetensors"):
        models.conditions(str(tmp_path), model)
