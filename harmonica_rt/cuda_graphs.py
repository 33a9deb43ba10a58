"""A plan's steps as CUDA graphs: capture each distinct step once, then replay."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .program import ReuseOutput, Step


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
    """One graph for each distinct step of a program.

    Inputs are static: the sample is copied into a buffer, the step is selected on the device, and modulation rows lie
    where the plan keeps them. The output is handed out as a copy: diffusers' multistep schedulers keep outputs for
    several steps, so that no fixed number of buffers would do.

    Args:
        launches: of a step's number, (sample) -> the model's output; nothing of the host goes to the device in it.
        select: has kernels use the modulation rows of a step.
        sample: the buffer.

    Attributes:
        seconds: that warming up and capturing took.
    """

    def __init__(
        self,
        steps: Sequence[Step | ReuseOutput],
        launches: Callable[[int], Callable[[Tensor], Tensor]],
        select: Callable[[int], None],
        sample: Tensor,
        recorder: Recorder,
    ) -> None:
        started = time.perf_counter()
        self.select, self.sample, self.recorder = select, sample, recorder
        self.graphs: dict[Step | ReuseOutput, tuple[Replayable, Tensor]] = {}
        distinct = sorted({step: i for i, step in reversed(list(enumerate(steps)))}.values())  # the first of each kind
        step, made = 0, {}
        try:
            for step in distinct:
                made[step] = partial(launches(step), sample)
            select(0)
            # Step 0 computes everything, so that no kernel is new to later steps but those that reuse the output
            for step in {type(steps[i]): i for i in reversed(distinct)}.values():
                recorder.warm_up(made[step])
            for step in distinct:
                self.graphs[steps[step]] = recorder.capture(made[step])
        except Exception as error:
            self._free()
            raise capture_failed(error, f"step {step}") from error
        self.of_step = [self.graphs[step] for step in steps]  # hashing a step takes longer than a replay
        self.seconds = time.perf_counter() - started

    def run(self, step: int, sample: Tensor) -> Tensor:
        """The model's output at `step`, a new tensor: the next replay does not touch it."""
        graph, output = self.of_step[step]
        self.select(step)
        self.sample.copy_(sample)
        graph.replay()
        return output.clone()

    def measure(self, plainly: Callable[[int, Tensor], Tensor], rounds: int) -> tuple[float, float]:
        """Seconds of a whole run replayed, and of one by `plainly`, in turn; the best of `rounds`."""
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for run, taken in zip((self.run, plainly), times):
                self.recorder.synchronize()
                started = time.perf_counter()
                for step in range(len(self.of_step)):
                    run(step, self.sample)
                self.recorder.synchronize()
                taken.append(time.perf_counter() - started)
        return min(times[0]), min(times[1])

    def release(self) -> None:
        """Free the graphs' memory once no replay is under way."""
        self.recorder.synchronize()
        self._free()

    def _free(self) -> None:
        for graph, _ in self.graphs.values():
            graph.reset()
        self.graphs.clear()
        self.of_step = []
