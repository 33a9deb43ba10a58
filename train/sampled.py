"""A person's pipeline as what is learned on: its own loop, from prompts and noise to latents, with gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from harmonica_rt.compiled import Schedules, put
from harmonica_rt.compiling import denoisers_of, is_compiled, put_in, uncompile
from harmonica_rt.generating import Generation
from harmonica_rt.pipeline_copies import another, without_model_offload

from .contexts import NumbersOf, each
from .converged import converged
from .learning import LearningTransformer
from .text_encoders import Away, TextEncoders, can_move


def check_not_compiled(pipeline: Any) -> None:
    """Raise ValueError for a pipeline with a compiled part."""
    if compiled := [name for name, part in vars(pipeline).items() if is_compiled(part)]:
        raise ValueError(
            f"pipeline: expected one that is not compiled, got a compiled {compiled[0]}: uncompile it first"
        )


class _Stopped(Exception):
    """A pipeline's call has come to its latents."""

    def __init__(self, latents: Any) -> None:
        super().__init__()
        self.latents = latents


class _Called(Exception):
    """A pipeline's call has come to its denoiser."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = args, kwargs


class _Latents(Away):
    """In place of a pipeline's VAE: decoding ends the pipeline's call, encoding brings it to the device."""

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.module.to(x.device).encode(x, *args, **kwargs)

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
        for name, model in self.denoisers.items():
            _check_stays(name, model)
        self.owner, self.pipeline = pipeline, another(pipeline)
        own = self.pipeline
        own._all_hooks = []  # of model offload, which is off while it runs
        self.loop = getattr(kind.__call__, "__wrapped__", kind.__call__)  # without its torch.no_grad
        self.starts: dict[str, int] = {}
        self._key: Any = None
        if isinstance(vae := getattr(own, "vae", None), nn.Module):
            put(own, "vae", _Latents(vae))
        self.encoders = TextEncoders(own, lambda: self.device)

    @property
    def device(self) -> torch.device:
        return next(next(iter(self.denoisers.values())).parameters()).device

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Within, denoisers are on the device, their parameters get no gradient, text encoders and VAE are away."""
        frozen = [p for m in self.denoisers.values() for p in m.parameters() if p.requires_grad]
        with without_model_offload(self.owner) as device, _attention_with_gradients():
            resting = {name: part for name, part in self.owner.components.items() if can_move(part, name)}
            was = {name: next(part.parameters()).device for name, part in resting.items()}
            try:
                if device is not None:
                    for model in self.denoisers.values():
                        model.to(device)
                for parameter in frozen:
                    parameter.requires_grad_(False)
                self.encoders.leave({name: part for name, part in resting.items() if name != "vae"})
                if "vae" in resting:
                    resting["vae"].to("cpu")
                yield
            finally:
                uncompile(self.pipeline)
                self._key = None
                for parameter in frozen:
                    parameter.requires_grad_(True)
                self.encoders.come_back()
                for name, part in resting.items():  # at once: a device that is full could not take those of the CPU
                    part.to(was[name])

    def encode(self, generation: Generation, size: int) -> None:
        """Encode the prompts of all images, `size` a call, by text encoders that are away otherwise."""
        if not self.encoders.away:
            return
        with self.encoders.present():
            for first in range(0, generation.count, size):
                self.first_call(generation, range(first, min(first + size, generation.count)))

    def first_call(self, generation: Generation, numbers: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs of the first call of a denoiser, which is not made."""

        def stop(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
            raise _Called(args, kwargs)

        self._take_out()
        hooks = [model.register_forward_pre_hook(stop, with_kwargs=True) for model in self.denoisers.values()]
        try:
            with torch.no_grad():
                self.run(generation, numbers)
        except _Called as called:
            return called.arguments
        finally:
            for hook in hooks:
                hook.remove()
        raise TypeError(f"expected a call of {', '.join(self.denoisers)} by {type(self.pipeline).__name__}, got none")

    def run(
        self,
        generation: Generation,
        numbers: Sequence[int],
        schedules: Schedules | None = None,
        stand_on: NumbersOf | None = None,
        checkpointing: str = "none",
        carries: bool = False,
    ) -> Tensor:
        """Latents of these images, [n, ...]; differentiable in what `stand_on` gives.

        Args:
            schedules: of all denoisers; the pipeline as it is without one.
            stand_on: numbers of each context; the schedule's own unless given.

        Raises:
            TypeError: the pipeline returns no latents.
        """
        if schedules is None:
            self._take_out()
        else:
            self._put(schedules, carries)
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

    def converged(self, generation: Generation, numbers: Sequence[int]) -> Tensor:
        """Latents of the solution that the pipeline's sampler approximates.

        Raises:
            ValueError: the sampler draws noise, the call's steps are not for it to choose, or they start elsewhere.
        """
        for name in ("timesteps", "sigmas"):
            if generation.call.get(name) is not None:
                raise ValueError(f"target converged: expected a call without {name}, got {generation.call[name]}")
        if eta := generation.call.get("eta"):
            raise ValueError(f"target converged: expected a call without noise, eta 0, got eta={eta}")
        own = self.pipeline.scheduler
        scheduler, steps = converged(own)
        if not generation.takes("num_inference_steps"):
            kind = type(self.pipeline).__name__
            raise ValueError(f"target converged: expected a call that takes num_inference_steps, got {kind}'s")
        longer = generation.with_call(num_inference_steps=steps)
        start = None if generation.call.get("strength") is None else self._entry(generation, numbers)
        put(self.pipeline, "scheduler", scheduler)
        try:
            if start is not None and abs((got := self._entry(longer, numbers)) - start) > abs(start) / 50:
                raise ValueError(
                    f"target converged: expected {steps} steps that start where the run does, at timestep {start:.4g}, "
                    f"got {got:.4g}: choose a strength of whole steps, got {generation.call['strength']}"
                )
            return self.run(longer, numbers)
        finally:
            put(self.pipeline, "scheduler", own)

    def _entry(self, generation: Generation, numbers: Sequence[int]) -> float:
        """Timestep of a run's first call."""
        args, kwargs = self.first_call(generation, numbers)
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        return float(torch.as_tensor(timestep).flatten()[0])

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

    def _put(self, schedules: Schedules, carries: bool) -> None:
        """The pipeline's denoisers learn `schedules`, unless they do already."""
        key = (
            carries,
            each(
                schedules, lambda own: (own.level, own.groups, own.order, own.compute.tobytes(), own.output.tobytes())
            ),
        )
        if key == self._key:
            return
        self._take_out()
        put_in(
            self.pipeline,
            schedules,
            False,
            lambda model, own, more: LearningTransformer(model, own, carries=carries, **more),
        )
        self._key = key

    def _take_out(self) -> None:
        """The pipeline's own denoisers back."""
        uncompile(self.pipeline)
        self._key = None


@contextlib.contextmanager
def _attention_with_gradients() -> Iterator[None]:
    """Within, attention is not cuDNN's.

    Its backward pass gives NaN or fails on a Flux in bfloat16 (torch 2.11, on an H200), where the others' are right.
    """
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


def _check_stays(name: str, model: nn.Module) -> None:
    """Raise ValueError for a denoiser whose weights are brought for single calls of its parts."""
    registries = (vars(module).get("_diffusers_hook") for module in model.modules())
    hooks = (hook for registry in registries if registry is not None for hook in registry.hooks.values())
    sequential = any(parameter.is_meta for parameter in model.parameters())
    if sequential or any("GroupOffloading" in type(hook).__name__ for hook in hooks):
        kind = "sequential" if sequential else "group"
        raise ValueError(
            f"pipeline: expected a {name} whose weights stay while it learns, got {kind} offloading, which takes them "
            "away before the backward pass reads them: load the pipeline without it, or with enable_model_cpu_offload()"
        )
