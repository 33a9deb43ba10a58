"""Functions that read tensors besides their arguments, a module's weights, compiled by TorchInductor: functions that do
the same share code, whatever their tensors hold.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .gelu import gelu_by_sigmoid
from .inductor import without_cut_files

KEPT = 256  # compiled functions, the last ones used

_compiled: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
_lock = threading.Lock()  # models are compiled in threads of their own


def compile_shared(function: Callable[..., None], examples: Sequence[Tensor]) -> Callable[..., None]:
    """`function` for tensors as `examples`, of which no two overlap; those it reads besides are read where they lie.

    All else it reads is baked in: numbers, shapes, which way its code goes. Its result is what it writes into its
    arguments. Raises whatever it does where it cannot be traced: it looks at a tensor's values, for instance.
    """
    with _lock, torch.no_grad():
        graph, read = _traced(function, examples)
        kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (*examples, *read))
        key = (graph.code, kinds, torch.get_num_threads())
        if key not in _compiled:
            _compiled[key] = _compile(graph, [*examples, *read])
            if len(_compiled) > KEPT:
                _compiled.popitem(last=False)
        _compiled.move_to_end(key)
        run = _compiled[key]

    def call(*arguments: Tensor) -> None:
        run(*arguments, *read)

    return call


def _compile(graph: Any, examples: list[Any]) -> Callable[..., Any]:
    import torch._inductor as inductor

    return without_cut_files(lambda: inductor.compile(graph, examples))


def _traced(function: Callable[..., None], examples: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """A graph whose inputs are `examples` and the tensors that `function` reads besides, and these."""
    from torch._subclasses import FakeTensor
    from torch.fx import GraphModule
    from torch.fx.experimental.proxy_tensor import make_fx

    gelu = {torch.ops.aten.gelu.default: _gelu}
    graph = make_fx(function, gelu, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    inputs: dict[int, Any] = {}
    read: list[Tensor] = []
    *_, last = (node for node in graph.graph.nodes if node.op == "placeholder")
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        tensor = getattr(graph, node.target)
        if isinstance(tensor, FakeTensor) or not isinstance(tensor, Tensor):
            raise TypeError(f"expected a function of tensors with data, got {type(tensor).__name__} {node.target}")
        if id(tensor) not in inputs:
            with graph.graph.inserting_after(last):
                last = inputs[id(tensor)] = graph.graph.placeholder(f"read_{len(read)}")
            last.meta = dict(node.meta)
            read.append(tensor.detach())
        node.replace_all_uses_with(inputs[id(tensor)])
        graph.graph.erase_node(node)
    return GraphModule(nn.Module(), graph.graph), read  # without the tensors


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return gelu_by_sigmoid(x.float()).to(x.dtype) if approximate == "tanh" else NotImplemented
