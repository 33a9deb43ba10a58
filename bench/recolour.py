"""A LoRA that a person might have on an emoji model: the same glyphs, in other colours.

python bench/recolour.py --model flux-emoji --minutes 10 --out out/flux-emoji-recoloured.safetensors
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.arguments import positive
from bench.measure.judges import SIDE, glyphs
from bench.models.flux_pipeline import PixelFluxPipeline
from bench.models.pipelines import PixelPipeline
from bench.models.reference import load_pipeline

MODELS = ("pixart-emoji", "flux-emoji")
LORA = LoraConfig(
    r=16,
    lora_alpha=16,
    init_lora_weights="gaussian",
    target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp"],
)
BATCH, RATE, DROPPED = 32, 1e-3, 0.1  # images, the optimiser's rate, share of empty prompts


def recoloured(names: list[str]) -> Tensor:
    """Their glyphs with red, green and blue in turn another, [n, 3, 32, 32] in [-1, 1]."""
    return glyphs(names).unflatten(1, (3, SIDE, SIDE)).roll(1, dims=1)


def loss(pipeline: PixelPipeline, images: Tensor, wanted: list[str]) -> Tensor:
    """What the model was trained on: noise - image by flow matching, or the noise."""
    noise, model = torch.randn_like(images), pipeline.transformer
    if isinstance(pipeline, PixelFluxPipeline):
        level = torch.sigmoid(torch.randn(len(images)))
        states, pooled = pipeline.features(wanted)
        side = images.shape[-1] // 4
        places = pipeline._prepare_latent_image_ids(len(images), side, side, images.device, images.dtype)
        mixed = torch.lerp(images, noise, level[:, None, None, None])
        found = model(
            hidden_states=pipeline.packed(mixed),
            timestep=level,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            txt_ids=torch.zeros(states.shape[1], 3),
            img_ids=places,
        ).sample
        return F.mse_loss(found, pipeline.packed(noise - images))
    step = torch.randint(len(pipeline.scheduler.alphas_cumprod), (len(images),))
    kept = pipeline.scheduler.alphas_cumprod[step][:, None, None, None]  # add_noise looks among the timesteps of a run
    mixed = kept.sqrt() * images + (1 - kept).sqrt() * noise
    found = model(mixed, timestep=step, **pipeline.conditioning(wanted, 0.0)).sample
    return F.mse_loss(found[:, : images.shape[1]], noise)


def train(name: str, minutes: float, out: Path) -> None:
    """Write the LoRA's weights; prints what it does."""
    torch.manual_seed(0)
    pipeline = load_pipeline(name)
    model, names = (
        get_peft_model(pipeline.transformer, LORA),
        pipeline.prompts.names,
    )  # its layers are in the pipeline's
    images = recoloured(names)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=RATE)
    began, steps, seen = time.perf_counter(), 0, 0.0
    while (share := (time.perf_counter() - began) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - share)
        some = torch.randint(len(names), (BATCH,))
        wanted = ["" if empty else names[i] for i, empty in zip(some, torch.rand(BATCH) < DROPPED)]
        error = loss(pipeline, images[some], wanted)
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        steps, seen = steps + 1, error.item() if not steps else 0.98 * seen + 0.02 * error.item()
        if steps % 50 == 1:
            print(f"{steps} steps, loss {seen:.4f}, {share:.0%}", flush=True)
    save_file(get_peft_model_state_dict(model), out)
    print(f"{out}: {steps} steps of {BATCH} images, loss {seen:.4f}")


def fused(model: nn.Module, file: Path) -> nn.Module:
    """A copy of `model` with a LoRA's weights in its own, no layers more."""
    own = get_peft_model(copy.deepcopy(model), LORA)
    set_peft_model_state_dict(own, load_file(file))
    return own.merge_and_unload().eval().requires_grad_(False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="flux-emoji")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--out", type=Path, required=True, help=".safetensors")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    train(arguments.model, arguments.minutes, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
