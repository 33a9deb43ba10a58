"""How a compiled model passes for the model: to callers, to diffusers' pipelines, to accelerate's hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import nn

from .calling import Forward


class LooksLike(type):
    """A class that equals the class of the models it stands for, and itself: as good as it, where types are compared.

    `DiffusionPipeline.from_pipe` carries over what passes `type(component) in (TheModelsClass,)`, which no subclass
    does. Hashes stay apart: tables keyed by a type do not take one for the other.
    """

    model_class: type | None = None

    def __eq__(cls, other: object) -> bool:
        return cls is other or (cls.model_class is not None and cls.model_class is other)

    __hash__ = type.__hash__


@functools.cache
def looking_like(face: type, model_class: type) -> type:
    """The subclass of `face` for models of one class."""
    return LooksLike(face.__name__, (face,), {"model_class": model_class, "__module__": face.__module__})


class ModelFace(nn.Module, metaclass=LooksLike):
    """A module with the forward signature, class, attributes, parameters and names of another, its `model`."""

    def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> ModelFace:
        kind: type = type(model)
        return super().__new__(looking_like(cls, kind))

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        keep = functools.partial(object.__setattr__, self)
        keep("model", model)  # not a child: its parameters and names are this module's own, unprefixed
        keep("training", False)
        for own in ("_parameters", "_buffers"):  # where offloading writes a module's own tensors to
            keep(own, vars(model)[own])
        keep("__module__", type(model).__module__)  # where a pipeline looks up what it saves

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]  # a module's may be set
        """Same signature as the model's."""
        return Forward(self)

    @property  # type: ignore[misc]  # it may be set on other objects
    def __class__(self) -> type:
        """The model's: `isinstance` checks hold, and a pipeline saves its transformer as what it is."""
        return type(self.__dict__["model"]) if "model" in self.__dict__ else type(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a compiled transformer cannot be pickled: pickle its .model and .schedule")

    def __getattr__(self, name: str) -> Any:
        if "model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_diffusers_hook":  # diffusers' own hooks go around the model: it is what they offload, cast, ...
            value._module_ref = self.model
            setattr(self.model, name, value)
        elif name.startswith("_"):
            object.__setattr__(self, name, value)  # a module's own takes as long as a replay, and would adopt modules
        elif name == "forward" and "_old_forward" in vars(self):
            pass  # accelerate puts a hook here, or takes it away: `_forward` runs the hook itself
        elif name == "forward" and "_old_forward" in vars(self.model):
            self.model.forward = value  # it takes away the one the model had when it was compiled
        elif name in ("model", "schedule", "backend", "forward", "training"):
            raise AttributeError(f"{name} of a compiled transformer cannot be set: compile its .model again")
        else:
            setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            super().__delattr__(name)
        else:
            delattr(self.model, name)

    def named_modules(self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        return self.model.named_modules(memo, prefix, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return self.model.named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> ModelFace:
        if mode:
            raise RuntimeError("a compiled transformer samples only: train its .model, in eval mode again afterwards")
        self.model.eval()
        return self

    # ---- other compilers

    def compile(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as every other way to have torch.compile or torch.jit over it."""
        raise RuntimeError(
            "this transformer is compiled already, by harmonica_rt (its inductor backend is TorchInductor's): "
            "harmonica_rt.uncompile gives back the plain model, for torch.compile or torch.jit"
        )

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """The model's, at levels whose programs call its blocks."""
        if not self._engine.runs_forward:
            self.compile()
        self.model.compile_repeated_blocks(*args, **kwargs)

    _torchdynamo_orig_callable = property(compile)  # what torch.compile first looks for on what it is given
