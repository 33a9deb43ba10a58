"""What models may do that diffusers' do not: refused by name or right, and nothing is broken afterwards."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import harmonica_rt as hrt

from .odd_models import Block, Small, compiled, levels, noise


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


# ---- what is half a batch


@levels
def test_other_samples_are_no_half_of_a_batch(level: str) -> None:
    for cond, before, after in [
        (None, noise(4, 3, 8), noise(1, 5, 8)),
        (None, noise(4, 3, 8), noise(2, 3, 8)),  # nothing tells which
        (noise(2, 8), noise(2, 3, 8), noise(1, 9, 8)),
        (noise(1, 8).repeat(2, 1), noise(2, 3, 8), noise(1, 3, 8)),  # two images of one prompt
    ]:
        model = Small()
        fast = compiled(model, level=level)
        fast(before, 6.0, cond)
        with pytest.raises(ValueError, match=r"the run under way has samples of .*, got .*: call reset\(\) to change"):
            fast(after, 5.0, None if cond is None else cond[1:])
        fast.reset()
        left = None if cond is None else cond[: len(after)]
        assert torch.equal(fast(after, 6.0, left)[0], model(after, 6.0, left)[0])


# ---- timesteps


@levels
def test_rising_timesteps_never_reuse_another_images_values(level: str) -> None:
    fast = compiled(Small(), 2, level=level)
    fast(noise(1, 3, 8), 0.0), fast(noise(1, 3, 8), 0.5)
    with pytest.raises(RuntimeError, match="timesteps rise"):
        fast(noise(1, 3, 8), 0.0)


def test_a_scheduler_that_makes_its_timesteps_anew_starts_no_run_by_it() -> None:
    model, called = Small(), []
    model.register_forward_pre_hook(lambda *_: called.append(1))
    times = [4.0, 3.0, 2.0, 1.0]

    class Scheduler:
        timesteps = property(lambda self: torch.tensor(times))

    pipeline = types.SimpleNamespace(scheduler=Scheduler(), transformer=model)
    hrt.compile(pipeline, hrt.Schedule.uniform(model, 4, 2, level="output"))
    for run in range(2):
        called.clear()
        for t in times:
            pipeline.transformer(noise(1, 3, 8), torch.tensor([t]))
        assert len(called) == 2, run


# ---- what a forward returns and does


class Out(dict):
    """No dict to torch's trees: what it holds cannot be seen."""


@dataclass
class Struct:
    h: Tensor


def returning(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> nn.Module:
    class Packing(Block):
        def forward(self, x: Tensor) -> Any:
            return pack(super().forward(x))

    class Unpacking(Small):
        def forward(self, x: Tensor, timestep: Any) -> Any:
            for block in self.blocks:
                x = unpack(block(x))
            return (self.out(x),)

    return Unpacking(Packing)


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda h: types.SimpleNamespace(h=h), lambda o: o.h),
        (lambda h: Struct(h), lambda o: o.h),
        (lambda h: Out(h=h), lambda o: o["h"]),
    ],
)
def test_what_hides_tensors_is_refused(pack: Callable, unpack: Callable) -> None:
    fast = compiled(returning(pack, unpack), level="blocks")
    with pytest.raises(hrt.UnsupportedModelError, match=r"expected tensors in lists, tuples and dicts from a block"):
        fast(noise(1, 3, 8), 6.0)

    class Hides(Small):
        def forward(self, x: Tensor, timestep: Any) -> Any:
            return pack(super().forward(x, timestep)[0])

    for level in ("blocks", "output"):
        with pytest.raises(hrt.UnsupportedModelError, match=r"lists, tuples and dicts from the model's output"):
            compiled(Hides(), level=level)(noise(1, 3, 8), 6.0)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_group_of_one_block_carries_what_the_blocks_hand_on(adapted: bool) -> None:
    """Not what it happens to return something near to: here its other argument, of the same shape.

    Blocks of which only some have an adapter are blocks of one kind.
    """

    class Adds(Block):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return x + other + 0.1 * self.b(torch.tanh(self.a(x)))

    class Two(Small):
        def forward(self, x: Tensor, timestep: Any, other: Tensor) -> Any:
            for block in self.blocks:
                x = block(x, other)
            return (self.out(x),)

    model, other = Two(Adds), 100 * noise(1, 3, 8)
    if adapted:
        config = LoraConfig(r=2, target_modules=r"blocks\.0\.a", init_lora_weights=False)
        inject_adapter_in_model(config, model, "one")
    full = hrt.Schedule.full(model, 2, level="blocks", groups=4)
    for entry in range(4):
        compute = full.compute.copy()
        compute[1, entry] = False
        schedule = full.replace(compute=compute, carry=np.where(compute, 0.0, 1.0))
        fast, (x, now) = hrt.compile(model, schedule, backend="eager"), (noise(1, 3, 8), noise(1, 3, 8))
        fast(x, 2.0, other)
        got = fast(now, 1.0, other)[0]
        for number, block in enumerate(model.blocks):
            now = block(x, other) + (now - x) if number == entry else block(now, other)
            x = block(x, other)
        torch.testing.assert_close(got, model.out(now), rtol=1e-5, atol=1e-4)  # values are of hundreds


