"""CUDA graph capture, emulated on the CPU: records launches with their storages, refuses what capture refuses, replays.

Replaying runs the recorded ops again on the tensors they were recorded with, so that stale host values, wrong
addresses and fresh tensors show as wrong numbers. Before each replay everything allocated while capturing is poisoned:
nothing may be read that the graph itself has not written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = {
    "_local_scalar_dense": "reads a device value on the host",
    "item": "reads a device value on the host",
    "is_nonzero": "reads a device value on the host",
    "equal": "reads a device value on the host",
    "nonzero": "has a data-dependent shape",
    "masked_select": "has a data-dependent shape",
    "_unique2": "has a data-dependent shape",
    "unique_dim": "has a data-dependent shape",
    "lift_fresh": "brings fresh host data to the device",
}
ALLOCATIONS = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted")


class Refused(RuntimeError):
    """What CUDA would refuse with cudaErrorStreamCaptureUnsupported."""


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _argument(func: Any, args: tuple, kwargs: dict, name: str, missing: Any) -> Any:
    """Value of an op's argument, its default if not given, `missing` if the op has no such argument."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[position] if position < len(args) else kwargs.get(name, argument.default_value)
    return missing


class EmulatedGraph(TorchDispatchMode):
    """A recording: ops, the tensors they took and those they made."""

    capturing = False  # of any graph: CUDA captures one at a time

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.made: dict[int, Tensor] = {}  # by storage: what the graph's pool holds
        self.kept: list[Any] = []
        self.replays = 0
        self.host: set[int] = set()  # storages of tensors that live on the host: capture does not see work on them

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        inputs = _tensors((args, kwargs))
        if inputs and all(_storage(t) in self.host for t in inputs):
            out = func(*args, **kwargs)
            self.host.update(map(_storage, _tensors(out)))
            self.kept.append(out)  # a freed storage's address may come back as another tensor's
            return out
        if name in REFUSED:
            raise Refused(f"operation not permitted while capturing: {name} {REFUSED[name]}")
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise Refused(f"operation not permitted while capturing: {name} depends on data")
        if torch.Tag.nondeterministic_seeded in func.tags and _argument(func, args, kwargs, "dropout_p", 1.0) != 0.0:
            raise Refused(f"operation not permitted while capturing: {name} draws random numbers")
        if len({t.device.type for t in _tensors((args, kwargs)) if t.ndim}) > 1:
            raise Refused(f"operation not permitted while capturing: {name} copies between devices")
        out = func(*args, **kwargs)
        taken = {_storage(t) for t in _tensors((args, kwargs))}
        results = _tensors(out)
        for result in results:
            if _storage(result) not in taken:
                self.made.setdefault(_storage(result), result)
        if not func.is_view and name not in ALLOCATIONS:
            self.ops.append((func, args, kwargs, [t.detach() for t in results]))  # whose shapes stay: matmul squeezes
        return out

    def replay(self) -> None:
        assert not EmulatedGraph.capturing, "replay while capturing"
        self.replays += 1
        with torch.no_grad():
            for tensor in self.made.values():
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                whole.fill_(torch.nan if tensor.is_floating_point() else 77)
            for func, args, kwargs, results in self.ops:
                taken = {_storage(t) for t in _tensors((args, kwargs))}
                again = _tensors(func(*args, **kwargs))
                for result, value in zip(results, again, strict=True):
                    if _storage(result) not in taken:
                        result.copy_(value)

    def reset(self) -> None:
        self.ops.clear()
        self.made.clear()


class Emulator:
    """The recorder that stands in for CUDA's. Counts what it is asked to do."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.warm_ups = 0
        self.host: Callable[[], list[Tensor]] = list  # tensors to take for host ones when a capture begins
        self.graphs: list[EmulatedGraph] = []

    def warm_up(self, launch: Callable[[], Tensor]) -> None:
        self.warm_ups += 1
        launch()

    def capture(self, launch: Callable[[], Tensor]) -> tuple[EmulatedGraph, Tensor]:
        if EmulatedGraph.capturing:
            raise Refused("a capture is already under way")
        graph = EmulatedGraph()
        graph.host.update(map(_storage, self.host()))
        EmulatedGraph.capturing = True
        try:
            with graph:
                output = launch()
        finally:
            EmulatedGraph.capturing = False
        self.graphs.append(graph)
        return graph, output

    def synchronize(self) -> None:
        pass
