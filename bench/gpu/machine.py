"""The card a run is on, or a CPU in its place: clocks, memory, graphs behind the same names."""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import harmonica_rt.compiled
from harmonica_rt.cuda_graphs import CudaRecorder, Recorder


class Machine:
    """A CUDA device.

    Attributes:
        device: with its index.
        dry: whether this is a rehearsal: sizes are tiny and figures mean nothing.
        name: of the card.
        kept: what a case left for the next one, until `forget`.
    """

    dry = False
    kept: Any = None

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)

    @property
    def slug(self) -> str:
        """The card's name, for file names."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def usable(self) -> bool:
        """Whether the device still works: after an illegal access every later call of the process fails."""
        try:
            torch.ones(8, device=self.device).sum().item()
        except RuntimeError:
            return False
        return True

    def forget(self) -> None:
        """Free what the last case left."""
        self.kept = None
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()

    def memory(self) -> dict[str, int]:
        """Bytes in tensors, and bytes held by the allocator, private pools of graphs included."""
        return {
            "allocated": torch.cuda.memory_allocated(self.device),
            "reserved": torch.cuda.memory_reserved(self.device),
        }

    def peak(self, run: Callable[[], Any]) -> int:
        """Bytes in tensors at the worst moment of `run`, those there before included."""
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device)

    def clocked(self, run: Callable[[], Any], seconds: list[float]) -> Callable[[], None]:
        """`run`, waited for; what it took by the device's own clock is added to `seconds`."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timed() -> None:
            begin.record()
            run()
            end.record()
            self.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)

        return timed

    def recorder(self) -> Recorder:
        return CudaRecorder(self.device)

    def repeated(self, run: Callable[[], Any], times: int) -> Callable[[], None]:
        """`run` so many times as one graph: what kernels take, without what it takes to launch them."""
        recorder = self.recorder()

        def launch() -> torch.Tensor:
            for _ in range(times):
                run()
            return torch.empty(0, device=self.device)

        recorder.warm_up(launch)
        graph, _ = recorder.capture(launch)
        return graph.replay

    def another_stream(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(torch.cuda.Stream(self.device))

    @contextlib.contextmanager
    def graphs(self) -> Iterator[None]:
        """Where compiled models capture."""
        yield


class Rehearsal(Machine):
    """A CPU in a card's place: events are the host's clock, graphs the tests' emulator, memory is not counted."""

    dry = True

    def __init__(self) -> None:
        self.device, self.name = torch.device("cpu"), "dry run"
        self.loops: list[Any] = []  # samplers of captured loops

    def synchronize(self) -> None:
        pass

    def forget(self) -> None:
        self.kept = None
        torch._dynamo.reset()
        gc.collect()

    def memory(self) -> dict[str, int]:
        return {"allocated": 0, "reserved": 0}

    def peak(self, run: Callable[[], Any]) -> int:
        run()
        return 0

    def clocked(self, run: Callable[[], Any], seconds: list[float]) -> Callable[[], None]:
        def timed() -> None:
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)

        return timed

    def recorder(self) -> Recorder:
        from tests.emulator import Emulator

        made = Emulator()
        made.host = lambda: [v for loop in self.loops[-1:] for v in vars(loop).values() if isinstance(v, torch.Tensor)]
        return made

    def repeated(self, run: Callable[[], Any], times: int) -> Callable[[], None]:
        def repeat() -> None:  # compiled functions cannot be emulated: they are opaque to dispatch modes
            for _ in range(times):
                run()

        return repeat

    def another_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graphs(self) -> Iterator[None]:
        compiled, copied = harmonica_rt.compiled, harmonica_rt.compiled.copied
        kept = compiled.CompiledTransformer._recorder

        def noted(scheduler: Any) -> Any:
            self.loops.append(copied(scheduler))  # its tables stay on the host, where no graph sees them
            return self.loops[-1]

        compiled.copied = noted
        compiled.CompiledTransformer._recorder = staticmethod(lambda device: self.recorder())
        try:
            yield
        finally:
            compiled.copied, compiled.CompiledTransformer._recorder = copied, kept
