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
