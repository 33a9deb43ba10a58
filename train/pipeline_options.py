"""The options of commands that run a person's own pipeline: which one, on what, with which arguments of its call."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


class PipelineDtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


PANEL = "The pipeline and its call"


def _option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=PANEL, **more)


Pipeline = Annotated[str, _option("Folder or hub name of a diffusers pipeline.")]
Prompts = Annotated[Path | None, _option("File of prompts, one a line; of classes where it takes labels.")]
Inputs = Annotated[Path | None, _option("Folder of pictures with a caption each, NAME.txt; in place of prompts.")]
NegativePrompt = Annotated[str | None, _option("For all prompts.")]
Steps = Annotated[int | None, _option("Steps of a run, num_inference_steps.", min=2)]
Guidance = Annotated[float | None, _option("The call's guidance_scale.")]
TrueCfg = Annotated[float | None, _option("The call's true_cfg_scale.", "--true-cfg")]
Height = Annotated[int | None, _option("In pixels.", min=1)]
Width = Annotated[int | None, _option("In pixels.", min=1)]
Frames = Annotated[int | None, _option("Of a video, num_frames.", min=1)]
Dtype = Annotated[PipelineDtype | None, _option("Of the pipeline; bfloat16 on CUDA, else float32.")]
Call = Annotated[list[str] | None, _option("Another argument of the pipeline's call, key=value; may be repeated.")]

NAMES = {  # option -> argument of the call
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "true_cfg": "true_cfg_scale",
    "height": "height",
    "width": "width",
    "frames": "num_frames",
}


@dataclass(frozen=True)
class Asked:
    """A pipeline and its call, as a person asks for them; options of a command that is decorated with `asks`."""

    pipeline: Pipeline
    prompts: Prompts = None
    inputs: Inputs = None
    negative_prompt: NegativePrompt = None
    steps: Steps = None
    guidance: Guidance = None
    true_cfg: TrueCfg = None
    height: Height = None
    width: Width = None
    frames: Frames = None
    dtype: Dtype = None
    call: Call = None

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        return call_arguments(self.call, **{name: getattr(self, name) for name in NAMES})


def asks(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose first parameter is `Asked`, as typer takes it: with its fields as further options."""
    own = [*inspect.signature(command, eval_str=True).parameters.values()][1:]
    hints = get_type_hints(Asked, include_extras=True)
    shared = inspect.signature(Asked).parameters.values()
    parameters = [*own, *(parameter.replace(annotation=hints[parameter.name]) for parameter in shared)]

    @functools.wraps(command)
    def asked(**given: Any) -> None:
        command(Asked(**{field.name: given.pop(field.name) for field in fields(Asked)}), **given)

    options = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    asked.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # what inspect looks for
    return asked


def call_arguments(call: Sequence[str] | None, **options: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call: options of `NAMES` that are not None, and key=value of `call`.

    Values are read as JSON where they are such, else as text.
    """
    arguments = {NAMES[name]: value for name, value in options.items() if value is not None}
    for each in call or ():
        name, equals, text = each.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--call: expected key=value, got {each!r}")
        if name in arguments:
            raise ValueError(f"--call: expected {name} once, got it twice, as {arguments[name]!r} and {text!r}")
        try:
            arguments[name] = json.loads(text)
        except ValueError:
            arguments[name] = text
    return arguments


def torch_dtype(dtype: PipelineDtype | None) -> Any:
    """torch's, or None where the pipeline's device decides."""
    import torch

    return None if dtype is None else getattr(torch, dtype.value)
