"""What the recorder and plans ask of CUDA's devices and streams, on fakes that keep the order of what was asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from harmonica_rt.cuda_graphs import CudaRecorder, capture_failed
from harmonica_rt.streams import Streams

ONE = torch.device("cuda", 1)


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class Cuda:
    """The state of a thread: its device and stream."""

    def __init__(self) -> None:
        self.device, self.log = torch.device("cuda", 0), []
        self.current = self.default = Stream(self, "default")

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.device = before

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def capture(self) -> type:
        cuda = self

        class Graph:
            """As torch's: entering sets its stream, and where ending the capture raises it stays set."""

            def __init__(self, graph: Any, pool: Any, stream: Stream, capture_error_mode: str) -> None:
                self.stream, self.mode, self.before = stream, capture_error_mode, cuda.current

            def __enter__(self) -> None:
                cuda.log.append(f"synchronize {cuda.device}")
                cuda.current = self.stream
                cuda.log.append(f"capture on {self.stream.name}, {self.mode}")

            def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
                if error is not None:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                cuda.current = self.before

        return Graph


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    fakes = {
        "Stream": lambda device: Stream(made, "side"),
        "current_stream": lambda device: made.current,
        "stream": made.stream,
        "device": made.on,
        "graph": made.capture(),
        "CUDAGraph": object,
        "graph_pool_handle": object,
        "is_initialized": lambda: True,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clear = lambda: made.log.append(f"cuBLAS workspaces freed on {made.current.name}")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    return made


def test_a_capture_is_of_the_models_device_with_workspaces_of_its_own(cuda: Cuda) -> None:
    recorder = CudaRecorder(ONE)
    recorder.capture(lambda: cuda.log.append(f"launch on {cuda.current.name}, {cuda.device}"))
    assert cuda.log == [
        "cuBLAS workspaces freed on default",
        "synchronize cuda:1",
        "capture on side, thread_local",
        "launch on side, cuda:1",
        "cuBLAS workspaces freed on default",
    ]
    assert (cuda.device.index, cuda.current) == (0, cuda.default)


def test_a_capture_that_fails_leaves_stream_and_device_and_says_what_came_first(cuda: Cuda) -> None:
    recorder = CudaRecorder(ONE)

    def launch() -> torch.Tensor:
        error = ValueError("read a device value")
        error.add_note("at step 2, instruction 3: Gap")
        raise error

    with pytest.raises(RuntimeError, match="previous error") as raised:
        recorder.capture(launch)
    assert (cuda.device.index, cuda.current) == (0, cuda.default)
    wanted = "capture failed at step 2, instruction 3: Gap: ValueError: read a device value"
    assert str(capture_failed(raised.value, "step 2")) == wanted
    assert str(capture_failed(KeyError("x"), "step 1")) == "capture failed at step 1: KeyError: 'x'"


def test_a_warm_up_waits_and_is_waited_for(cuda: Cuda) -> None:
    CudaRecorder(ONE).warm_up(lambda: cuda.log.append(f"launch on {cuda.current.name}"))
    assert cuda.log == ["side waits for default", "launch on side", "default waits for side"]


def test_a_plan_used_on_another_stream_waits_for_the_last_and_is_freed_in_order(cuda: Cuda) -> None:
    streams, a, b = Streams(ONE), Stream(cuda, "a"), Stream(cuda, "b")
    streams.enter()
    assert cuda.log == []
    for stream in (a, a, b):
        with cuda.stream(stream):
            streams.enter()
    assert cuda.log == ["a waits for default", "b waits for a"]
    streams.leave()
    streams.leave()
    assert cuda.log[2:] == ["default waits for b"], "its memory belongs to the stream it was made on"


def test_without_cuda_there_is_nothing_to_wait_for() -> None:
    streams = Streams(torch.device("cpu"))
    streams.enter()
    streams.leave()
    assert streams.last is None
