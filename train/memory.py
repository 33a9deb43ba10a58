"""What learning through a pipeline will take: memory counted before the run, on a copy of the denoiser without data."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from harmonica_rt.counting import CountMacs
from harmonica_rt.forward_engine import denoised
from harmonica_rt.models.blocks import block_lists
from harmonica_rt.schedule import Schedule

from .contexts import ContextWeights, every
from .natural_gradient import WINDOW
from .weights import WeightSettings

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Live(TorchDispatchMode):
    """Bytes that are held of what is made within, now and at most.

    Args:
        held: tensors that were there before, which do not count.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {id(storage): storage for storage in (t.untyped_storage() for t in held)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if id(storage) not in given and id(storage) not in self._known:
                self._hold(storage)
        return out

    def _hold(self, storage: Any) -> None:
        number, size = id(storage), storage.nbytes()

        def gone() -> None:
            del self._known[number]
            self.now -= size

        self._known[number] = weakref.finalize(storage, gone)
        self._known[number].atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class NotCounted(Exception):
    """A forward that cannot be followed by shapes alone; the message says why."""


@dataclass(frozen=True)
class StepCost:
    """One call of a denoiser with gradients of its sample: most bytes held beyond its weights, multiply-accumulates."""

    peak: int
    forward_macs: int
    backward_macs: int


def count_step(model: nn.Module, arguments: Arguments, blockwise: bool = False) -> StepCost:
    """Of a forward and a backward pass, counted on a copy whose tensors have shapes and no data.

    Args:
        arguments: args and kwargs of one call, the sample first among the forward's parameters.
        blockwise: keep one block's activations at a time.

    Raises:
        NotCounted: the model reads values of its tensors, has operations without shapes, or cannot be copied.
    """
    fake = FakeTensorMode()
    try:
        with FakeCopyMode(fake):
            model, (args, kwargs) = copy.deepcopy(model), copy.deepcopy(arguments)
        with fake, torch.enable_grad():
            return counted(model, (args, kwargs), blockwise)
    except Exception as error:  # a model's own code may raise anything where tensors have no data
        raise NotCounted(" ".join(f"{type(error).__name__}: {error}".split())) from error


def counted(model: nn.Module, arguments: Arguments, blockwise: bool = False) -> StepCost:
    """`count_step` of a model that may be changed, as one on the meta device."""
    args, kwargs = arguments
    for block in [block for blocks in block_lists(model).values() for block in blocks] if blockwise else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    samples = samples_of(model, arguments)
    for sample in samples:
        sample.requires_grad_()
    live = Live([*model.parameters(), *model.buffers()])
    with live, CountMacs() as macs:
        outputs = [t for t in tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        forward = macs.macs
        torch.autograd.grad(outputs, samples, [torch.empty_like(t) for t in outputs], allow_unused=True)
    return StepCost(live.peak, forward, macs.macs - forward)


def samples_of(model: nn.Module, arguments: Arguments) -> list[Tensor]:
    """What a call denoises: a tensor, or a list of them."""
    (args, kwargs), name = arguments, denoised(model)
    place = [*inspect.signature(model.forward).parameters].index(name)
    return [t for t in tree_leaves(kwargs[name] if name in kwargs else args[place]) if isinstance(t, Tensor)]


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of all of them, each storage once."""
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


@dataclass(frozen=True)
class Memory:
    """Bytes that learning takes at most, by what they are for.

    Attributes:
        weights: of the denoisers.
        step: activations of one step, and their gradients.
        values: computed values that later steps stand on, all of a run's, and the gradients of those alive at a time.
        numbers: what is learned: tables of an iteration, and gradients of the last ones.
        samples: of all steps.
        libraries: work space of matrix products.
        images: a call.
        accumulate: calls an iteration.
        available: on the device, weights included.
    """

    weights: int
    step: int
    values: int
    numbers: int
    samples: int
    libraries: int
    images: int
    accumulate: int
    available: int

    @property
    def total(self) -> int:
        return self.weights + self.working

    @property
    def working(self) -> int:
        """All but the weights."""
        return self.step + self.values + self.numbers + self.samples + self.libraries

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    def __str__(self) -> str:
        parts = {"weights": self.weights, "one step": self.step, "kept values": self.values}
        parts |= {"what is learned": self.numbers, "the rest": self.samples + self.libraries}
        listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
        return f"{_size(self.total)} of {_size(self.available)} ({listed})"

    @property
    def advice(self) -> str:
        """What to change where it does not fit."""
        room, one = self.available - self.weights, self.working / self.images
        if self.images > 1 and room >= one:
            calls = -(-self.accumulate * self.images // int(room // one))
            return f"accumulate over {calls} calls an iteration (--accumulate {calls})"
        if self.numbers > max(self.step, self.values):
            return "learn no weights per channel (--channels no)"
        if self.values > self.step:
            return "learn one group of blocks (--level auto)"
        return "make smaller images (--height, --width)"


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def predict(
    step: StepCost,
    learned: ContextWeights,
    settings: WeightSettings,
    *,
    values: int,
    sample: int,
    contexts: int,
    images: int,
    **more: int,
) -> Memory:
    """Memory of an iteration.

    Args:
        step: of one call of `images`.
        learned: the weights that are.
        values, sample: bytes that one computed call keeps for later ones, and of its sample.
        contexts: calls a step.
        more: the rest of `Memory`.
    """
    schedules = [own.schedule for own in every(learned.own)]
    computed = max(map(_computed, schedules))
    schedule, free, table = schedules[0], len(learned.change), sum(len(own.places) for own in every(learned.own))
    alive = min(schedule.order + 1, computed)  # values whose gradients are being summed up
    rows = min(WINDOW, settings.iterations) * settings.batch
    return Memory(
        step=step.peak * (computed * contexts if settings.checkpointing == "none" else 1),
        values=(computed + alive) * contexts * values + values,  # those of the step that is recomputed
        numbers=table * (INDEX + 3 * FLOAT * images) + free * FLOAT * (rows + 2 * images),
        samples=schedule.steps * contexts * sample,
        images=images,
        accumulate=settings.accumulate,
        **more,
    )


def _computed(schedule: Schedule) -> int:
    """Steps."""
    at = schedule.output if schedule.level == "output" else ~schedule.compute.reshape(schedule.steps, -1)[:, 0]
    return int((~at).sum())


FLOAT, INDEX = 4, 16  # bytes: of a number, and of its place and start


def workspaces(device: torch.device) -> int:
    """Bytes that cuBLAS takes for itself: in torch's defaults 32 MiB on Hopper and later, else 8, of each thread's.

    Forward and backward passes run in two.
    """
    if device.type != "cuda":
        return 0
    return 2 * (32 if torch.cuda.get_device_capability(device)[0] >= 9 else 8) * 2**20


def available(device: torch.device) -> int:
    """Bytes that this process could hold on `device`, those that it does included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss
