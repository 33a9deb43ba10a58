"""The pipelines of six families as a person has them, each reusing at three levels; and the same reuse by hand.

What is asked of them is what diffusers' own tests ask of every pipeline (its PipelineTesterMixin): files in
`test_client_files`, calls in `test_client_calls`, switches in `test_client_switches`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import harmonica_rt as hrt
from bench.by_hand.module_reuse import ModuleReuse

from ..conftest import relative_error
from .by_hand import ByHand, trunk, whole
from .folders import labelled_dit, text_flux, text_pixart, text_qwen, text_sd3, text_wan
from .images import IMAGES
from .parts import STEPS, Made, alone, one_batch
from .videos import VIDEOS

TOLERANCE = 1e-5
WANTED = ("a cat", "an old red house by the sea", "fox")
OF_ONE_LENGTH = ("a cat", "a dog", "a fox")
LABELS = (1, 7, 200)
SMALL = {"height": 16, "width": 16}
SHORT = {"max_sequence_length": 16}
NEGATIVE = {"negative_prompt": "blue", "true_cfg_scale": 2.0}
PLAIN_TEXT = {"use_resolution_binning": False, "clean_caption": False}


def _made(like: Made, make: Callable[[], DiffusionPipeline], **arguments: Any) -> Made:
    return replace(like, make=make, arguments=lambda: {"prompt": WANTED[0], **SMALL, **arguments})


FAMILIES: dict[str, Made] = {
    "pixart": _made(IMAGES["pixart"], text_pixart, guidance_scale=3.0, **PLAIN_TEXT, **SHORT),
    "dit": Made(
        labelled_dit,
        lambda: {"class_labels": [LABELS[0]], "guidance_scale": 3.0},
        one_batch,
        streams=IMAGES["pixart"].streams,
    ),
    "flux": _made(IMAGES["flux, true CFG"], text_flux, **NEGATIVE, **SHORT),
    "sd3": _made(IMAGES["sd3"], text_sd3, guidance_scale=3.0, negative_prompt="blue", **SHORT),
    "qwen": _made(IMAGES["qwen"], text_qwen, **NEGATIVE),
    "wan": _made(VIDEOS["wan 2.2"], text_wan, guidance_scale=3.0, num_frames=9, negative_prompt="blue", **SHORT),
}
LEVELS = ("branches", "blocks", "output")


@dataclass(frozen=True)
class Client:
    """A family's pipeline that computes every second step at one level.

    Attributes:
        family: its name in `FAMILIES`.
        made: the pipeline and its call.
        level: of its schedule.
    """

    family: str
    made: Made
    level: str

    def schedule(self, pipe: DiffusionPipeline) -> hrt.Schedule:
        return hrt.Schedule.uniform(getattr(pipe, self.made.denoisers[0]), STEPS, level=self.level)

    def compiled(self, pipe: DiffusionPipeline | None = None) -> DiffusionPipeline:
        pipe = self.made.make() if pipe is None else pipe
        return hrt.compile(pipe, self.schedule(pipe), backend="eager")

    def call(self, pipe: DiffusionPipeline, **changes: Any) -> Tensor:
        """Latents; of a DiT, which gives none, pixels. `seeds`: of generators, one an image."""
        return torch.as_tensor(self.made.call(pipe, **_drawn(changes)))

    def by_hand(self, pipe: DiffusionPipeline | None = None, **changes: Any) -> Tensor:
        """The same of a plain pipeline whose modules return what is reused."""
        pipe, changes = self.made.make() if pipe is None else pipe, _drawn(changes)
        if self.level != "branches":
            reuse = ByHand(pipe, self.made, whole if self.level == "output" else trunk)
            try:
                return torch.as_tensor(reuse.run(**changes))
            finally:
                reuse.remove()
        models: dict[str, nn.Module] = {name: getattr(pipe, name) for name in self.made.denoisers}
        schedule, reuses = self.schedule(pipe), []
        for name, model in models.items():
            first = next(call.step for call in self.made.calls if call.denoiser == name)
            reuses.append(ModuleReuse(model, schedule.starting_at(first)))
            object.__setattr__(pipe, name, reuses[-1])  # past the setter, which would write its class into the config
        try:
            return self.call(pipe, **changes)
        finally:
            for name, reuse in zip(models, reuses):
                reuse.remove()
                object.__setattr__(pipe, name, models[name])

    def check(
        self, pipe: DiffusionPipeline, other: DiffusionPipeline | None = None, tolerance: float = TOLERANCE, **call: Any
    ) -> Tensor:
        """Two runs of `pipe` are what `other`, or else a new plain pipeline, gives by hand; what they give."""
        first, wanted = self.call(pipe, **call), self.by_hand(other, **call)
        assert first.dtype is wanted.dtype and first.isfinite().all()
        assert relative_error(first, wanted) < tolerance
        assert torch.equal(self.call(pipe, **call), first)
        return first

    def of(self, *numbers: int) -> dict[str, Any]:
        """Arguments for these images: each with a prompt or label and a noise of its own."""
        if self.family == "dit":
            return {"class_labels": [LABELS[number] for number in numbers], "seeds": numbers}
        # padded text is refused at level branches
        texts = OF_ONE_LENGTH if (self.family, self.level) == ("qwen", "branches") else WANTED
        negative = {"negative_prompt": ["blue"] * len(numbers)} if "negative_prompt" in self.made.arguments() else {}
        return {"prompt": [texts[number] for number in numbers], "seeds": numbers, **negative}

    def unguided(self) -> tuple[Client, dict[str, float]]:
        """It without guidance, and the arguments that take it away."""
        name = "true_cfg_scale" if self.family in ("flux", "qwen") else "guidance_scale"
        contexts = alone if self.made.named else self.made.contexts
        return replace(self, made=replace(self.made, contexts=contexts)), {name: 1.0}

    def using(self, denoiser: str) -> Client:
        """It with one denoiser for all steps."""
        return replace(self, made=replace(self.made, denoiser=lambda step: denoiser))


def _drawn(changes: dict[str, Any]) -> dict[str, Any]:
    if "seeds" not in changes:
        return changes
    seeds, rest = changes["seeds"], {name: value for name, value in changes.items() if name != "seeds"}
    return rest | {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}


CLIENTS = [Client(family, made, level) for family, made in FAMILIES.items() for level in LEVELS]


def over(*families: str, levels: tuple[str, ...] = LEVELS) -> pytest.MarkDecorator:
    """A check for each of these families, or of all, at each level."""
    chosen = [c for c in CLIENTS if c.level in levels and c.family in (families or FAMILIES)]
    return pytest.mark.parametrize("client", chosen, ids=[f"{c.family}-{c.level}" for c in chosen])


WITH_TEXT = tuple(family for family in FAMILIES if family != "dit")
WITH_CALLBACKS = ("flux", "sd3", "qwen", "wan")
