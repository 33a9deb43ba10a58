"""The cudagraph backend as it ships, on the emulator: same numbers as eager, whatever happens between replays."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import harmonica_rt as hrt
from harmonica_rt.cuda_graphs import CaptureFailed
from harmonica_rt.kernels.inductor import CompilerMissing

from .conftest import Calls, TextCalls, assert_close, make_dit, make_pixart, random_schedule
from .emulator import Emulator


def compile_graphs(model: torch.nn.Module, schedule: hrt.Schedule, **options: object) -> tuple:
    fast = hrt.compile(model, schedule, backend="cudagraph", **options)
    recorders: list[Emulator] = []

    def recorder(device: torch.device) -> Emulator:
        recorders.append(Emulator())
        return recorders[-1]

    fast._recorder = recorder
    return fast, recorders


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("learned", [False, True])
def test_replays_equal_eager(order: int, learned: bool) -> None:
    model, schedule = make_dit(), random_schedule(order, order=order, learned=learned)
    eager = hrt.compile(model, schedule, backend="eager")
    fast, _ = compile_graphs(model, schedule)
    for seed in range(3):
        calls = Calls(6, seed=seed)
        # Modulation rows of all steps come of one GEMM here, and of one a step there: rounded otherwise
        assert_close(calls.run(fast), calls.run(eager), 3e-5)
        for step in range(4):  # a run cut short
            Calls(6, seed=90 + seed).call(fast, step)


@pytest.mark.parametrize("order", [0, 2])
def test_replays_follow_the_text(order: int) -> None:
    """Keys and values lie in static buffers that each run fills; branches without norm or gate are captured too."""
    model, schedule = make_pixart(), random_schedule(order, order=order, model="PixArtTransformer2DModel")
    eager = hrt.compile(model, schedule, backend="eager")
    fast, recorders = compile_graphs(model, schedule)
    for seed in range(3):
        calls = TextCalls(model, 6, mask=("mask", "none", "bias")[seed], seed=seed)
        assert_close(calls.run(fast), calls.run(eager), 1e-5)
    assert len(recorders) == 1, "one plan serves all prompts of a length"


def test_outputs_survive_the_next_replays() -> None:
    model, calls = make_dit(), Calls(6)
    fast, _ = compile_graphs(model, random_schedule(1))
    outputs, copies = [], []
    for step in range(6):
        outputs.append(calls.call(fast, step))
        copies.append(outputs[-1].clone())
    assert_close(outputs, copies, 0.0)


def test_steps_alike_share_a_graph() -> None:
    model, calls = make_dit(), Calls(12)
    schedule = hrt.Schedule.uniform(model, 12, every=2, order=0)
    fast, (recorders) = compile_graphs(model, schedule)
    eager = hrt.compile(model, schedule, backend="eager")
    assert_close(calls.run(fast), calls.run(eager), 1e-5)
    (emulator,) = recorders
    assert fast.report().plans[0].graphs == 2
    assert emulator.warm_ups == 2
    assert [graph.replays for graph in emulator.graphs] == [6, 6, 12], "two kinds of step, and modulation rows"


def test_graphs_are_captured_once_and_freed() -> None:
    model = make_dit()
    fast, recorders = compile_graphs(model, random_schedule(2), plans=1)
    one, two = Calls(6, batch=1), Calls(6, batch=2)
    one.run(fast)
    one.run(fast)
    assert len(recorders) == 1
    two.run(fast)
    assert all(not graph.ops for graph in recorders[0].graphs), "evicted: freed"
    one.run(fast)
    assert len(recorders) == 3
    fast.uncompile()
    assert all(not graph.ops for emulator in recorders for graph in emulator.graphs)


def test_all_use_of_a_plans_buffers_follows_the_stream_before() -> None:
    model, calls, asked = make_dit(), Calls(6), []
    fast, _ = compile_graphs(model, random_schedule(2))
    calls.run(fast)
    (plan,) = fast._plans.values()

    class Spy:
        enter, leave = (lambda self: asked.append("enter")), (lambda self: asked.append("leave"))

    plan.streams, touch = Spy(), []
    for owner, name in ((plan, "_encode"), (plan.inputs, "run"), (plan.graphs, "run")):
        kept = getattr(owner, name)

        def seen(*args: object, kept: Any = kept, name: str = name) -> object:
            touch.append((name, len(asked)))
            return kept(*args)

        setattr(owner, name, seen)
    calls.run(fast)
    fast.uncompile()
    assert [name for name, _ in touch[:3]] == ["_encode", "run", "run"]
    assert [count for _, count in touch] == list(range(1, len(touch) + 1)), "each asks first"
    assert asked[-1] == "leave"


def test_nothing_is_freed_while_it_may_be_replaying() -> None:
    model, calls = make_dit(), Calls(6)
    fast, (recorders) = compile_graphs(model, random_schedule(2))
    calls.run(fast)
    (emulator,) = recorders
    emulator.synchronize = lambda: replayed.append([len(graph.ops) > 0 for graph in emulator.graphs])
    replayed: list[list[bool]] = []
    fast.uncompile()
    assert replayed == [[True] * len(emulator.graphs)], "waited for once, before any was reset"
    assert not any(graph.ops for graph in emulator.graphs)


def test_kernels_that_step_0_lacks_are_launched_before_they_are_captured() -> None:
    """The first launch of a kernel may load it, which a capture forbids: a reused output is summed by kernels of its
    own."""
    model, calls = make_dit(), Calls(6)
    schedule = hrt.Schedule.uniform(model, 6, every=2)
    schedule = schedule.replace(output=~schedule.compute.any((1, 2)))
    fast, (recorders) = compile_graphs(model, schedule)
    eager = hrt.compile(model, schedule, backend="eager")
    assert_close(calls.run(fast), calls.run(eager), 1e-5)
    assert recorders[0].warm_ups == 3, "what computes, what reuses the output, modulation rows"


def test_new_weights_in_place_are_replayed_and_moved_ones_recaptured() -> None:
    model, other, calls = make_dit(seed=1), make_dit(seed=2), Calls(6)
    schedule = random_schedule(2)
    fast, recorders = compile_graphs(model, schedule)
    calls.run(fast)
    model.load_state_dict(other.state_dict())
    eager = hrt.compile(other, schedule, backend="eager")
    assert_close(calls.run(fast), calls.run(eager), 1e-5)
    assert len(recorders) == 1
    model.transformer_blocks[0].ff = make_dit(seed=3).transformer_blocks[0].ff
    other.transformer_blocks[0].ff = model.transformer_blocks[0].ff
    assert_close(calls.run(fast), calls.run(eager), 1e-5)
    assert len(recorders) == 2


def test_modulation_in_windows_is_selected_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make_dit(), Calls(6)
    schedule = random_schedule(2).replace(timesteps=calls.timesteps)
    eager = hrt.compile(model, schedule, backend="eager")
    wanted = calls.run(eager)
    row_bytes = eager.report().plans[0].modulation_bytes // 6
    monkeypatch.setattr("harmonica_rt.buffers.MODULATION_BYTES", 4 * row_bytes)
    fast, _ = compile_graphs(model, schedule)
    assert_close(calls.run(fast), wanted, 1e-5)
    assert fast.report().plans[0].modulation_bytes == 4 * row_bytes


def test_a_failed_capture_names_step_and_instruction_and_frees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make_dit(), Calls(6)
    fast, recorders = compile_graphs(model, random_schedule(2))
    attention = torch.nn.functional.scaled_dot_product_attention

    def reads_the_device(*args: object) -> torch.Tensor:
        out = attention(*args)
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None and len(recorders[0].graphs) == 2:
            out.sum().item()
        return out

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", reads_the_device)
    with pytest.raises(CaptureFailed, match=r"at step \d, instruction \d+: .*Compute\(entry=\d.*_local_scalar_dense"):
        calls.call(fast, 0)
    assert all(not graph.ops for graph in recorders[0].graphs)
    assert fast.report().plans == ()
    monkeypatch.undo()
    assert_close(calls.run(fast), calls.run(hrt.compile(model, random_schedule(2), backend="eager")), 1e-5)


def test_running_out_of_memory_while_capturing_is_a_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make_dit(), Calls(6)
    fast, _ = compile_graphs(model, random_schedule(2))

    def full(self: Emulator, launch: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Emulator, "capture", full)
        with pytest.raises(CaptureFailed, match="at step 0: OutOfMemoryError: CUDA out of memory"):
            calls.call(fast, 0)
    assert_close(calls.run(fast), calls.run(hrt.compile(model, random_schedule(2), backend="eager")), 1e-5)


def test_replays_and_launches_are_measured_and_graphs_can_be_given_up() -> None:
    model, calls = make_dit(), Calls(6)
    fast, _ = compile_graphs(model, random_schedule(2))
    wanted = calls.run(fast)
    plan = next(iter(fast._plans.values()))
    with torch.no_grad():
        faster = plan.measure()
    assert faster == (plan.measured[0] <= plan.measured[1])
    report = fast.report().plans[0]
    assert (report.graph_seconds, report.launch_seconds) == plan.measured
    assert "ms replayed" in str(fast.report())
    plan.release_graphs()
    assert_close(calls.run(fast), wanted, 1e-5)  # modulation rows are filled a step each, no longer together
    assert fast.report().plans[0].graphs == 0


@pytest.mark.parametrize(("replayed", "launched"), [(1.0, 2.0), (2.0, 1.0)])
def test_measuring_waits_for_the_device(replayed: float, launched: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only moves when the host waits for what it has queued."""
    fast, _ = compile_graphs(make_dit(), random_schedule(2))
    Calls(6).run(fast)
    plan = next(iter(fast._plans.values()))
    now, queued = [0.0], [0.0]

    def wait() -> None:
        now[0], queued[0] = now[0] + queued[0], 0.0

    def queue(seconds: float) -> None:
        queued[0] += seconds

    monkeypatch.setattr("harmonica_rt.cuda_graphs.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(plan.graphs.recorder, "synchronize", wait)
    monkeypatch.setattr(plan.graphs, "run", lambda step, sample: queue(replayed))
    monkeypatch.setattr(plan, "run_plainly", lambda step, sample: queue(launched))
    queue(100.0)  # by others, before
    assert plan.measure(rounds=1) == (replayed < launched)
    assert plan.measured == (6 * replayed, 6 * launched)


def test_the_backend_by_name_needs_cuda() -> None:
    model = make_dit()
    fast = hrt.compile(model, random_schedule(2), backend="cudagraph")
    with pytest.raises(ValueError, match="backend cudagraph: expected a model on a CUDA device, got one on cpu"):
        Calls(6).call(fast, 0)


@pytest.mark.parametrize(("version", "found"), [(None, "none"), ("3.5.1", "3.5.1")])
def test_without_a_triton_that_will_do_it_says_so(
    version: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lookup(name: str) -> str:
        assert name == "triton"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", lookup)
    fast, _ = compile_graphs(make_dit(), random_schedule(2))
    with pytest.raises(CompilerMissing, match=f"backend cudagraph: expected triton 3.6 or newer, found {found}"):
        Calls(6).call(fast, 0)
