"""Models and samplers by name, for the command line."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from harmonica_rt.models import Adapter

from .denoiser import adapt_to_learn
from .task import Conditions, class_labels, prompts

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "iddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "learned_range"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "sa-solver": ("SASolverScheduler", {"algorithm_type": "data_prediction"}),  # DPM-Solver++ has others by that name
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
}
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # what DiT was trained with
GUIDANCE = {"labels": 1.5, "text": 4.5}  # unless told
REFERENCES = Path(__file__).resolve().parent.parent / "bench" / "models"  # there in a checkout alone
WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")  # and the variant
FEATURES = "prompt_features.safetensors"  # of the prompts that a folder's model can be learned on


def references() -> list[str]:
    """The names that stand for a folder: in a checkout its reference models, none where only the package is."""
    return sorted(config.parent.name for config in REFERENCES.glob("*/config.json"))


def located(name: str) -> str:
    """A folder or a hub name: `name` itself, unless a reference model has it."""
    return str(REFERENCES / name) if name in references() else name


def guidance(adapter: Adapter) -> float:
    """The scale a model is sampled with unless told."""
    return GUIDANCE["text" if adapter.contexts else "labels"]


def conditions(
    name: str, model: nn.Module, features: Path | None = None, classes: Sequence[int] | None = None
) -> Conditions:
    """What images are to be: class labels, all or `classes`; or prompts.

    Args:
        features: a safetensors file: states [n + 1, tokens, features] and mask [n + 1, tokens]; last, the empty prompt.
            ``prompt_features.safetensors`` in the model's folder unless given.
    """
    if not adapt_to_learn(model).contexts:
        if features is not None:
            raise ValueError(f"features: expected none for {type(model).__name__}, which takes labels; got {features}")
        return class_labels(model, classes)
    if classes is not None:
        raise ValueError(f"classes: expected none for {type(model).__name__}, which reads text; got {list(classes)}")
    if features is None:
        features = Path(located(name)) / FEATURES
        if not features.is_file():
            raise ValueError(
                f"features: {name} reads text: expected --features FILE with the states and masks of prompts, got "
                f"none, and no {FEATURES} in its folder"
            )
    try:
        stored = load_file(features)
    except SafetensorError as error:
        raise ValueError(f"{features}: not a safetensors file: {error}") from None
    if set(stored) != {"states", "mask"}:
        raise ValueError(f"{features}: expected tensors named states and mask, got {sorted(stored)}")
    return prompts(model, stored["states"], stored["mask"])


def scheduler(sampler: str, config: Mapping[str, Any]) -> Any:
    """The scheduler of a name in `SAMPLERS`, with the noise schedule of `config`."""
    import diffusers

    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    kind, options = SAMPLERS[sampler]
    kind = getattr(diffusers, kind)
    own = inspect.signature(kind.__init__).parameters  # what other samplers' configs say beside is not for this one
    return kind.from_config({k: v for k, v in config.items() if k in own}, **options)


def load(
    name: str, sampler: str, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> tuple[nn.Module, Any]:
    """(model in eval mode, scheduler).

    Args:
        name: what diffusers loads: a folder or a hub name, of a pipeline or of a transformer; or a reference model.
        sampler: a name of `SAMPLERS`, with the noise schedule that lies with the model, else DiT's linear betas.
        variant: of the weights' files, e.g. "fp16"; unless given, a folder's only one.
    """
    import diffusers

    scheduler(sampler, LINEAR)  # refuses unknown names before anything is read
    where = located(name)
    folder = Path(where)
    if not name or (not folder.is_dir() and (folder.exists() or name.count("/") != 1 or name.startswith((".", "/")))):
        known = ", ".join(references()) or "none here"
        raise FileNotFoundError(f"model: expected a reference model ({known}), a folder or a hub name, got {name!r}")
    pipeline = (folder / "model_index.json").is_file() or not folder.is_dir()
    part = {"subfolder": "transformer"} if pipeline else {}
    variant = variant or _only_variant(folder.joinpath(*part.values()))
    model = diffusers.AutoModel.from_pretrained(where, torch_dtype=dtype, variant=variant, **part)
    config = LINEAR
    if pipeline:
        config = diffusers.SchedulerMixin.load_config(where, subfolder="scheduler")
    elif (folder / "scheduler_config.json").is_file():
        config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    return model.eval(), scheduler(sampler, config)


def _only_variant(folder: Path) -> str | None:
    """The variant that a folder has its weights in, if there is one and nothing else."""
    files = (WEIGHTS.fullmatch(file.name) for file in folder.glob("*.safetensors"))
    found = {file[1] for file in files if file}
    return found.pop() if len(found) == 1 else None
