"""SDT and L2C against loops written out here: losses, gradients, cache, evaluations, FLOPs, memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

import harmonica_rt.train.sdt as sdt_module
from harmonica_rt.train.denoiser import compute
from harmonica_rt.train.mixing import Mixing
from harmonica_rt.train.router import Router
from harmonica_rt.train.sdt import Gating, StepLoss, l2c, pinned_steps, sdt
from harmonica_rt.train.task import Trajectory

from .conftest import ENTRIES, LAYERS, STEPS, explicit_run, make_router, make_task

TAU = 0.3


def gradients(router: Router, step: StepLoss) -> list[Tensor | None]:
    rows = [row for row in router.logits if row.requires_grad]
    return torch.autograd.grad(step.mse, rows, allow_unused=True)


# ---- the trajectory


def test_losses_are_those_of_the_explicit_loop() -> None:
    task, router = make_task(double=True), make_router()
    batch = task.draw(2, 7)
    got = {step.step: step.mse.item() for step in sdt(task, router, Gating(TAU), batch)}
    expected = explicit_run(task, router, batch, TAU)
    assert list(got) == list(range(1, STEPS))
    assert got == pytest.approx({i: expected.errors[i].item() for i in got}, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"advance": "teacher"}, {"cached": "fresh"}, {"cached": "always"}], ids=str)
def test_the_explicit_loop_tells_apart_what_it_should(wrong: dict[str, str]) -> None:
    task, router = make_task(double=True), make_router()
    batch = task.draw(2, 7)
    right, other = (explicit_run(task, router, batch, TAU, **options) for options in ({}, wrong))
    assert abs(other.errors[STEPS - 1] / right.errors[STEPS - 1] - 1) > 1e-2


def test_the_cache_holds_mixed_values_where_r_is_above_tau(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Mixing] = []

    class Recorded(Mixing):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(sdt_module, "Mixing", Recorded)
    task, router = make_task(double=True), make_router()
    batch = task.draw(2, 7)
    expected = explicit_run(task, router, batch, TAU)
    for loss in sdt(task, router, Gating(TAU), batch):
        (mixing,) = made
        for (value,), cached in zip(mixing.values, expected.caches[loss.step]):
            torch.testing.assert_close(value, cached, rtol=1e-5, atol=1e-6)
            assert not value.requires_grad
        above = torch.sigmoid(router.logits[loss.step]) > TAU
        assert mixing.kept[loss.step, :, 0].tolist() == above.tolist()
        assert mixing.kept[0].all()
    learning = torch.sigmoid(router.to_tensor()[1:]) > TAU
    assert learning.any() and not learning.all()


def test_updates_between_losses_reach_only_later_steps() -> None:
    """What the caller does with Z_i when handed the loss changes nothing of the trajectory."""
    task, router = make_task(), make_router()
    batch = task.draw(2, 7)
    expected = [step.mse.item() for step in sdt(task, router, Gating(TAU), batch)]
    got = []
    for step in sdt(task, router, Gating(TAU), batch):
        got.append(step.mse.item())
        with torch.no_grad():
            router.logits[step.step].add_(1.0)
    assert got == expected


# ---- gradients


def test_the_gradient_reaches_only_its_own_step() -> None:
    task, router = make_task(), make_router()
    for step in sdt(task, router, Gating(TAU), task.draw(2, 7)):
        found = gradients(router, step)
        assert [g is not None for g in found] == [i == step.step for i in range(1, STEPS)]
        assert found[step.step - 1].abs().max() > 0


def test_gradients_are_finite_differences() -> None:
    task, router = make_task(double=True), make_router().double()
    batch, h = task.draw(2, 7), 1e-4
    found = {step.step: gradients(router, step)[step.step - 1] for step in sdt(task, router, Gating(TAU), batch)}

    def error(step: int, entry: int, change: float) -> float:
        moved = copy.deepcopy(router)
        with torch.no_grad():
            moved.logits[step][entry] += change
        return explicit_run(task, moved, batch, TAU).errors[step].item()

    for step, entry in [(1, 0), (2, 3), (3, 5), (5, 1), (5, 4)]:
        difference = (error(step, entry, h) - error(step, entry, -h)) / (2 * h)
        assert found[step][entry].item() == pytest.approx(difference, rel=1e-4, abs=1e-9)


# ---- cost


def test_an_iteration_runs_teacher_and_student_once(evaluations: list[int]) -> None:
    task, router = make_task(), make_router()
    assert len(list(sdt(task, router, Gating(TAU), task.draw(2, 7)))) == STEPS - 1
    assert len(evaluations) == ENTRIES * (1 + 2 * (STEPS - 1))


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_flops_are_those_of_teacher_student_and_its_backward() -> None:
    task, router = make_task(), make_router()
    batch = task.draw(2, 7)
    sample, labels = torch.cat([batch.noise] * 2), torch.cat([*batch.conditional, *batch.unconditional])

    def forward(x: Tensor) -> Tensor:
        return task.model(x, timestep=torch.full((4,), 500), class_labels=labels).sample

    def iteration() -> None:
        for step in sdt(task, router, Gating(TAU), batch):
            gradients(router, step)

    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused attention
        with torch.no_grad():
            one = flops(lambda: forward(sample))
        x = sample.clone().requires_grad_()
        both = flops(lambda: forward(x).sum().backward())
        bound = one + (STEPS - 1) * (one + both)
        assert 0.7 * bound < flops(iteration) <= 1.15 * bound


class Peak(TorchDispatchMode):
    """The most bytes of tensors made under it that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            del self.alive[key]
            self.bytes -= size

        self.alive[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def peak(steps: int, keep: bool = False) -> int:
    task, router = make_task(steps=steps, layers=LAYERS, sample_size=16), make_router(steps=steps)
    batch, kept = task.draw(2, 7), []
    with Peak() as measured:
        for step in sdt(task, router, Gating(TAU), batch):
            if keep:
                kept.append(step.mse)
            else:
                gradients(router, step)
            del step
    rows = steps * 4 * task.adapter.rows * task.adapter.width * 4
    return measured.peak - rows


def test_memory_is_one_steps_whatever_the_number_of_steps() -> None:
    few, many = peak(4), peak(12)
    assert many <= 1.15 * few
    assert peak(4, keep=True) > 1.5 * few  # the measure sees a graph that is kept


# ---- L2C


@pytest.mark.parametrize(
    ("steps", "objective", "expected"),
    [
        (6, "sdt", (0,)),
        (6, "l2c", (0, 2, 4)),  # k = 5, 3, 1
        (5, "l2c", (0, 1, 3)),  # k = 3, 1, and step 0
        (2, "l2c", (0,)),
    ],
)
def test_pinned_steps(steps: int, objective: str, expected: tuple[int, ...]) -> None:
    assert pinned_steps(steps, objective) == expected


def test_l2c_reuses_what_the_step_before_computed(monkeypatch: pytest.MonkeyPatch, evaluations: list[int]) -> None:
    task, pinned = make_task(), pinned_steps(STEPS, "l2c")
    router = Router(STEPS, LAYERS, 2, 3, pinned)
    images, batch = torch.randn(2, 2, 8, 8), task.draw(2, 7)
    noised = []
    add_noise = DDIMScheduler.add_noise
    monkeypatch.setattr(
        DDIMScheduler, "add_noise", lambda self, *args: noised.append((args, add_noise(self, *args))) or noised[-1][1]
    )
    steps = set()
    for seed in range(8):
        evaluations.clear()
        noised.clear()
        (loss,) = l2c(task, router, Gating(), batch, images, seed)
        steps.add(loss.step)
        assert len(evaluations) == 3 * ENTRIES
        (((real, noise, t), x),) = noised
        assert torch.equal(real, images) and noise.shape == images.shape and 0.7 < noise.std() < 1.3
        assert t.tolist() == [task.scheduler.timesteps[loss.step - 1]] * 2

        run = Trajectory(task, batch, first=loss.step - 1)
        run.x, cache, r = x, [], torch.sigmoid(router.logits[loss.step])

        def fill(_: int, evaluate: Callable, cache: list[Tensor] = cache) -> Tensor:
            cache.append(evaluate())
            return cache[-1]

        def reuse(e: int, evaluate: Callable, r: Tensor = r, cache: list[Tensor] = cache) -> Tensor:
            return r[e] * evaluate() + (1 - r[e]) * cache[e]

        with torch.no_grad():
            run.advance(run.denoise(fill))
            teacher = run.denoise(compute)
        student = run.denoise(reuse)
        expected = (student - teacher).square().mean()
        assert loss.mse.item() == pytest.approx(expected.item(), rel=1e-4) and expected > 0
        a, b = (torch.autograd.grad(value, router.logits[loss.step])[0] for value in (loss.mse, expected))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert steps == {1, 3, 5}
