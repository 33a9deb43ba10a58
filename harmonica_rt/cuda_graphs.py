"""A plan's steps as CUDA graphs: capture each distinct step once, then replay."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .program import ReuseOutput, Step

if TYPE_CHECKING:
    from .executor import Plan


class CaptureFailed(RuntimeError):
    """A step could not be captured; the message names the step and the instruction."""


class Replayable(Protocol):
    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Recorder(Protocol):
    """What captures launches: CUDA, or the tests' emulator of it."""

    def warm_up(self, launch: Callable[[], Tensor]) -> None: ...

    def capture(self, launch: Callable[[], Tensor]) -> tuple[Replayable, Tensor]: ...

    def synchronize(self) -> None: ...


def capture_failed(error: Exception, where: str) -> CaptureFailed:
    """What to raise for `error`; `where` it was, unless a note of its own says so.

    Ending a capture that failed raises once more: the error that says why is then behind that one.
    """
    first: BaseException | None = error
    while first is not None and not hasattr(first, "__notes__"):
        first = first.__context__
    cause = error if first is None else first
    where = "; ".join(getattr(cause, "__notes__", (f"at {where}",)))
    return CaptureFailed(f"capture failed {where}: {type(cause).__name__}: {cause}")


@contextlib.contextmanager
def _fresh_workspaces() -> Iterator[None]:
    """Have cuBLAS allocate its workspaces anew within, and never use these outside.

    A graph keeps a workspace's address. One from before the capture may be freed behind its back, as torch.compile's
    own graphs do (mode="reduce-overhead"), and replays would then write into whatever lies there.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class CudaRecorder:
    """Captures on a side stream; all graphs of a plan share one memory pool, since they never run side by side."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"backend cudagraph: expected a model on a CUDA device, got one on {device}")
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, launch: Callable[[], Tensor]) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            launch()
        current.wait_stream(self.stream)

    def capture(self, launch: Callable[[], Tensor]) -> tuple[Replayable, Tensor]:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        with (
            torch.cuda.device(self.device),  # the one that torch.cuda.graph waits for
            torch.cuda.stream(current),  # it leaves its own set where a failed capture cannot be ended
            _fresh_workspaces(),
            # By default a capture also fails for what other threads do meanwhile
            torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
        ):
            output = launch()
        return graph, output

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class InputGraphs:
    """Work on buffers that depends on a few small tensors alone: captured the first time, replayed from then on.

    The tensors are copied into buffers of the graph's own.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.graphs: dict[tuple[Any, ...], tuple[tuple[Tensor, ...], Replayable]] = {}

    def run(self, name: str, key: Hashable, launch: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
        """`launch(*inputs)`.

        Args:
            name: of the work, for errors.
            key: what `launch` depends on beside `inputs` and what they are shaped like.

        Raises:
            CaptureFailed: the work was done, and can't be captured.
        """
        key = (name, key, *((t.shape, t.dtype) for t in inputs))
        if key in self.graphs:
            own, graph = self.graphs[key]
            for mine, given in zip(own, inputs):
                mine.copy_(given)
            graph.replay()
            return
        own = tuple(t.clone() for t in inputs)

        def launch_on_own() -> Tensor:
            launch(*own)
            return own[0]

        try:
            self.recorder.warm_up(launch_on_own)  # and this is the first run
            graph, _ = self.recorder.capture(launch_on_own)
        except Exception as error:
            raise capture_failed(error, name) from error
        self.graphs[key] = own, graph

    def free(self) -> None:
        for _, graph in self.graphs.values():
            graph.reset()
        self.graphs.clear()


class StepGraphs:
    """One graph for each distinct step of a plan's program.

    Inputs are static: the sample is copied into a buffer, the step's number into `plan.step`, and modulation rows lie
    where the plan keeps them. The output is handed out as a copy: diffusers' multistep schedulers keep outputs for
    several steps, so that no fixed number of buffers would do.

    Attributes:
        inputs: what fills modulation rows and text from a run's conditioning.
        seconds: that warming up and capturing took.
    """

    def __init__(self, plan: Plan, recorder: Recorder) -> None:
        started = time.perf_counter()
        self.plan, self.recorder = weakref.proxy(plan), recorder  # the plan owns this
        self.inputs = InputGraphs(recorder)
        shape = plan.shape
        size = (shape.batch, plan.adapter.in_channels, shape.height, shape.width)
        self.sample = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self.graphs: dict[Step | ReuseOutput, tuple[Replayable, Tensor]] = {}
        distinct = {step: i for i, step in reversed(list(enumerate(plan.program.steps)))}  # the first of each kind
        step = 0
        try:
            for step in sorted(distinct.values()):
                if not isinstance(plan.program.steps[step], ReuseOutput):
                    plan.calls(step)
            plan.select(0)
            # Step 0 computes everything, so that no kernel is new to later steps but those that reuse the output
            for step in {type(plan.program.steps[i]): i for i in sorted(distinct.values(), reverse=True)}.values():
                recorder.warm_up(self._launch(step))
            for step in sorted(distinct.values()):
                self.graphs[plan.program.steps[step]] = recorder.capture(self._launch(step))
        except Exception as error:
            self._free()
            raise capture_failed(error, f"step {step}") from error
        self.of_step = [self.graphs[step] for step in plan.program.steps]  # hashing a step takes longer than a replay
        self.seconds = time.perf_counter() - started

    def _launch(self, step: int) -> Callable[[], Tensor]:
        return lambda: self.plan.launch(step, self.sample)

    def run(self, step: int, sample: Tensor) -> Tensor:
        """The model's output at `step`, a new tensor: the next replay does not touch it."""
        graph, output = self.of_step[step]
        self.plan.select(step)
        self.sample.copy_(sample)
        graph.replay()
        return output.clone()

    def measure(self, rounds: int = 3) -> bool:
        """Time whole runs replayed and launched plainly, in turn, for `plan.measured`. Is replay the faster?"""
        times: dict[str, list[float]] = {"graphs": [], "launches": []}
        for _ in range(rounds):
            for name, run in (("graphs", self.run), ("launches", self.plan.run_plainly)):
                self.recorder.synchronize()
                started = time.perf_counter()
                for step in range(len(self.plan.program.steps)):
                    run(step, self.sample)
                self.recorder.synchronize()
                times[name].append(time.perf_counter() - started)
        replayed, launched = min(times["graphs"]), min(times["launches"])
        self.plan.measured = replayed, launched
        return replayed <= launched

    def release(self) -> None:
        """Free the graphs' memory once no replay is under way, and let the plan launch plainly."""
        self.recorder.synchronize()
        self._free()

    def _free(self) -> None:
        for graph, _ in self.graphs.values():
            graph.reset()
        self.graphs.clear()
        self.inputs.free()
        self.of_step = []
        self.plan.graphs = None
