"""Models and samplers by name, for the command line."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import harmonica_rt
from harmonica_rt.models import Adapter, adapt

from .task import Conditions, class_labels, prompts

SAMPLERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "iddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "learned_range"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "sa-solver": ("SASolverScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
}
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # what DiT was trained with
GUIDANCE = {"labels": 1.5, "text": 4.5}  # unless told


def references() -> dict[str, Any]:
    """The repository's reference models by name; none where only the package is installed."""
    root = Path(harmonica_rt.__file__).resolve().parent.parent
    if not (root / "bench" / "reference.py").is_file():
        return {}
    if str(root) not in sys.path:
        sys.path.append(str(root))
    from bench.reference import REFERENCES

    return REFERENCES


def guidance(name: str, adapter: Adapter) -> float:
    """The scale a model is sampled with unless told: a reference model's own."""
    if name in references():
        return references()[name].guidance
    return GUIDANCE["text" if adapter.contexts else "labels"]


def conditions(
    name: str, model: nn.Module, features: Path | None = None, classes: Sequence[int] | None = None
) -> Conditions:
    """What images are to be: class labels, all or `classes`; or prompts, of a reference model or of `features`.

    Args:
        features: a safetensors file: states [n + 1, tokens, features] and mask [n + 1, tokens]; last, the empty prompt.
    """
    if not adapt(model).contexts:
        if features is not None:
            raise ValueError(f"features: expected none for {type(model).__name__}, which takes labels; got {features}")
        return class_labels(model, classes)
    if classes is not None:
        raise ValueError(f"classes: expected none for {type(model).__name__}, which reads text; got {list(classes)}")
    if features is not None:
        try:
            stored = load_file(features)
        except SafetensorError as error:
            raise ValueError(f"{features}: not a safetensors file: {error}") from None
        if set(stored) != {"states", "mask"}:
            raise ValueError(f"{features}: expected tensors named states and mask, got {sorted(stored)}")
        return prompts(model, stored["states"], stored["mask"])
    if name not in references():
        raise ValueError(
            f"features: {name} reads text: expected --features FILE with the states and masks of prompts, got none"
        )
    from bench.reference import prompt_features

    known = prompt_features(name)
    return prompts(model, known.states, known.mask)


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
    name: str,
    sampler: str,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    layers: int | None = None,
) -> tuple[nn.Module, Any]:
    """(model in eval mode, scheduler).

    Args:
        name: a reference model, or what diffusers loads: a folder or a hub name, of a pipeline or of a transformer.
        sampler: a name of `SAMPLERS`, with the pipeline's own noise schedule if it has one, else DiT's linear betas.
        variant: of the weights' files, e.g. "fp16".
        layers: shrink a reference model with random weights.
    """
    import diffusers

    scheduler(sampler, LINEAR)  # refuses unknown names before anything is read
    if name in references():
        from bench.reference import load_pipeline

        pipeline = load_pipeline(name, layers)
        model = pipeline.transformer
        return (model if dtype == model.dtype else model.to(dtype)), scheduler(sampler, pipeline.scheduler.config)
    if layers is not None:
        raise ValueError(f"layers: expected a reference model with random weights to shrink, got {name}")
    folder = Path(name)
    if not name or (not folder.is_dir() and (folder.exists() or name.count("/") != 1 or name.startswith((".", "/")))):
        known = ", ".join(references()) or "none here"
        raise FileNotFoundError(f"model: expected a reference model ({known}), a folder or a hub name, got {name!r}")
    pipeline = (folder / "model_index.json").is_file() or not folder.is_dir()
    part = {"subfolder": "transformer"} if pipeline else {}
    model = diffusers.AutoModel.from_pretrained(name, torch_dtype=dtype, variant=variant, **part)
    config = LINEAR
    if pipeline:
        config = diffusers.SchedulerMixin.load_config(name, subfolder="scheduler")
    elif (folder / "scheduler_config.json").is_file():
        config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    return model.eval(), scheduler(sampler, config)
