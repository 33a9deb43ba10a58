"""The model's own forward as CUDA graphs: each distinct step of a plan captured where it first comes, then replayed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from .cuda_graphs import CaptureFailed, Recorder, Replayable, capture_failed
from .inspection import Snapshot
from .loop import LoopGraph, Loops
from .program import ForwardStep

PLAIN = (bool, int, float, str, bytes, type(None))
PRIVATE = (
    "_active_adapter",
    "_attention_backend",
)  # of peft's layers, diffusers' processors; others are torch's


class _Inputs(NamedTuple):
    """Static copies of a call's tensors, and what they were last filled with."""

    leaves: list[Any]
    spec: TreeSpec
    filled: dict[int, tuple[weakref.ref[Tensor], int | None]]


class ForwardGraphs:
    """Graphs of one plan. All tensors among a call's arguments are copied into static inputs; the rest is baked in.

    Args:
        launch: (instructions, args, kwargs) -> the model's output, by launches.
        steps: of the plan's program.
    """

    def __init__(
        self,
        launch: Callable[[ForwardStep, tuple[Any, ...], dict[str, Any]], Any],
        model: Callable[[], nn.Module],
        steps: int,
        recorder: Recorder,
    ) -> None:
        self.launch, self.recorder, self.limit = launch, recorder, 2 * steps
        self.graphs: dict[tuple[ForwardStep, Hashable], tuple[Replayable, Any]] = {}
        self.loops = Loops()
        self._inputs: dict[Hashable, _Inputs] = {}
        self._model, self._state = model, state_of(model())

    def follow(self, model: nn.Module) -> None:
        """Drop graphs of a model that has changed since: other modules, tensors, hooks, numbers (a LoRA's scale)."""
        if (state := state_of(model)) != self._state:
            self.release()
            self._state = state

    def run(self, step: ForwardStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output at `step`, new tensors: the next replay does not touch them.

        Raises:
            CaptureFailed: the step cannot be captured; nothing is lost, and it may be launched plainly.
        """
        leaves, spec = tree_flatten((args, kwargs))
        call = _call_of(leaves, spec)
        key = (step, call)
        graph = self.graphs.get(key)
        if graph is None:
            self._warm_up(step, leaves, spec)
            self.follow(self._model())  # hooks may have brought the weights only now
            graph = self._capture(key, step, self._fill(call, leaves, spec))
        else:
            self._fill(call, leaves, spec)
        replayable, output = graph
        replayable.replay()
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)

    def loop(
        self, key: Hashable, inputs: Any, warm_up: Callable[[], Any], make: Callable[[Any], LoopGraph]
    ) -> LoopGraph:
        """The captured trajectory of `key` on `inputs`, a tree of what it reads beside noise: static copies are filled.

        Args:
            warm_up: brings the model to where it is captured, if there is no such trajectory.
            make: of the static copies.
        """
        leaves, spec = tree_flatten(inputs)
        call = _call_of(leaves, spec)
        if (key, call) not in self.loops.graphs:
            warm_up()
            self.follow(self._model())
        static = tree_unflatten(self._fill(call, leaves, spec).leaves, spec)

        def captured() -> LoopGraph:
            loop = make(static)
            self._expect_in_place(loop.release)
            return loop

        loop = self.loops.get((key, call), captured)
        used = {own for _, own in (*self.graphs, *self.loops.graphs)}
        self._inputs = {own: inputs for own, inputs in self._inputs.items() if own in used}
        return loop

    def _fill(self, call: Hashable, leaves: list[Any], spec: TreeSpec) -> _Inputs:
        if call not in self._inputs:
            static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._inputs[call] = _Inputs(static, spec, {})
        inputs = self._inputs[call]
        for number, (static, leaf) in enumerate(zip(inputs.leaves, leaves)):
            if not isinstance(leaf, Tensor):
                continue
            version = None if leaf.is_inference() else leaf._version
            source, was = inputs.filled.get(number, (None, None))
            if source is None or source() is not leaf or version is None or version != was:
                static.copy_(leaf)
                inputs.filled[number] = (weakref.ref(leaf), version)
        return inputs

    def _warm_up(self, step: ForwardStep, leaves: list[Any], spec: TreeSpec) -> None:
        if len(self.graphs) == self.limit:
            raise CaptureFailed(
                f"expected at most {self.limit} graphs, got more: arguments that are no tensors change from call to "
                "call"
            )
        try:  # models take from the dicts they are given
            self.recorder.warm_up(lambda: self.launch(step, *tree_unflatten(leaves, spec)))
        except Exception as error:
            raise capture_failed(error, "a call of the model's own forward") from error

    def _capture(self, key: tuple[ForwardStep, Hashable], step: ForwardStep, inputs: _Inputs) -> tuple[Replayable, Any]:
        try:
            graph = self.recorder.capture(lambda: self.launch(step, *tree_unflatten(inputs.leaves, inputs.spec)))
        except Exception as error:
            raise capture_failed(error, "a call of the model's own forward") from error
        self._expect_in_place(graph[0].reset)
        self.graphs[key] = graph
        return graph

    def _expect_in_place(self, give_up: Callable[[], None]) -> None:
        if Snapshot.of(self._model()).places != self._state[0].places:
            give_up()
            raise CaptureFailed(
                "expected a forward that leaves the model's weights where they are, got one that moved some: layerwise "
                "casting, or offloading within it"
            )

    def release(self) -> None:
        """Free the graphs' memory once no replay is under way."""
        if self.graphs:
            self.recorder.synchronize()
        for graph, _ in self.graphs.values():
            graph.reset()
        self.graphs.clear()
        self.loops.release()
        self._inputs.clear()


def _call_of(leaves: list[Any], spec: TreeSpec) -> Hashable:
    """All that a graph bakes in of its inputs. Raises CaptureFailed if that cannot be compared."""
    constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    kinds = tuple((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else None for t in leaves)
    try:
        hash(constants)
    except TypeError as error:
        raise CaptureFailed(f"expected arguments that can be compared from call to call: {error}") from None
    return str(spec), constants, kinds


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """All that a captured forward of `model` has baked in, as far as its modules tell."""
    holders = [(name, vars(module)) for name, module in model.named_modules()]
    processors = [(f"{name}.processor", own["processor"]) for name, own in holders if "processor" in own]
    holders += [(name, vars(processor)) for name, processor in processors if hasattr(processor, "__dict__")]
    numbers = [
        (name, attribute, _plain(value))
        for name, own in holders
        for attribute, value in own.items()
        if isinstance(value, (*PLAIN, dict, list, tuple)) and (attribute[:1] != "_" or attribute in PRIVATE)
    ]
    return Snapshot.of(model), numbers, torch.is_autocast_enabled()


def _plain(value: Any) -> Any:
    """`value` as far as it is numbers and text."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if isinstance(v, (*PLAIN, dict, list, tuple))}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value if isinstance(v, (*PLAIN, dict, list, tuple))]
    return value
