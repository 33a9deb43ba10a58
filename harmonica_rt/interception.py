"""Calls of a model's blocks, one by one, while its own forward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

# handle(number of the block, what runs it, its arguments) -> what the forward gets of it
Handler = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_CALL = "_compiled_call_impl"  # what nn.Module.__call__ asks for first: around hooks and torch.compile


@contextmanager
def intercepted(blocks: Sequence[nn.Module], handle: Handler) -> Iterator[None]:
    """Calls of `blocks` go to `handle`, hooks, offloading and compiled code within; afterwards they are as before.

    Raises:
        RuntimeError: calls of these blocks go to another handler already, in another thread.
    """
    before = [vars(block).get(_CALL) for block in blocks]
    if any(isinstance(call, _Intercepted) for call in before):
        raise RuntimeError(
            "concurrent use: this model is already running in another thread, compiled for other values; compile a "
            "copy of it for each thread"
        )
    try:
        for number, (block, call) in enumerate(zip(blocks, before)):
            vars(block)[_CALL] = _Intercepted(handle, number, block._call_impl if call is None else call)
        yield
    finally:
        for block, call in zip(blocks, before):
            if call is None:
                vars(block).pop(_CALL, None)
            else:
                vars(block)[_CALL] = call


class _Intercepted:
    __slots__ = ("call", "handle")

    def __init__(self, handle: Handler, number: int, call: Callable[..., Any]) -> None:
        self.handle, self.call = partial(handle, number), call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handle(self.call, args, kwargs)
