"""Blocks of a model's own forward, compiled by TorchInductor: blocks of a kind share code, weights are its arguments.

The model is left as it is: what is compiled is kept here, and takes a block as its first argument.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from .inspection import Snapshot, global_hooks
from .kernels.inductor import CompilerMissing, first_line, missing_compiler, without_cut_files
from .models.blocks import block_lists


@dataclass(frozen=True, slots=True)
class CompiledBlocksReport:
    """What compiling a model's blocks came to.

    Attributes:
        blocks: how many the model has.
        kinds: of blocks that were called: class, modules within, shapes, strides, dtypes and devices of their weights.
        compiles: for other numbers of dimensions, attributes or a batch of 1 there are more than one a kind.
        seconds: they took, together with the calls they were for.
        graph_breaks: kinds that TorchDynamo cannot take whole.
        eager: blocks that run as they are, and why.
    """

    blocks: int
    kinds: int
    compiles: int
    seconds: float
    graph_breaks: int
    eager: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{self.blocks - len(self.eager)} of {self.blocks} blocks compiled, what lies between them is not: "
            f"{self.compiles} compiles of {self.kinds} kinds in {self.seconds:.2f} s, {self.graph_breaks} graph breaks"
        ]
        for reason in dict.fromkeys(self.eager.values()):
            names = [name for name, why in self.eager.items() if why == reason]
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {', '.join(names[:3])}{rest} eager: {reason}")
        return "\n".join(lines)


@dataclass(eq=False, slots=True)
class _Kind:
    """Blocks that share code."""

    call: Callable[..., Any]
    called: bool = False
    broken: bool = False
    failed: str | None = None  # why they run as they are from now on


class CompiledBlocks:
    """The blocks of `model`'s lists; as they are at the last `follow`, which the start of a run calls.

    Attributes:
        blocks: all of them, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.blocks: dict[str, nn.Module] = {}
        self.compiles, self.seconds = 0, 0.0
        self._state: Snapshot | None = None
        self._kinds: dict[Hashable, _Kind] = {}
        self._kind_of: dict[nn.Module, _Kind] = {}
        self._refused: dict[nn.Module, str] = {}

    def follow(self, device: torch.device) -> None:
        """Look at the model anew: other blocks, layers and hooks.

        Raises:
            CompilerMissing: nothing can be compiled for `device`.
        """
        if reason := missing_compiler(device.type):
            raise CompilerMissing(reason)
        if (state := Snapshot.of(self._model)) == self._state:
            return
        lists = block_lists(self._model)
        self.blocks = {f"{name}.{number}": b for name, blocks in lists.items() for number, b in enumerate(blocks)}
        refusals = {block: _refusal(block) for block in self.blocks.values()}
        self._refused = {block: reason for block, reason in refusals.items() if reason is not None}
        self._kind_of = {}
        for block in self.blocks.values():
            if block not in self._refused:
                if (signature := _signature(block)) not in self._kinds:
                    self._kinds[signature] = _Kind(self._compiled())
                self._kind_of[block] = self._kinds[signature]
        self._state = state

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Around a forward that calls what `of` returns: says how to compile what is not compiled yet.

        All sizes are dynamic from the first call on, and two that are equal by chance are not taken for one: so there
        are two compiles at most, for a batch of 1 and for others. `torch.compile(dynamic=True)` would say it anew, at a
        tenth of a millisecond, for each block.
        """
        from torch._dynamo import config
        from torch.fx.experimental import _config

        dynamo: Any = config  # `patch` is put into both modules as torch is imported
        shapes: Any = _config
        with dynamo.patch(assume_static_by_default=False), shapes.patch(use_duck_shape=False):
            yield

    def of(self, block: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        """What runs `block`: its compiled call, or `plain`, its own."""
        kind = self._kind_of.get(block)
        return plain if kind is None or kind.failed else partial(self._run, kind, block, plain)

    def _run(self, kind: _Kind, block: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException, Unsupported  # imports triton

        kind.called = True
        before, started = self.compiles, time.perf_counter()
        try:
            result = kind.call(block, *_dense(args), **_dense(kwargs))
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            result = plain(*args, **kwargs)  # what is wrong with the call itself is raised here
            what = {Unsupported: "graph break", FailOnRecompileLimitHit: "too many compiles"}.get(type(error), "failed")
            kind.failed = f"{what}: {first_line(error)}"
            kind.broken = isinstance(error, Unsupported)
        if self.compiles != before:
            self.seconds += time.perf_counter() - started
        return result

    def _compiled(self) -> Callable[..., Any]:
        """A block's call with code of its own: TorchDynamo keeps, and limits, what it compiles by code object."""
        own = types.FunctionType(_call.__code__.replace(), globals(), _call.__name__)
        return torch.compile(
            own, backend=self._inductor, fullgraph=True, options={"guard_filter_fn": self._guards_to_check}
        )

    def _guards_to_check(self, guards: Sequence[Any]) -> list[bool]:
        """All but those on what weights look like: blocks of a kind agree in it, and `follow` looks at each run."""
        weights = {id(weight) for weight in self._model.parameters() if type(weight) is nn.Parameter}
        return [guard.guard_type != "TENSOR_MATCH" or id(guard.value) not in weights for guard in guards]

    def _inductor(self, graph: Any, examples: Any) -> Callable[..., Any]:
        from torch._dynamo import lookup_backend

        made = without_cut_files(lambda: lookup_backend("inductor")(graph, examples))
        self.compiles += 1
        return made

    def report(self) -> CompiledBlocksReport:
        reasons = {
            name: self._refused[block] if block in self._refused else self._kind_of[block].failed
            for name, block in self.blocks.items()
        }
        called = [kind for kind in self._kinds.values() if kind.called]
        return CompiledBlocksReport(
            blocks=len(self.blocks),
            kinds=len(called),
            compiles=self.compiles,
            seconds=self.seconds,
            graph_breaks=sum(kind.broken for kind in called),
            eager={name: reason for name, reason in reasons.items() if reason is not None},
        )


