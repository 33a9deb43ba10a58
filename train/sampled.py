"""A person's pipeline as what is learned on: its own loop, from prompts and noise to latents, with gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from harmonica_rt.compiled import put
from harmonica_rt.compiling import denoisers_of, put_in, uncompile
from harmonica_rt.generating import Generation
from harmonica_rt.pipeline_copies import another
from harmonica_rt.schedule import Schedule

from .learning import LearningTransformer, NumbersOf

PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)


class _Stopped(Exception):
    """A pipeline's call has come to its latents."""

    def __init__(self, latents: Any) -> None:
        super().__init__()
        self.latents = latents


class _Away:
    """In place of a pipeline's VAE: decoding ends the pipeline's call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def decode(self, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _Stopped(latents)


class Sampled:
    """What a pipeline makes, as a function of the numbers that reuse stands on.

    Args:
        pipeline: a diffusers pipeline, its denoisers not compiled.

    Attributes:
        pipeline: another of the same parts: prompts are encoded once, nothing is decoded or shown.
        denoisers: by their names in the pipeline.
        starts: the step at which each is called first, once a run was made.
    """

    def __init__(self, pipeline: Any) -> None:
        self.denoisers, kind = denoisers_of(pipeline), type(pipeline)
        if not self.denoisers:
            raise TypeError(f"expected a pipeline with a scheduler and a denoiser, got {kind.__name__}")
        self.pipeline = own = another(pipeline)
        self.loop = getattr(kind.__call__, "__wrapped__", kind.__call__)  # without its torch.no_grad
        self.starts: dict[str, int] = {}
        self._key: Any = None
        self._memory: dict[Any, Any] = {}
        if isinstance(getattr(own, "vae", None), nn.Module):
            put(own, "vae", _Away(own.vae))
        if hasattr(own, "encode_prompt"):
            put(own, "encode_prompt", self._remembered(own.encode_prompt))

    @property
    def device(self) -> torch.device:
        return next(next(iter(self.denoisers.values())).parameters()).device

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Within, parameters get no gradient."""
        frozen = [p for m in self.denoisers.values() for p in m.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            uncompile(self.pipeline)
            self._key = None
            for parameter in frozen:
                parameter.requires_grad_(True)

    def run(
        self,
        generation: Generation,
        numbers: Sequence[int],
        schedule: Schedule | None = None,
        stand_on: NumbersOf | None = None,
        checkpointing: bool = False,
        carries: bool = False,
    ) -> Tensor:
        """Latents of these images, [n, ...]; differentiable in what `stand_on` gives.

        Args:
            schedule: of all denoisers; the pipeline as it is without one.
            stand_on: numbers of each context; the schedule's own unless given.

        Raises:
            TypeError: the pipeline returns no latents.
        """
        if schedule is None:
            uncompile(self.pipeline)
            self._key = None
        else:
            self._put(schedule, carries)
            for name in self.denoisers:
                getattr(self.pipeline, name).stand_on(stand_on, checkpointing)
        arguments = generation.arguments(numbers)
        for name, value in (("output_type", "latent"), ("return_dict", False)):
            if generation.takes(name):
                arguments[name] = value
        try:
            result = self.loop(self.pipeline, **arguments)
        except _Stopped as stopped:
            result = stopped.latents
        tensors = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        if not tensors:
            raise TypeError(f"expected latents of {type(self.pipeline).__name__}, got {type(result).__name__}")
        return tensors[0] if len(tensors[0]) == len(numbers) else torch.stack(tensors[: len(numbers)])

    def timesteps(self) -> list[float]:
        """Of the run that was made last."""
        return [*map(float, self.pipeline.scheduler.timesteps)]

    def probe(self, generation: Generation, number: int) -> Tensor:
        """One image's latents; notes at which step each denoiser is called first."""

        def note(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self.starts.setdefault(name, int(getattr(self.pipeline.scheduler, "step_index", 0) or 0))

            return hook

        hooks = [model.register_forward_pre_hook(note(name)) for name, model in self.denoisers.items()]
        try:
            with torch.no_grad():
                return self.run(generation, [number])
        finally:
            for hook in hooks:
                hook.remove()

    def _put(self, schedule: Schedule, carries: bool) -> None:
        """The pipeline's denoisers learn `schedule`, unless they do already."""
        key = (
            schedule.level,
            schedule.groups,
            schedule.order,
            schedule.compute.tobytes(),
            schedule.output.tobytes(),
            carries,
        )
        if key == self._key:
            return
        uncompile(self.pipeline)
        put_in(
            self.pipeline,
            schedule,
            False,
            lambda model, own, more: LearningTransformer(model, own, carries=carries, **more),
        )
        self._key = key

    def _remembered(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """`encode_prompt`, called once for the same arguments; results wait on the CPU."""

        def remembered(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            if not all(isinstance(leaf, PLAIN) for leaf in leaves):  # features, pictures
                return encode(*args, **kwargs)
            key = (tuple(leaves), str(spec))
            if key not in self._memory:
                with torch.no_grad():
                    self._memory[key] = tree_map(_to_cpu, encode(*args, **kwargs))
            return tree_map(lambda t: t.to(self.device) if isinstance(t, Tensor) else t, self._memory[key])

        return remembered


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
