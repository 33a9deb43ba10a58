"""Small pipelines of several families, and what to generate with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from harmonica_rt.generating import Generation
from harmonica_rt.train.sampled import Sampled

from ..pipelines.folders import (
    labelled_dit,
    text_flux,
    text_pixart,
    text_qwen,
    text_sd3,
    text_wan,
)

STEPS, SMALL = 6, {"height": 16, "width": 16}
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flux": (text_flux, SMALL | {"true_cfg_scale": 2.0, "negative_prompt": ""}),
    "sd3": (text_sd3, SMALL | {"guidance_scale": 3.0, "max_sequence_length": 16}),
    "qwen": (text_qwen, SMALL | {"true_cfg_scale": 2.0, "negative_prompt": ""}),
    "pixart": (text_pixart, SMALL | {"use_resolution_binning": False, "guidance_scale": 3.0}),
    "wan": (text_wan, SMALL | {"num_frames": 9, "guidance_scale": 3.0}),
    "dit": (labelled_dit, {"guidance_scale": 3.0}),
}
LEVELS = ("blocks", "branches", "output")


def generation_of(name: str, alike: bool = False) -> Generation:
    """`alike`: prompts of as many tokens, for none is padded."""
    make, call = CALLS[name]
    prompts = ["a cat", "a dog", "a fox"] if alike else ["a cat", "red fox", "old house"]
    return Generation(make(), [0, 1, 2] if name == "dit" else prompts, num_inference_steps=STEPS, **call)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def latents(sampled: Sampled, arguments: dict[str, Any]) -> Tensor:
    """The compiled pipeline's; where it has no latents to return, what it decodes."""
    from harmonica_rt.train.sampled import _Stopped

    try:
        return sampled.pipeline(**arguments, output_type="latent", return_dict=False)[0]
    except _Stopped as stopped:
        return stopped.latents
