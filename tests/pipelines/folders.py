"""Small pipelines that read prompts: with text encoders and tokenizers of their own, so that `save_pretrained` makes
a folder that runs."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from ..conftest import make_dit, make_pixart
from .images import flux, qwen, sd3
from .parts import POOLED, TEXT, filled, quiet, tiny_vae
from .videos import wan_2_2

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer(length: int = 16) -> CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=length)


def t5_tokenizer(length: int = 16) -> T5TokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    return T5TokenizerFast(vocab=[(word, -1.0) for word in words], extra_ids=0, model_max_length=length)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A token a byte."""
    words = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    special = ["<|im_start|>", "<|im_end|>"]  # of the pipeline's template
    return Qwen2Tokenizer({word: i for i, word in enumerate(words)}, [], additional_special_tokens=special)


def clip(width: int = POOLED, model: type = CLIPTextModel) -> Any:
    config = {"vocab_size": 64, "hidden_size": width, "intermediate_size": 16, "projection_dim": width}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 16}
    return filled(model(CLIPTextConfig(**config, bos_token_id=0, eos_token_id=1, pad_token_id=1)))


def t5(width: int = TEXT, config: type = T5Config, model: type = T5EncoderModel) -> Any:
    sizes = {"vocab_size": 64, "d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return filled(model(config(**sizes)))


def qwen_encoder(width: int = TEXT) -> Qwen2_5_VLForConditionalGeneration:
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 264}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    seen = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": width}
    config = Qwen2_5_VLConfig(text_config=sizes | {"rope_parameters": rope}, vision_config=seen)
    return filled(Qwen2_5_VLForConditionalGeneration(config))


def text_flux(kind: type = FluxPipeline) -> DiffusionPipeline:
    parts = flux(kind).components | {"text_encoder": clip(), "tokenizer": clip_tokenizer()}
    return quiet(kind(**parts | {"text_encoder_2": t5(), "tokenizer_2": t5_tokenizer()}))


def text_sd3() -> DiffusionPipeline:
    """Without dual attention, which level branches does not take."""
    encoders = {f"text_encoder{n}": clip(POOLED // 2, CLIPTextModelWithProjection) for n in ("", "_2")}
    tokenizers = {f"tokenizer{n}": clip_tokenizer() for n in ("", "_2")}
    parts = sd3(dual=()).components | encoders | tokenizers
    return quiet(StableDiffusion3Pipeline(**parts | {"text_encoder_3": t5(), "tokenizer_3": t5_tokenizer()}))


def text_qwen() -> DiffusionPipeline:
    parts = qwen().components | {"text_encoder": qwen_encoder(), "tokenizer": qwen_tokenizer()}
    return quiet(QwenImagePipeline(**parts))


def text_pixart() -> DiffusionPipeline:
    """4 latent channels, a latent a pixel."""
    model = make_pixart(patch_size=2, in_channels=4, out_channels=8)
    parts = {"transformer": model, "vae": tiny_vae(4), "scheduler": DPMSolverMultistepScheduler()}
    return quiet(PixArtSigmaPipeline(**parts, text_encoder=t5(10), tokenizer=t5_tokenizer()))


def labelled_dit() -> DiffusionPipeline:
    """The pipeline's null label is 1000."""
    model = make_dit(in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    vae: AutoencoderKL = tiny_vae(4)
    scheduler = DDIMScheduler(clip_sample=False)
    return quiet(DiTPipeline(model, vae, scheduler, id2label={0: "tench, Tinca tinca", 1: "goldfish"}))


def text_wan() -> DiffusionPipeline:
    """Two denoisers, 9 frames to 3 latent ones."""
    vae = filled(AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4))
    parts = wan_2_2().components | {"vae": vae, "text_encoder": t5(TEXT, UMT5Config, UMT5EncoderModel)}
    return quiet(WanPipeline(**parts | {"tokenizer": t5_tokenizer(), "boundary_ratio": 0.8}))
