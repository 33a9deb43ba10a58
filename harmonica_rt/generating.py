"""A pipeline, what it is asked for, and with what arguments: the same images each time, by their numbers."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
OWN = ("self", "generator", "output_type", "return_dict")  # arguments of a pipeline's call that are not a person's
SEVERAL = ("num_images_per_prompt", "num_videos_per_prompt")


def load_pipeline(name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Any:
    """A pipeline from a folder that `save_pretrained` made, or from the hub.

    Args:
        dtype: of all parts; bfloat16 on CUDA and float32 elsewhere unless given.
        device: CUDA where there is one, unless given.

    Raises:
        FileNotFoundError: there is no such folder, and the name is not one of the hub's.
        OSError: neither the cache nor the hub has it, as without a network.
    """
    from diffusers import DiffusionPipeline

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"pipeline: expected a folder with model_index.json, got {name}, which has none")
    elif folder.exists() or not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"pipeline: expected a folder or a hub name (owner/name), got {name!r}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, dtype=dtype)
    except OSError as error:
        if folder.is_dir():
            raise
        raise OSError(
            f"pipeline: expected a folder, or a hub name and a network to get it by, got {name}: {error}"
        ) from error
    return pipeline.to(device)


def read_prompts(path: Path) -> list[str]:
    """Of a file, one a line; blank lines are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are no prompts, or the file is not text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts: expected a file, one a line, got {path}, which is none")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected prompts, one a line, got a file that is not UTF-8: {error}") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{path}: expected prompts, one a line, got none")
    return prompts


