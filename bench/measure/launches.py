"""How many launches a call makes: counted as they are dispatched, or in the code that TorchInductor made."""

from __future__ import annotations

import re
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CountLaunches(TorchDispatchMode):
    """Counts dispatched ops that compute: neither views nor bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not (func.is_view or name.startswith("empty") or name in ("_unsafe_view", "_reshape_alias")):
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_generated(sources: list[str]) -> int:
    """Kernels and library calls in the wrapper code TorchInductor generated."""
    call = r"^\s+(?:\w+(?:, \w+)* = )?(?:cpp_fused\w*|triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.\w+\.\w+[\w.]*)\("
    bodies = [source.split("def call(", 1)[-1].split("def benchmark", 1)[0] for source in sources]
    return sum(len(re.findall(call, body, re.MULTILINE)) for body in bodies)
