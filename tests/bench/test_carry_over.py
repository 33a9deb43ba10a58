"""Learned schedules used other than they were learned: the user's own command on two images, and what it compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from bench import recolour, run_carry_over
from bench.measure.judges import SIDE, glyphs
from bench.models.reference import load_pipeline

SHIPPED = Path(run_carry_over.__file__).parent / "schedules"


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    file = SHIPPED / "pixart-emoji-dpmsolver++20-1.65x-trunk.json"
    asked = ["--model", "pixart-emoji", "--schedule", str(file), "--count", "2", "--few", "1", "--only", "3"]
    assert run_carry_over.main(asked) == 0
    out = capsys.readouterr().out
    assert f"{file.name}; forecast of order" in out
    assert out.count("\n| ") == 5 and "| 100% |" in out and "| guidance 2 |" in out


def test_a_schedule_for_each_half_runs_at_its_own_noise_levels(capsys: pytest.CaptureFixture[str]) -> None:
    files = [SHIPPED / f"flux-emoji-flow-euler20-output3.3-times-{context}.json" for context in ("cond", "uncond")]
    asked = ["--schedule", "cond={},uncond={}".format(*files), "--count", "2", "--few", "1", "--only", "1"]
    assert run_carry_over.main(asked) == 0
    out = capsys.readouterr().out
    assert f"{files[0].name}, {files[1].name}; forecast of order" in out
    gain = float(out.split("| as learned, other noises |")[1].split("|")[2])
    assert gain > 3


def test_forecasts_compute_the_same_and_are_not_learned() -> None:
    for name in ("pixart-emoji-dpmsolver++20-2x-trunk.safetensors", "flux-emoji-flow-euler20-output2.json"):
        learned = hrt.Schedule.load(SHIPPED / name)
        found = list(run_carry_over.forecasts(learned, learned.timesteps))
        assert len(found) == len(set(found)) == (9 if learned.level == "branches" else 3)
        for own in found:
            assert not own.learned and own.timesteps == learned.timesteps
            assert np.array_equal(own.compute, learned.compute) and np.array_equal(own.output, learned.output)


def test_int8_weights_are_within_half_a_step_of_a_rows_scale() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4))
    own, was = run_carry_over.rounded(model), model[0].weight
    step = was.abs().amax(1, keepdim=True) / 127
    assert (own[0].weight - was).abs().max() > 0 and ((own[0].weight - was).abs() <= 0.5001 * step).all()
    assert len((own[0].weight / step).round().unique()) > 1 and torch.equal(own[0].bias, model[0].bias)


@pytest.mark.parametrize("name", recolour.MODELS)
def test_a_lora_is_learned_and_fused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    assert recolour.main(["--model", name, "--minutes", "0.01", "--out", str(file)]) == 0
    model = load_pipeline(name).transformer
    own = recolour.fused(model, file)
    assert [*own.state_dict()] == [*model.state_dict()]
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, own.state_dict()[key])]
    assert changed and all(key.endswith("weight") for key in changed)


def test_recoloured_glyphs_are_the_glyphs_in_other_channels() -> None:
    names = load_pipeline("pixart-emoji").prompts.names
    was, now = glyphs(names).unflatten(1, (3, SIDE, SIDE)), recolour.recoloured(names)
    assert torch.equal(now[:, 1], was[:, 0]) and not torch.equal(now, was)