def _call(block: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return block.forward(*args, **kwargs)  # a block with hooks is not compiled


def _dense(value: Any) -> Any:
    """Arguments with each tensor as any other of its shape, in the same memory where it is contiguous.

    Strides, those of a size of 1 too, where its storage begins and whether it is a view are part of what code is
    compiled for: what the model's first layer transposed or a block split off would be compiled for apart. What is
    expanded stays so.
    """
    if type(value) in (tuple, list):
        return type(value)(map(_dense, value))
    if type(value) is dict:
        return {name: _dense(part) for name, part in value.items()}
    if type(value) is not Tensor or value.is_conj() or value.is_neg():
        return value
    if not value.is_contiguous():
        expanded = any(size > 1 and step == 0 for size, step in zip(value.shape, value.stride()))
        return value if expanded else value.clone(memory_format=torch.contiguous_format)
    strides = [1] * value.ndim
    for axis in range(value.ndim - 1, 0, -1):
        strides[axis - 1] = strides[axis] * max(value.shape[axis], 1)
    if not value._is_view() and value.stride() == tuple(strides) and not value.storage_offset():
        return value
    start = value.storage_offset() * value.itemsize
    own = value.untyped_storage()[start : start + value.nbytes]  # keeps the whole
    return torch.empty(0, dtype=value.dtype, device=value.device).set_(own, 0, value.shape, strides)


def _refusal(block: nn.Module) -> str | None:
    """Why `block` is to run as it is: what TorchDynamo would not look at again, or not take."""
    if any(global_hooks(everywhere)):
        return "forward hooks on all modules"
    for name, module in block.named_modules():
        where = f" of its {name}" if name else ""
        if module._forward_hooks or module._forward_pre_hooks:
            return f"forward hooks{where}"
        if "forward" in vars(module):
            return f"another forward{where} than its class has (offloading or casting put it there)"
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return f"torch.compile compiled it already{where}"
    return None


def _signature(block: nn.Module) -> Hashable:
    """What blocks that share code agree in."""
    modules = [(name, type(module)) for name, module in block.named_modules()]
    tensors = [
        (name, type(t), t.shape, t.stride(), t.dtype, t.device)
        for name, t in (*block.named_parameters(), *block.named_buffers())
    ]
    return tuple(modules), tuple(tensors)