def read_inputs(folder: Path) -> tuple[list[Path], list[str]]:
    """Pictures of a folder by name, and of each its caption, the text file of the same stem.

    Raises:
        ValueError: there are no pictures, or one has no caption.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"inputs: expected a folder of pictures and captions, got {folder}")
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not pictures:
        raise ValueError(f"inputs: expected pictures ({', '.join(PICTURES)}) in {folder}, got none")
    for path in pictures:
        if not path.with_suffix(".txt").is_file():
            raise ValueError(f"inputs: expected a caption beside {path}, in {path.with_suffix('.txt').name}, got none")
    return pictures, [" ".join(read_prompts(path.with_suffix(".txt"))) for path in pictures]


class Generation:
    """What a pipeline is to make: image number i shows prompt i, from noise of ``seed + i``.

    Args:
        pipeline: any diffusers pipeline whose call takes prompts or class labels.
        prompts: texts; numbers or names of classes where the call takes labels, all of them unless given. None where
            the call is given ``prompt_embeds``, of one prompt: one image.
        inputs: a folder of pictures and captions, for pipelines that start from a picture; in place of prompts.
        seed: of the first image's noise.
        arguments: the call's own, e.g. ``num_inference_steps``, ``guidance_scale``, ``negative_prompt``, ``height``.

    Attributes:
        subjects: texts or labels, one an image.
        call: arguments that all images have in common.
        several: images a subject.

    Raises:
        TypeError: an argument that the pipeline's call does not take, or one that it needs.
        ValueError: no prompts, or ones that are of no use to this pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str | int] | None = None,
        *,
        inputs: Path | None = None,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        self.pipeline, self.seed = pipeline, seed
        self._kind = type(pipeline).__name__
        self._taken = inspect.signature(type(pipeline).__call__).parameters
        self.images: list[Path] | None = None
        if "class_labels" in self._taken:
            self._name = "class_labels"
        elif "prompt" in self._taken or "prompt_embeds" in arguments:
            self._name = "prompt"
        else:
            raise ValueError(f"pipeline: expected one that takes prompts or class labels, got {self._kind}")
        if inputs is not None:
            prompts = self._read_inputs(inputs, prompts)
        self.subjects: list[Any] = self._subjects(prompts, arguments)
        self._check(arguments)
        self.call = arguments
        self.several = next((arguments[name] for name in SEVERAL if name in arguments), 1)

    @property
    def count(self) -> int:
        """How many subjects there are."""
        return len(self.subjects)

    @property
    def steps(self) -> int:
        """Steps of a run, as asked for."""
        return self.setting("num_inference_steps")

    @property
    def guidance(self) -> float | None:
        """The scale of classifier-free guidance; None where the pipeline has none, or is not told to.

        Where a call has a ``true_cfg_scale``, its ``guidance_scale`` is an input of a distilled model.
        """
        if "true_cfg_scale" in self._taken:
            negative = any(name.startswith("negative_prompt") for name in self.call)
            return self.setting("true_cfg_scale") if negative else None
        return self.setting("guidance_scale")

    def setting(self, name: str) -> Any:
        """An argument of the call as given, else the pipeline's default; None where it has neither."""
        if name in self.call or name not in self._taken:
            return self.call.get(name)
        default = self._taken[name].default
        return None if default is inspect.Parameter.empty else default

    def arguments(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of the call that makes these images, each from noise of its own."""
        subjects = [self.subjects[number] for number in numbers]
        own: dict[str, Any] = {self._name: subjects}
        if subjects[0] is None:
            own = {name: _repeated(value, len(subjects)) for name, value in _features(self.call).items()}
        if isinstance(negative := self.call.get("negative_prompt"), str):
            own["negative_prompt"] = [negative] * len(subjects)
        if self.images is not None:
            own["image"] = [_picture(self.images[number]) for number in numbers]
        seeds = [self.seed + number * self.several + each for number in numbers for each in range(self.several)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return {**self.call, **own, "generator": generators}

    def at(self, numbers: Sequence[int], seed: int) -> Generation:
        """The same call for these of the prompts, labels or pictures, from noises of `seed`."""
        other = copy.copy(self)
        other.subjects, other.seed = [self.subjects[number] for number in numbers], seed
        other.images = None if self.images is None else [self.images[number] for number in numbers]
        return other

    def with_call(self, **changes: Any) -> Generation:
        """The same images of a call with other arguments."""
        other = copy.copy(self)
        other.call = {**self.call, **changes}
        return other

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within, what the pipeline's call says on bad input is followed by what it may lack, a picture."""
        try:
            yield
        except (AttributeError, TypeError, ValueError) as error:
            if "image" not in self._taken or self.images is not None or self.call.get("image") is not None:
                raise
            raise ValueError(
                f"{error}; {self._kind} takes an image: expected a folder of pictures and captions (--inputs), got none"
            ) from error

    def generation(self, numbers: Sequence[int], pipeline: Any = None, **changes: Any) -> Any:
        """What the call returns for these images.

        Args:
            pipeline: one with the same parts, in place of this one's.
            changes: further arguments of the call, e.g. ``output_type``.
        """
        with self.explained():
            return (self.pipeline if pipeline is None else pipeline)(**{**self.arguments(numbers), **changes})

    def takes(self, name: str) -> bool:
        """Whether the pipeline's call has such an argument."""
        return name in self._taken

    # ---- what is given

    def _read_inputs(self, folder: Path, prompts: Sequence[str | int] | None) -> list[str]:
        if prompts is not None:
            raise ValueError(
                f"inputs: expected no prompts beside {folder}, whose captions they are; got {len(prompts)}"
            )
        if "image" not in self._taken:
            raise ValueError(f"inputs: expected a pipeline that takes an image, got {self._kind}")
        self.images, captions = read_inputs(folder)
        return captions

    def _subjects(self, prompts: Sequence[str | int] | None, arguments: dict[str, Any]) -> list[Any]:
        if isinstance(prompts, str):
            prompts = [prompts]
        if self._name == "class_labels":
            return self._labels(prompts)
        if "prompt_embeds" in arguments and (prompts is None or set(prompts) == {None}):
            for name, value in _features(arguments).items():
                if len(value) != 1:
                    got = list(value.shape) if isinstance(value, torch.Tensor) else f"a list of {len(value)}"
                    raise ValueError(f"{name}: expected those of one prompt, [1, ...], got {got}")
            return [None] if prompts is None else list(prompts)
        if prompts is None or not len(prompts):
            raise ValueError(f"prompts: expected at least one for {self._kind}, got none")
        if other := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise TypeError(f"prompts: expected texts for {self._kind}, got {other[0]!r}")
        parts = vars(self.pipeline)
        encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
        absent = encoders and all(part is None for part in encoders) and "encode_prompt" not in parts
        if absent and "prompt_embeds" in self._taken:
            raise ValueError(
                f"prompts: expected none, and prompt_embeds=..., of one prompt, for {self._kind} without a text "
                f"encoder, got {prompts[0]!r}"
            )
        return list(prompts)

    def _labels(self, prompts: Sequence[str | int] | None) -> list[int]:
        count = self.pipeline.transformer.config.num_embeds_ada_norm
        names: dict[str, int] = getattr(self.pipeline, "labels", None) or {}
        if prompts is None:
            return list(range(count))
        labels = [names.get(prompt, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        labels = [int(label) if isinstance(label, str) and label.isdecimal() else label for label in labels]
        if not labels:
            raise ValueError(f"prompts: expected at least one class for {self._kind}, got none")
        numbers: list[int] = []
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
                kinds = "a class's name or number" if names else "a class's number"
                raise ValueError(f"prompts: expected {kinds}, 0 to {count - 1}, for {self._kind}, got {label!r}")
            numbers.append(label)
        return numbers

    def _check(self, arguments: dict[str, Any]) -> None:
        mine = (*OWN, self._name, *(["image"] if self.images else []))
        own = [n for n, p in self._taken.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and n not in mine]
        for name in arguments:
            if name not in own:
                expected = ", ".join(own) or "none"
                raise TypeError(f"{name}: {self._kind} takes no such argument, or not from here; expected {expected}")
        for name in own:
            needed = self._taken[name].default is inspect.Parameter.empty
            if needed and name not in arguments:
                how = "a folder of pictures and captions (--inputs)" if name == "image" else "a value"
                raise TypeError(f"{name}: {self._kind} needs it: expected {how}, got none")


def _features(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a call that are features of prompts, or masks of them."""
    return {n: value for n, value in arguments.items() if "prompt" in n and isinstance(value, (torch.Tensor, list))}


def _repeated(features: Any, times: int) -> Any:
    """Features of one prompt, [1, ...], a mask of them, or a list of one, for so many images."""
    return features.expand(times, *features.shape[1:]) if isinstance(features, torch.Tensor) else times * features


def _picture(path: Path) -> Any:
    from diffusers.utils import load_image

    return load_image(str(path))
