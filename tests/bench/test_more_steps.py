"""More sampler steps than computed ones: every run asked for is a row, and nearer to the converged solution."""

from __future__ import annotations

import pytest
import torch

from bench import run_more_steps
from bench.run_more_steps import main, table


def test_a_row_a_run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_more_steps.Sampling, "converged", lambda self, start: self(start, 12))
    sizes = ["--count", "2", "--rounds", "1", "--backend", "eager", "--steps", "6", "12", "--computed", "4"]
    assert main([*sizes, "--order", "1", "--level", "blocks", "output", "--plain", "ddim:2", "dpmsolver++:3"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| | ms/image | plain | blocks, order 1 | output, order 1 |"
    found = {name: cells for name, *cells in ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)}
    assert found.keys() == {"ddim, 2 steps", "dpmsolver++, 3 steps", "6 steps, 4 computed", "12 steps, 4 computed"}
    mean = {name: float(cells[1].split(" / ")[0]) for name, cells in found.items() if cells[1]}
    reused = {name: float(cells[2].split(" / ")[0]) for name, cells in found.items() if cells[2]}
    assert mean.keys() | reused.keys() == found.keys()
    assert min(reused.values()) > max(mean.values())


def test_rows_are_in_the_order_of_their_times() -> None:
    values = torch.tensor([30.0, 20.0])
    rows = table({("slow", "plain"): (9.0, values), ("fast", "plain"): (3.25, values)}).splitlines()[2:]
    assert rows == ["| fast | 3.2 | 25.0 / 20.0 |", "| slow | 9.0 | 25.0 / 20.0 |"]
