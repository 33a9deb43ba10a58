"""The picture of a schedule: one panel a branch that shows what the schedule says."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harmonica_rt import Schedule


def random_plan(branches: tuple[str, ...], steps: int = 6, layers: int = 3) -> Schedule:
    compute = np.random.default_rng(0).random((steps, layers, len(branches))) < 0.5
    compute[0] = True
    return Schedule(compute, model="Tiny", branches=branches)


@pytest.mark.parametrize("branches", [("a",), ("attn", "mlp"), ("attn", "cross_attn", "mlp")])
def test_one_panel_a_branch(branches: tuple[str, ...]) -> None:
    schedule = random_plan(branches)
    figure = schedule.plot()
    assert len(figure.axes) == len(branches)
    for b, (axes, name) in enumerate(zip(figure.axes, branches)):
        (mesh,) = axes.collections
        np.testing.assert_array_equal(np.asarray(mesh.get_array()), schedule.compute[..., b].T)
        assert axes.get_title() == f"{name}: CUR {100 * schedule.cur_by_branch[name]:.0f} %"
        assert axes.get_xlabel() == "step"
    assert [axes.get_ylabel() for axes in figure.axes] == ["layer"] + [""] * (len(branches) - 1)
    assert f"Tiny, 6 steps, order 1: CUR {100 * schedule.cur:.0f} %" in figure.get_suptitle()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_learned_weights_have_a_row_of_their_own(order: int) -> None:
    """How far the newest value's weight is from the forecast's, where something is reused."""
    schedule = random_plan(("attn", "mlp")).replace(order=order)
    change = np.random.default_rng(1).normal(size=schedule.compute.shape)
    weights = schedule.weights.copy()
    weights[..., 0] += np.where(schedule.compute, 0.0, change)
    figure = schedule.replace(weights=weights).plot()
    panels, bar = figure.axes[:4], figure.axes[4:]
    assert len(bar) == 1
    assert [axes.get_xlabel() for axes in panels] == ["", "", "step", "step"]
    assert [axes.get_ylabel() for axes in panels] == ["layer", "", "layer", ""]
    for b, axes in enumerate(panels[:2]):
        np.testing.assert_array_equal(np.asarray(axes.collections[0].get_array()), schedule.compute[..., b].T)
    limits = set()
    for b, (axes, name) in enumerate(zip(panels[2:], schedule.branches)):
        assert axes.get_title() == f"{name}:\nnewest value's weight - forecast's"
        shown = axes.collections[0].get_array()
        np.testing.assert_array_equal(np.ma.getmaskarray(shown), schedule.compute[..., b].T)
        np.testing.assert_allclose(shown.compressed(), change[..., b].T[~schedule.compute[..., b].T])
        low, high = axes.collections[0].get_clim()
        assert low == -high
        limits.add(high)
    assert len(limits) == 1 and 0.5 * abs(change).max() < limits.pop() <= abs(change).max(), "one scale for both"


def test_outputs_that_are_reused_have_no_weights_of_branches() -> None:
    schedule = random_plan(("a",))
    output = np.isin(np.arange(6), [2, 5])
    schedule = schedule.replace(compute=schedule.compute & ~output[:, None, None], output=output)
    figure = schedule.replace(output_weights=0.5 * schedule.output_weights).plot()
    plan, weights = (axes.collections[0].get_array() for axes in figure.axes[:2])
    assert (np.asarray(plan)[:, output] == -1).all() and (np.asarray(plan)[:, ~output] >= 0).all()
    assert np.ma.getmaskarray(weights)[:, output].all() and not weights.compressed().any()


def test_computed_is_darker_than_reused() -> None:
    (mesh,) = random_plan(("a",)).plot().axes[0].collections
    computed, reused = mesh.to_rgba([1.0, 0.0])[:, :3].mean(1)
    assert computed < reused - 0.3


@pytest.mark.parametrize(("steps", "layers"), [(1, 1), (2, 1), (50, 28)])
def test_ticks_are_whole_steps_at_the_middle_of_their_cells(steps: int, layers: int) -> None:
    axes = random_plan(("a",), steps, layers).plot().axes[0]
    for axis, count in ((axes.xaxis, steps), (axes.yaxis, layers)):
        numbers = [int(label.get_text()) for label in axis.get_ticklabels()]
        assert numbers[0] == 0
        assert numbers[-1] < count
        assert axis.get_ticklocs().tolist() == [number + 0.5 for number in numbers]


def test_a_path_gets_a_png_with_the_figures_proportions(tmp_path: Path) -> None:
    figure = random_plan(("attn", "mlp")).plot(tmp_path / "plan.png")
    data = (tmp_path / "plan.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == tuple(round(150 * inches) for inches in figure.get_size_inches())
    random_plan(("attn", "mlp")).plot()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


def test_matplotlib_is_imported_by_plotting_only() -> None:
    code = """
import sys, numpy, harmonica_rt
schedule = harmonica_rt.Schedule(numpy.ones((2, 1, 1), bool), model="Tiny", branches=("a",))
before = "matplotlib" in sys.modules
schedule.plot()
print(before, "matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]
