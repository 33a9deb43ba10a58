"""Whole trainings: processes, resuming, stopping, failures, budgets. Run as a module it is a two-process training."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harmonica_rt import Schedule
from harmonica_rt.train.router import Router
from harmonica_rt.train.router_command import _start
from harmonica_rt.train.trainer import LossNotFinite, Progress, Settings, Trainer

from ..conftest import make_dit
from .conftest import LAYERS, STEPS, make_task
from .test_checkpoint import fill_disk

SHORT = {"iterations": 3, "refresh": 2, "batch": 2, "lambda_batch": 2, "target_cur": 0.4}
ROOT = Path(__file__).parents[2]


def real_images() -> tuple[Tensor, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, 2, 8, 8, generator=generator), (torch.randint(0, 5, (16,), generator=generator),)


def trainer(steps: int = STEPS, start: Schedule | None = None, double: bool = False, **settings: Any) -> Trainer:
    settings = Settings(**{**SHORT, **settings})
    images = real_images() if settings.objective == "l2c" else None
    return Trainer(make_task(steps=steps, double=double), settings, images=images, start=start)


def state(trained: Trainer) -> dict[str, Any]:
    return {
        "logits": trained.router.to_tensor(),
        "beta": torch.tensor(trained.beta.value or 0.0, dtype=torch.float64),
        "lambda": torch.ones(1) if trained.lambdas.values is None else trained.lambdas.values,
    }


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# ---- what is trained


def test_an_iteration_is_a_whole_trajectory_of_optimiser_steps() -> None:
    trained = trainer(iterations=1, estimator="none", beta=0.0, lr=0.05, target_cur=None)
    before = trained.router.to_tensor()
    trained.run()
    change = (trained.router.to_tensor() - before).flatten(1)
    assert not change[0].any()
    # Adam's first step is lr for every logit; with no cost, all of them up or down by the error's gradient
    assert change[1:].abs().flatten().tolist() == pytest.approx([0.05] * change[1:].numel(), rel=1e-2)


def test_cost_alone_lowers_every_logit_and_clamps() -> None:
    trained = trainer(iterations=3, estimator="none", beta=1e6, target_cur=None, lr=3.0)
    before = trained.router.to_tensor()
    trained.run()
    after = trained.router.to_tensor()
    assert (after[1:] < before[1:]).all() and after.min() == -5.0 and (after[0] == 5.0).all()


@pytest.mark.parametrize("cost_aware", [True, False])
def test_costs(cost_aware: bool) -> None:
    trained = trainer(cost_aware=cost_aware)
    macs = np.array(trained.task.adapter.macs(None, None, 1).branches, dtype=float)
    expected = np.tile(macs / macs.mean() if cost_aware else np.ones(2), LAYERS)
    np.testing.assert_allclose(trained.costs.numpy(), expected, rtol=1e-6)


def test_lambda_weighs_the_error() -> None:
    """Without a cost, the loss reported is the mean of lambda_i MSE_i."""
    trained = trainer(iterations=1, estimator="leave-one-out", beta=0.0, target_cur=None)
    seen: list[Progress] = []
    trained.run(on_progress=seen.append)
    plain = trainer(iterations=1, estimator="none", beta=0.0, target_cur=None)
    plain.run(on_progress=seen.append)
    weighed, unweighed = seen
    assert unweighed.loss == pytest.approx(unweighed.mse) and weighed.mse == pytest.approx(unweighed.mse)
    assert abs(weighed.loss / weighed.mse - 1) > 1e-2
    assert unweighed.lambdas == (1.0, 1.0) and weighed.lambdas[0] < 1 < weighed.lambdas[1]


def test_training_draws_what_the_seed_says() -> None:
    states = []
    for seed in (0, 0, 1):
        trained = trainer(seed=seed)
        trained.run()
        states.append(state(trained))
    assert_same_state(states[0], states[1])
    assert not torch.equal(states[0]["logits"], states[2]["logits"])


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ({"target_speedup": 1.5}, {}),
        ({"target_cur": 0.4}, {}),
        ({"target_speedup": 1.3}, {"objective": "l2c"}),
        ({"target_cur": 0.5}, {"objective": "l2c"}),
    ],
    ids=str,
)
def test_targets_are_met(target: dict[str, float], options: dict[str, Any]) -> None:
    trained = trainer(steps=20, **{"iterations": 2, "target_cur": None, **target, **options})
    schedule = trained.run()
    got = schedule.cur if "target_cur" in target else schedule.speedup(trained.task.model)
    assert got == pytest.approx(next(iter(target.values())), rel=0.02)
    assert f"(target {next(iter(target.values())):g})" in schedule.note
    assert (schedule.sampler, schedule.guidance_scale) == ("DDIMScheduler", 1.5)
    assert schedule.timesteps == tuple(trained.task.scheduler.timesteps.tolist())


def test_a_warm_start_of_uniform_2() -> None:
    start = _start("uniform:2", make_dit(), STEPS)
    trained = trainer(start=start, init="uniform:2", beta=1e-3, target_cur=None)
    fields = trained.task.fields()
    assert np.array_equal(trained.router.to_schedule(0.5, **fields).compute, start.compute)
    before = trained.router.to_tensor()
    trained.run()
    assert (trained.router.to_tensor() - before)[1:].abs().min() > 0


def test_a_warm_start_needs_its_schedule() -> None:
    with pytest.raises(ValueError, match="init"):
        trainer(init="uniform:2")


def test_a_start_of_other_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="init: expected a schedule of 6 steps, got 5"):
        trainer(start=_start("uniform:2", make_dit(), 5), init="uniform:2")


# ---- settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tau": 0.0}, "tau: expected a number between 0 and 1, got 0.0"),
        ({"tau": 1.5}, "tau: expected a number between 0 and 1, got 1.5"),
        ({"objective": "x"}, r"objective: expected one of \('sdt', 'l2c'\), got 'x'"),
        ({"estimator": "x"}, "estimator: expected one of .*, got 'x'"),
        ({"iterations": 0}, "iterations: expected at least 1, got 0"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"refresh": 0}, "refresh: expected at least 1, got 0"),
        ({"lambda_batch": -1}, "lambda_batch: expected at least 1, got -1"),
        ({"target_speedup": 2.0}, "expected one target, got speed-up 2.0 and CUR 0.4"),
        ({"target_cur": None}, "expected beta, a target speed-up or a target CUR, got none"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{**SHORT, **wrong})


def test_images_are_for_l2c_alone() -> None:
    for objective, images in (("l2c", None), ("sdt", real_images())):
        with pytest.raises(ValueError, match=f"images: the l2c objective needs them, and sdt none; got {objective}"):
            Trainer(make_task(), Settings(**SHORT, objective=objective), images=images)


def test_the_papers_settings() -> None:
    settings = Settings.paper(20, batch=8)
    assert (settings.iterations, settings.refresh, settings.lr, settings.beta) == (1000, 25, 0.01, 7e-8)
    assert (settings.batch, settings.estimator, settings.normalise) == (8, "leave-one-out", False)


# ---- resuming

RESUMABLE = [
    {},
    {"target_cur": None, "target_speedup": 1.3, "order": 1},
    {"target_cur": None, "beta": 1e-3, "estimator": "telescoping"},
    {"objective": "l2c"},
]


@pytest.mark.parametrize("options", RESUMABLE, ids=str)
def test_resuming_is_not_having_stopped(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = trainer(iterations=5, **options)
    expected = whole.run()

    def stop(progress: Progress) -> None:
        if progress.iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # as hard as a kill: what goes on has only the file
        trainer(iterations=5, **options).run(tmp_path / "c", every=3, on_progress=stop)
    resumed = trainer(iterations=5, **options)
    resumed.load(tmp_path / "c")
    assert resumed.iteration == 3
    got = resumed.run(tmp_path / "c")
    assert_same_state(state(whole), state(resumed))
    assert resumed.beta.miss == whole.beta.miss
    assert np.array_equal(got.compute, expected.compute)
    again = trainer(iterations=5, **options)
    again.load(tmp_path / "c")
    assert again.iteration == 5
    assert_same_state(state(again), state(whole))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "c"
    trainer(iterations=1).run(path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.1}, "lr expected 0.1, got 0.05"),
        ({"target_cur": 0.5}, "target_cur expected 0.5, got 0.4"),
        ({"estimator": "none"}, "estimator expected none, got gain"),
        ({"seed": 1}, "seed expected 1, got 0"),
    ],
)
def test_other_settings_are_refused(finished: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"made with other settings: {message}"):
        trainer(**change).load(finished)


def test_another_task_is_refused(finished: Path) -> None:
    for steps, double in ((5, False), (STEPS, True)):
        other = trainer(steps=steps, double=double)
        if steps == 5:
            with pytest.raises(ValueError, match=r"made for another task: timesteps expected .*, got"):
                other.load(finished)
    other = Trainer(make_task(seed=1), Settings(**SHORT))
    with pytest.raises(ValueError, match=r"made for another task: weights expected \w+, got \w+"):
        other.load(finished)


def test_more_iterations_may_follow(finished: Path) -> None:
    longer = trainer(iterations=2)
    longer.load(finished)
    longer.run()
    assert longer.iteration == 2


# ---- failures and stopping


@pytest.mark.parametrize("objective", ["sdt", "l2c"])
def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path: Path, objective: str) -> None:
    path = tmp_path / "c"
    broken = trainer(objective=objective)

    def spoil(progress: Progress) -> None:
        broken.task.model.proj_out_2.bias.data.fill_(torch.nan)

    with pytest.raises(LossNotFinite, match=r"iteration 1, step \d: .*not finite .*nan.*last checkpoint is untouched"):
        broken.run(path, every=1, on_progress=spoil)
    resumed = trainer(objective=objective)
    resumed.load(path)
    assert resumed.iteration == 1
    assert resumed.router.to_tensor().isfinite().all()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    with pytest.raises(OSError, match="No space left"):
        trainer().run(path, every=1, on_progress=lambda progress: fill_disk(monkeypatch))
    resumed = trainer()
    resumed.load(path)
    assert resumed.iteration == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_after_the_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    stopped, handlers = trainer(iterations=4), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    steps, clamp = [], Router.clamp_

    def kill(router: Router) -> None:
        clamp(router)
        steps.append(1)
        if len(steps) == STEPS + 1:  # within the second iteration
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Router, "clamp_", kill)
    schedule = stopped.run(tmp_path / "c", every=100)
    monkeypatch.undo()
    assert (stopped.iteration, len(steps)) == (2, 2 * (STEPS - 1))
    assert schedule.note.startswith("SDT + IEPO (gain), 2 iterations of 2")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed, whole = trainer(iterations=4), trainer(iterations=4)
    resumed.load(tmp_path / "c")
    resumed.run()
    whole.run()
    assert_same_state(state(whole), state(resumed))


# ---- processes

DISTRIBUTED = {
    "sdt": {"iterations": 3, "refresh": 2, "batch": 4, "lambda_batch": 3, "target_cur": 0.4},
    "leave-one-out": {"iterations": 3, "refresh": 2, "batch": 4, "target_cur": 0.4, "estimator": "leave-one-out"},
    "l2c": {"objective": "l2c", "iterations": 8, "batch": 4, "target_speedup": 1.2},
}


def distributed(rank: int, folder: Path) -> None:
    """One of two processes: train each of `DISTRIBUTED`, every process saving what it ended with."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    for name, settings in DISTRIBUTED.items():
        settings = Settings(**settings)
        trained = Trainer(make_task(), settings, images=real_images() if name == "l2c" else None)
        assert (trained.ranks, trained.rank) == (2, rank)
        trained.run(folder / f"{name}.checkpoint", every=2)
        save_file(state(trained), folder / f"{name}.{rank}")
    with pytest.raises(ValueError, match="batch: expected a multiple of 2 processes, got 3"):
        Trainer(make_task(), Settings(batch=3, beta=1.0))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.train.test_trainer", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_processes_train_as_one(two_processes: Path, name: str) -> None:
    settings = Settings(**DISTRIBUTED[name])
    one = Trainer(make_task(), settings, images=real_images() if name == "l2c" else None)
    before = one.router.to_tensor()
    one.run()
    first, second = (load_file(two_processes / f"{name}.{rank}") for rank in range(2))
    assert_same_state(first, second)
    assert (one.router.to_tensor() - before).abs().max() > 0.09  # the tolerance is far below what was learned
    for key, value in state(one).items():
        torch.testing.assert_close(first[key], value, rtol=2e-3, atol=2e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_only_the_main_process_writes(two_processes: Path) -> None:
    written = {p.name for p in two_processes.iterdir()}
    assert written == {f"{name}.{end}" for name in DISTRIBUTED for end in ("0", "1", "checkpoint")}
    one = Trainer(make_task(), Settings(**DISTRIBUTED["sdt"]))
    one.load(two_processes / "sdt.checkpoint")
    assert torch.equal(one.router.to_tensor(), load_file(two_processes / "sdt.0")["logits"])


if __name__ == "__main__":
    torch.multiprocessing.start_processes(distributed, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