class _Wrapped(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any) -> Any:
        return self.block(*args)


@pytest.mark.parametrize("wrapped", [lambda block: block, _Wrapped, partial(torch.compile, backend="eager")])
def test_blocks_of_two_kinds_stay_apart_behind_a_wrapper(wrapped: Callable) -> None:
    """Of one both streams go on, of the other the second alone, as what it returns first."""

    class Both(Block):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x + 0.1 * y, y + self.b(torch.tanh(self.a(x)))

    class Second(Block):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y + self.b(torch.tanh(self.a(x)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.ModuleList(wrapped(Both()) for _ in range(2))
            self.second = nn.ModuleList(wrapped(Second()) for _ in range(2))

        def forward(self, hidden_states: Tensor, timestep: Any) -> Any:
            x, y = hidden_states, 2 * hidden_states
            for block in self.first:
                x, y = block(x, y)
            for block in self.second:
                y = block(x, y)
            return (y,)

    model = Model().eval()
    full = hrt.Schedule.full(model, 2, level="blocks", groups=2)
    compute = full.compute.copy()
    compute[1, 0] = False
    fast = hrt.compile(model, full.replace(compute=compute, carry=np.where(compute, 0.0, 1.0)), backend="eager")
    then, now = noise(1, 3, 8), noise(1, 3, 8)
    fast(then, 2.0)
    (got,) = fast(now, 1.0)
    x, y = (kept + moved for kept, moved in zip(model.first[0](then, 2 * then), (now - then, 2 * (now - then))))
    x, y = model.first[1](x, y)
    for block in model.second:
        y = block(x, y)
    torch.testing.assert_close(got, y)


def test_complex_streams_are_streams() -> None:
    model = returning(torch.view_as_complex, torch.view_as_real)
    for block in model.blocks:
        block.forward = lambda x, block=block: torch.view_as_complex(Block.forward(block, x).view(*x.shape[:-1], 4, 2))
    model.forward = lambda x, timestep: (model.out(_real(model, x)),)
    fast, x = compiled(model, level="blocks", order=1), noise(6, 1, 3, 8)
    outputs = [fast(x[i], 6.0 - i)[0] for i in range(6)]
    assert not torch.equal(outputs[3], outputs[2]), "order 1 extrapolates"


def _real(model: nn.Module, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = torch.view_as_real(block(x)).flatten(-2)
    return x


def test_a_number_of_outputs_that_changes_is_refused() -> None:
    class Two(Small):
        def forward(self, x: Tensor, timestep: Any, two: bool = True) -> Any:
            return (self.out(x), self.out(x) + 1) if two else (self.out(x),)

    for first in (True, False):
        fast, x = compiled(Two()), noise(1, 3, 8)
        fast(x, 6.0, first), fast(x, 5.0, first)
        with pytest.raises(ValueError, match=r"(?s)output: expected .* as at the first call, got"):
            fast(x, 4.0, not first)


def test_what_blocks_leave_elsewhere_is_refused() -> None:
    class Lists(Small):
        def forward(self, x: Tensor, timestep: Any) -> Any:
            kept: list[Tensor] = []
            for block in self.blocks:
                block.kept = kept
                x = block(x)
            return (self.out(x) + kept[1],)

    class Keeping(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.kept.append(x.sin())
            return super().forward(x)

    with pytest.raises(hrt.UnsupportedModelError, match="nothing of its blocks but what they return, got IndexError"):
        compiled(Lists(Keeping), level="blocks")(noise(1, 3, 8), 6.0)


def test_chance_and_writing_into_arguments_are_as_in_the_model() -> None:
    class Chance(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    class Writes(Small):
        def forward(self, x: Tensor, timestep: Any) -> Any:
            return super().forward(x.mul_(2.0), timestep)

    model = Small(Chance)
    fast, x = compiled(model, level="blocks"), noise(1, 3, 8)
    torch.manual_seed(0)
    wanted = [model(x, t)[0] for t in (6.0, 4.0, 2.0)]
    for _ in range(2):
        torch.manual_seed(0)
        got = [fast(x, t)[0] for t in (6.0, 5.0, 4.0, 3.0, 2.0, 1.0)]
        assert all(map(torch.equal, got[::2], wanted))
    for level in ("blocks", "output"):
        fast, x = compiled(Writes(), level=level), noise(1, 3, 8)
        before = x.clone()
        fast(x, 6.0)
        assert torch.equal(x, 2 * before), "once, as the model does"


# ---- failures at the first call, and after


class Failing(Block):
    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return super().forward(x)


@levels
@pytest.mark.parametrize("where", [0, 2, "out"])
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_a_first_call_that_fails_can_be_made_again(level: str, where: Any, error: BaseException) -> None:
    model = Small(Failing)
    if where == "out":
        model.out = nn.Sequential(Failing(), model.out).eval()
    failing = model.out[0] if where == "out" else model.blocks[where]
    fast, x = compiled(model, level=level), noise(1, 3, 8)
    for _ in range(2):
        failing.error = error
        with pytest.raises(type(error)):
            fast(x, 6.0)
        failing.error = None
        fast.reset()
    wanted = model(x, 6.0)[0]
    assert torch.equal(fast(x, 6.0)[0], wanted)
    assert torch.equal(fast(x, 5.0)[0], wanted)


@levels
def test_what_is_not_finite_breaks_nothing(level: str) -> None:
    model = Small()
    fast, x = compiled(model, level=level), noise(1, 3, 8)
    assert not fast(x / 0, 6.0)[0].isfinite().any()
    fast.reset()
    for t in (6.0, 5.0):
        assert torch.equal(fast(x, t)[0], model(x, 6.0)[0])


def test_blocks_that_are_called_otherwise_in_a_later_run_are_learned_anew() -> None:
    class Skips(Small):
        def forward(self, x: Tensor, timestep: Any, skip: bool = False) -> Any:
            for block in self.blocks[1:] if skip else self.blocks:
                x = block(x)
            return (self.out(x),)

    model = Skips()
    fast, x = compiled(model, level="blocks"), noise(1, 3, 8)
    for skip in (False, True, False):
        fast.reset()
        for t in (6.0, 5.0):
            assert torch.equal(fast(x, t, skip)[0], model(x, 6.0, skip)[0])
    with pytest.raises(ValueError, match=r"expected 4 calls of its blocks as at the first call, got 3"):
        fast(x, 4.0, True)


def test_a_compile_that_fails_changes_no_pipeline() -> None:
    model = Small()
    schedule = hrt.Schedule.uniform(model, 4)
    for scheduler in ({"timesteps": 1}, types.SimpleNamespace()):
        pipeline = types.SimpleNamespace(scheduler=scheduler, transformer=model)
        try:
            hrt.compile(pipeline, schedule)
        except (TypeError, AttributeError):
            assert pipeline.transformer is model
        else:
            hrt.uncompile(pipeline)
            assert pipeline.transformer is model


# ---- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: hrt.compile(None, s), TypeError, "expected a torch.nn.Module, or a pipeline with .*, got NoneType"),
        (
            lambda s: hrt.compile(types.SimpleNamespace(scheduler=1, unet="x"), s),
            TypeError,
            "or a pipeline with a scheduler and one as transformer, transformer_2 or unet, got SimpleNamespace",
        ),
        (lambda s: hrt.compile(Small(), {None: s}), TypeError, "expected names of contexts, got None"),
        (lambda s: hrt.Schedule.uniform(None, 4), TypeError, "expected a denoiser, a torch.nn.Module, got NoneType"),
        (lambda s: hrt.Schedule.uniform(Small, 4), TypeError, "a torch.nn.Module, got the class Small"),
        (
            lambda s: hrt.Schedule.uniform(types.SimpleNamespace(transformer=Small()), 4),
            TypeError,
            "got SimpleNamespace: pass its .transformer",
        ),
        (lambda s: s.replace(groups=[("trunk", 3, ("blocks",))]), ValueError, r"expected \('trunk', 1,.* alone"),
        (
            lambda s: hrt.Schedule(
                np.ones((3, 2), bool), model="M", level="blocks", groups=[(n, 1, ("blocks",)) for n in ("trunk", "b")]
            ),
            ValueError,
            "alone, got",
        ),
        (lambda s: s.replace(carry=np.where(s.compute, 0, 1e300)), ValueError, "carry: expected finite numbers"),
    ],
)  # fmt: skip
def test_bad_input_names_both_sides(call: Callable, error: type[Exception], message: str) -> None:
    schedule = hrt.Schedule.uniform(Small(), 4, level="blocks")
    with pytest.raises(error, match=message):
        call(schedule)


def test_replacing_something_else_keeps_the_carry() -> None:
    schedule = hrt.Schedule.uniform(Small(), 4, level="blocks", carry=0.5)
    for same in (schedule.replace(compute=schedule.compute), schedule.replace(order=2)):
        assert np.array_equal(same.carry, schedule.carry)
