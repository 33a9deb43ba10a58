"""Models and samplers by name, for the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import harmonica_rt

SAMPLERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
}
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # what DiT was trained with


def references() -> dict[str, Any]:
    """The repository's reference models by name; none where only the package is installed."""
    root = Path(harmonica_rt.__file__).resolve().parent.parent
    if not (root / "bench" / "reference.py").is_file():
        return {}
    if str(root) not in sys.path:
        sys.path.append(str(root))
    from bench.reference import REFERENCES

    return REFERENCES


def load(
    name: str, sampler: str, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> tuple[nn.Module, Any]:
    """(model in eval mode, scheduler).

    Args:
        name: a reference model, or what diffusers loads: a folder or a hub name, of a pipeline or of a transformer.
        sampler: a name of `SAMPLERS`, with the pipeline's own noise schedule if it has one, else DiT's linear betas.
        variant: of the weights' files, e.g. "fp16".
    """
    import diffusers

    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    kind, options = SAMPLERS[sampler]
    kind = getattr(diffusers, kind)
    if name in references():
        from bench.reference import load_pipeline

        pipeline = load_pipeline(name)
        model, scheduler = pipeline.transformer, kind.from_config(pipeline.scheduler.config, **options)
        return (model if dtype == model.dtype else model.to(dtype)), scheduler
    folder = Path(name)
    if not name or (not folder.is_dir() and (folder.exists() or name.count("/") != 1 or name.startswith((".", "/")))):
        known = ", ".join(references()) or "none here"
        raise FileNotFoundError(f"model: expected a reference model ({known}), a folder or a hub name, got {name!r}")
    pipeline = (folder / "model_index.json").is_file() or not folder.is_dir()
    part = {"subfolder": "transformer"} if pipeline else {}
    model = diffusers.AutoModel.from_pretrained(name, torch_dtype=dtype, variant=variant, **part)
    config = LINEAR
    if pipeline:
        config = kind.load_config(name, subfolder="scheduler")
    elif (folder / "scheduler_config.json").is_file():
        config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    return model.eval(), kind.from_config(config, **options)
