"""What a made pipeline is, and the small random parts that several share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import PipelineCallback
from torch import Tensor, nn

STEPS = 6
TEXT = 12  # width of text states
POOLED = 10
SIZE = {"height": 8, "width": 8}  # of a VAE with a latent a pixel
LARGE = {"height": 64, "width": 64}  # where there is none, and 8 pixels a latent are assumed

NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXT_2 = NO_TEXT | {"text_encoder_2": None, "tokenizer_2": None}
NO_TEXT_3 = NO_TEXT_2 | {"text_encoder_3": None, "tokenizer_3": None}


class DenoiserCall(NamedTuple):
    """One call of a denoiser: at which step of the schedule, for which context, of which of the pipeline's models."""

    step: int
    context: str
    denoiser: str


def alone(step: int) -> tuple[str, ...]:
    return ("cond",)


def one_batch(step: int) -> tuple[str, ...]:
    return ("cond_uncond",)


def in_turn(step: int) -> tuple[str, ...]:
    return ("cond", "uncond")


@dataclass(frozen=True)
class Made:
    """A pipeline with small random parts, and how it calls its denoiser.

    Attributes:
        make: the pipeline: on the CPU, float32, quiet, the same parts each time.
        arguments: what its call is given beside the number of steps, the generator and the output type.
        contexts: step -> contexts it calls there, in turn.
        named: they are `cache_context`'s names; otherwise they are names of ours for calls it does not name.
        denoiser: step -> which of the pipeline's models it calls.
        first: step of the schedule at which a run enters.
        streams: lists of blocks in the order they run; of each what its blocks return, by the names of the arguments
            that continues. Empty for UNets.
        skips: blocks hand streams to later ones past those between.
        steps: of a run; some schedulers make more of them than they are asked for.
        kept: where guidance in a batch ends midway, which half of it goes on.
        around: what a call needs around it.
    """

    make: Callable[[], DiffusionPipeline]
    arguments: Callable[[], dict[str, Any]]
    contexts: Callable[[int], tuple[str, ...]] = alone
    named: bool = False
    denoiser: Callable[[int], str] = lambda step: "transformer"
    first: int = 0
    streams: dict[str, tuple[str, ...]] = field(default_factory=dict)
    skips: bool = False
    steps: int = STEPS
    kept: int | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def call(self, pipe: DiffusionPipeline, **changes: Any) -> Tensor:
        """Latents of one run of `STEPS` steps, from the same noise each time."""
        given = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, **self.arguments()}
        with self.around():
            return pipe(**{"generator": torch.Generator().manual_seed(1), **given, **changes})[0]

    @property
    def calls(self) -> list[DenoiserCall]:
        """All calls of denoisers within one run, in turn."""
        return [
            DenoiserCall(step, context, self.denoiser(step))
            for step in range(self.first, self.steps)
            for context in self.contexts(step)
        ]

    @property
    def denoisers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(call.denoiser for call in self.calls))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [block for name in self.streams for block in blocks_of(model, name)]


def blocks_of(model: nn.Module, name: str) -> list[nn.Module]:
    """Of the list `name`, or the one block of that name; what a dict of blocks holds counts each."""
    listed = model.get_submodule(name)
    blocks = listed if isinstance(listed, nn.ModuleList) else [listed]
    return [part for block in blocks for part in (block.values() if isinstance(block, nn.ModuleDict) else [block])]


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, every parameter random, so that nothing vanishes by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(features: int = TEXT, **more: Any) -> dict[str, Any]:
    """Text states of a prompt and of a negative prompt, 5 tokens each."""
    return {"prompt_embeds": noise(1, 5, features), "negative_prompt_embeds": noise(1, 5, features, seed=2)} | more


def pooled(**more: Any) -> dict[str, Any]:
    states = {
        "pooled_prompt_embeds": noise(1, POOLED, seed=1),
        "negative_pooled_prompt_embeds": noise(1, POOLED, seed=3),
    }
    return text(**states) | more


def masked(name: str = "prompt_attention_mask", dtype: torch.dtype = torch.long, **more: Any) -> dict[str, Any]:
    """The negative prompt has 3 tokens, the other 5."""
    ones = torch.ones(1, 5, dtype=dtype)
    return text(**{name: ones, f"negative_{name}": ones * (torch.arange(5) < 3)}) | more


def cutoff(callback: type[PipelineCallback]) -> dict[str, Any]:
    """Guidance ends after step 2."""
    ends = callback(cutoff_step_ratio=None, cutoff_step_index=2)
    return {"callback_on_step_end": ends, "callback_on_step_end_tensor_inputs": ["latents", *ends.tensor_inputs]}


def picture() -> Tensor:
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def left_half() -> Tensor:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    return mask


def shifting() -> FlowMatchEulerDiscreteScheduler:
    """Timesteps by the number of tokens, as Flux has them."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def tiny_vae(channels: int) -> AutoencoderKL:
    """A latent a pixel."""
    shape = {"block_out_channels": (4,), "norm_num_groups": 1}
    return filled(AutoencoderKL(latent_channels=channels, shift_factor=0.06, scaling_factor=1.5, **shape))
