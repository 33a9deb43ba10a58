"""What a compiled model refuses, by name, and that nothing is left half-changed."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import re
import threading
import weakref

import numpy as np
import pytest
import torch

import harmonica_rt as hrt

from .conftest import BACKENDS, Calls, assert_close, make_dit, random_schedule
from .test_compiled import expected


def test_compile_refuses_by_name(dit: torch.nn.Module) -> None:
    schedule = random_schedule(1)
    other = hrt.Schedule(np.ones((2, 3, 3), bool), model="DiTTransformer2DModel", branches=("attn", "cross", "mlp"))
    for bad, error, match in [
        ((dit, "file.json"), TypeError, r"expected a harmonica_rt.Schedule, got str"),
        ((make_dit(layers=2), schedule), ValueError, r"layers expected 2, got 3"),
        ((dit, other), ValueError, r"branches expected \('attn', 'mlp'\), got \('attn', 'cross', 'mlp'\)"),
        ((dit, schedule.replace(model="PixArt")), ValueError, r"model expected DiTTransformer2DModel, got PixArt"),
        ((torch.nn.Linear(2, 2), schedule), TypeError, r"supported class \(DiTTransformer2DModel, .*\), got .*Linear"),
        ((make_dit().train(), schedule), ValueError, r"eval mode, got model in training mode"),
        ((make_dit().double(), schedule), ValueError, r"float32, float16 or bfloat16, got torch.float64"),
        (("dit", schedule), TypeError, r"expected a torch.nn.Module.*got str"),
    ]:
        with pytest.raises(error, match=match):
            hrt.compile(*bad)
    with pytest.raises(ValueError, match=r"backend: expected one of .*'eager'.* got 'fast'"):
        hrt.compile(dit, schedule, backend="fast")
    with pytest.raises(ValueError, match=r"plans: expected a positive integer, got 0"):
        hrt.compile(dit, schedule, plans=0)


def test_a_refused_call_changes_nothing(dit: torch.nn.Module) -> None:
    """Mid-run, each bad call raises naming both sides, and the run goes on to the right result."""
    calls = Calls(6)
    fast = hrt.compile(dit, random_schedule(8).replace(timesteps=calls.timesteps), backend="eager")
    wanted = calls.run(fast)
    timestep = torch.full((2,), calls.timesteps[3])
    good = {"hidden_states": calls.samples[3], "timestep": timestep, "class_labels": calls.labels}
    bad = [
        ({"hidden_states": calls.samples[3].double()}, ValueError, "float64"),
        ({"hidden_states": calls.samples[3][:, :1]}, ValueError, r"\[batch, 2, height, width\], got \[2, 1, 8, 8\]"),
        ({"hidden_states": calls.samples[3][0]}, ValueError, r"got \[2, 8, 8\]"),
        ({"hidden_states": torch.randn(2, 2, 10, 10)}, ValueError, "10"),
        ({"timestep": torch.tensor(3)}, ValueError, r"timestep: expected a tensor of shape \[2\], got \[\]"),
        ({"timestep": 3}, ValueError, r"timestep: expected a tensor of shape \[2\], got int"),
        ({"timestep": torch.tensor([3, 4])}, ValueError, r"same for all samples, got \[3, 4\]"),
        ({"timestep": torch.full((2,), 5)}, RuntimeError, ""),
        ({"class_labels": None}, ValueError, "class_labels: expected a tensor of shape"),
        ({"class_labels": calls.labels.float()}, TypeError, "expected integers, got torch.float32"),
        ({"class_labels": calls.labels.to("meta")}, ValueError, "on the sample's device, cpu, got meta"),
        ({"class_labels": calls.labels[:1]}, ValueError, r"shape \[2\], got \[1\]"),
        ({"cross_attention_kwargs": {"gligen": 1}}, ValueError, r"expected none, got \['gligen'\]"),
        ({"hidden_states": calls.samples[3].clone().requires_grad_()}, RuntimeError, "needs no gradient"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ]
    outputs = [calls.call(fast, step) for step in range(3)]
    for change, error, match in bad:
        with pytest.raises(error, match=match):
            fast(**{**good, **change})
    outputs += [calls.call(fast, step) for step in range(3, 6)]
    assert_close(outputs, wanted, 0.0)


def test_a_run_keeps_its_shape(dit: torch.nn.Module) -> None:
    fast = hrt.compile(dit, random_schedule(8), backend="eager")
    Calls(6, batch=2).call(fast, 0)
    with pytest.raises(ValueError, match=r"samples of batch 2, 8x8, float32 on cpu, got batch 1, 8x8"):
        Calls(6, batch=1).call(fast, 1)


def test_forward_beyond_the_last_step(dit: torch.nn.Module) -> None:
    fast, calls = hrt.compile(dit, random_schedule(8), backend="eager"), Calls(6)
    calls.run(fast)
    calls.timesteps.append(5)
    calls.samples = torch.cat([calls.samples, calls.samples[:1]])
    with pytest.raises(RuntimeError, match=r"beyond the last step: expected 6 steps, got timestep 5"):
        calls.call(fast, 6)


def test_a_failure_inside_a_step_ends_the_run(dit: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, calls = hrt.compile(dit, random_schedule(8), backend="eager"), Calls(6)
    whole = calls.run(fast)
    calls.call(fast, 0)
    calls.call(fast, 1)
    labels, calls.labels = calls.labels, torch.tensor([99, 99])
    with pytest.raises(IndexError):
        calls.call(fast, 2)
    calls.labels = labels
    assert_close(calls.run(fast), whole, 0.0)


def test_concurrent_calls_are_refused(dit: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, calls = hrt.compile(dit, hrt.Schedule.full(dit, 1), backend="eager"), Calls(1)
    inside, leave = threading.Event(), threading.Event()
    finish = type(fast)._step

    def slow(self: object, inputs: object) -> torch.Tensor:
        inside.set()
        assert leave.wait(10)
        return finish(self, inputs)

    monkeypatch.setattr(type(fast), "_step", slow)
    results: list[list[torch.Tensor]] = []
    thread = threading.Thread(target=lambda: results.append(calls.run(fast)))
    thread.start()
    assert inside.wait(10)
    for refused in (lambda: calls.run(fast), fast.reset, fast.uncompile):
        with pytest.raises(RuntimeError, match="concurrent use"):
            refused()
    leave.set()
    thread.join()
    assert_close(results[0], calls.run(dit), 1e-5)


def test_copies_are_compiled_and_pickles_refused(dit: torch.nn.Module) -> None:
    fast, calls = hrt.compile(dit, random_schedule(1), backend="eager"), Calls(6)
    wanted = calls.run(fast)
    twin = copy.deepcopy(fast)
    assert twin.model is not dit
    assert_close(calls.run(twin), wanted, 0.0)
    with pytest.raises(TypeError, match=r"cannot be pickled: pickle its .model and .schedule"):
        pickle.dumps(fast)


def test_autocast_is_refused(dit: torch.nn.Module) -> None:
    fast, calls = hrt.compile(dit, random_schedule(1), backend="eager"), Calls(6)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast: expected it off"):
        calls.call(fast, 0)


def test_training_is_refused(dit: torch.nn.Module) -> None:
    fast, calls = hrt.compile(dit, random_schedule(1), backend="eager"), Calls(6)
    with pytest.raises(RuntimeError, match="samples only"):
        fast.train()
    dit.train()
    with pytest.raises(ValueError, match="eval mode"):
        calls.run(fast)


@pytest.mark.parametrize("known", [False, True], ids=["unknown timesteps", "known timesteps"])
def test_after_a_failed_step_the_rest_of_the_run_is_refused_or_right(dit: torch.nn.Module, known: bool) -> None:
    """Taking the failed step again must not be taken for the first of a new run."""
    calls = Calls(6)
    schedule = random_schedule(4).replace(timesteps=calls.timesteps if known else None)
    fast = hrt.compile(dit, schedule, backend="eager")
    for step in range(3):
        calls.call(fast, step)
    labels, calls.labels = calls.labels, torch.tensor([99, 99])
    with pytest.raises(IndexError):
        calls.call(fast, 3)
    calls.labels = labels
    if known:  # a run that enters midway
        rest = schedule.starting_at(3)
        tail = Calls(6)
        tail.samples, tail.timesteps = calls.samples[3:], calls.timesteps[3:]
        assert_close(calls.run(fast, 3), expected(dit, rest, tail), 1e-4)
    else:
        with pytest.raises(RuntimeError, match=r"cut short by an error: expected its first timestep, 990"):
            calls.call(fast, 3)
        assert_close(calls.run(fast), expected(dit, schedule, calls), 1e-4)


def test_weights_loaded_within_a_run_end_it() -> None:
    model, other, calls = make_dit(seed=1), make_dit(seed=2), Calls(4)
    fast = hrt.compile(model, hrt.Schedule.full(model, 4), backend="eager")
    calls.call(fast, 0)
    fast.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="cut short"):
        calls.call(fast, 1)
    assert_close(calls.run(fast), calls.run(other), 1e-5)


def test_weights_moved_within_a_run_end_it() -> None:
    model, calls = make_dit(), Calls(4)
    fast = hrt.compile(model, hrt.Schedule.full(model, 4), backend="eager")
    calls.call(fast, 0)
    fast.to("cpu", torch.float32)  # where they are already
    calls.call(fast, 1)
    fast.half().float()
    with pytest.raises(RuntimeError, match="cut short"):
        calls.call(fast, 2)
    assert_close(calls.run(fast), calls.run(model), 1e-5)


def test_transposed_weights_are_seen() -> None:
    model, calls = make_dit(), Calls(3)
    fast = hrt.compile(model, hrt.Schedule.full(model, 3), backend="eager")
    calls.run(fast)
    weight = model.transformer_blocks[0].attn1.to_out[0].weight
    weight.data = weight.data.t()
    assert_close(calls.run(fast), calls.run(model), 1e-5)


def test_attributes_go_to_the_model_or_are_refused(dit: torch.nn.Module) -> None:
    fast, calls = hrt.compile(dit, hrt.Schedule.full(dit, 2), backend="eager"), Calls(2)
    fast.proj_out_2 = make_dit(seed=5).proj_out_2
    assert_close(calls.run(fast), calls.run(dit), 1e-5)
    for name in ("model", "schedule", "backend", "training"):
        with pytest.raises(AttributeError, match=f"{name} of a compiled transformer cannot be set"):
            setattr(fast, name, None)


def test_eval_reaches_the_model(dit: torch.nn.Module) -> None:
    fast = hrt.compile(dit, hrt.Schedule.full(dit, 1), backend="eager")
    dit.train()
    fast.eval()
    Calls(1).run(fast)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_goes_with_the_last_reference(backend: str) -> None:
    """Slots are large: they must not wait for the garbage collector to find a cycle."""
    gc.collect()
    gc.disable()
    try:
        model, calls = make_dit(), Calls(6)
        fast = hrt.compile(model, random_schedule(1), backend=backend, plans=1)
        calls.run(fast)
        first = weakref.ref(next(iter(fast._plans.values())))
        Calls(6, batch=1).run(fast)
        assert first() is None, "evicted"
        second, owner = weakref.ref(next(iter(fast._plans.values()))), weakref.ref(fast)
        del fast
        assert owner() is None
        assert second() is None
    finally:
        gc.enable()


def test_parameters_of_inference_mode_and_the_meta_device_are_refused() -> None:
    with torch.inference_mode():
        inference = make_dit()
    for model, match in ((inference, "under torch.inference_mode"), (make_dit().to("meta"), "meta device")):
        with pytest.raises(ValueError, match=match):
            hrt.compile(model, random_schedule(1))


def test_arguments_are_read_as_by_the_forward_itself(dit: torch.nn.Module) -> None:
    fast, calls = hrt.compile(dit, random_schedule(0), backend="eager"), Calls(6)
    sample, labels, t = calls.samples[0], calls.labels, torch.full((len(calls.labels),), calls.timesteps[0])
    one = fast(sample, t, labels, return_dict=False)[0]
    two = fast(class_labels=labels, hidden_states=sample, timestep=t).sample
    assert torch.equal(one, two)
    for args, kwargs in [
        ((), {"timestep": t}),
        ((sample, t), {"timestep": t}),
        ((sample,), {"timesteps": t}),
        ((sample, t, labels, None, True, 6), {}),
        ((sample, t), {"hidden_states": sample}),
    ]:
        with pytest.raises(TypeError) as theirs:
            inspect.signature(dit.forward).bind(*args, **kwargs)
        with pytest.raises(TypeError, match=re.escape(str(theirs.value))):
            fast(*args, **kwargs)
