"""What can be known of bench-gpu without a GPU: it says so, and its Gap candidates agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import run_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run make bench-gpu")
def test_without_cuda_it_says_so_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_gpu.main(["--out", str(tmp_path / "gpu")]) == 2
    assert "expected a CUDA device, found none; nothing was measured" in capsys.readouterr().out
    assert not (tmp_path / "gpu").exists()


def test_the_gap_candidates_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    results = []
    for position in range(3):
        torch.manual_seed(0)
        candidates, moved = run_gpu.gap_candidates(2, 5, 24, 3, torch.float32, "cpu")
        assert moved >= 4 * 2 * 5 * 24 * (2 + 3 + 1)
        results.append(list(candidates.values())[position]())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)
