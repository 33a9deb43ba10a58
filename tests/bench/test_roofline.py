"""The prediction's inputs, counted: the same launches the cudagraph backend reports, the same FLOPs diffusers does."""

from __future__ import annotations

import pytest
import torch

import harmonica_rt as hrt
from bench import roofline
from bench.measure import dit_launches
from bench.measure.gpu_time import Assumptions, Gpu, Launch
from bench.measure.record import attention
from harmonica_rt.models import adapt

GPU = Gpu("test", flops=1e12, bandwidth=1e9)
PEAK = Assumptions(launch_us=5, node_us=1, flops_fraction=1, bandwidth_fraction=1)


def test_a_launch_takes_the_longer_of_its_flops_and_bytes() -> None:
    assert PEAK.busy(Launch(2e6, 1e3), GPU) == pytest.approx(2e-6)
    assert PEAK.busy(Launch(1e5, 3e3), GPU) == pytest.approx(3e-6)
    assert PEAK.launched([Launch(2e6, 0), Launch(8e6, 0)], GPU) == pytest.approx(13e-6), "the host is slower, then not"
    assert PEAK.replayed([Launch(2e6, 0), Launch(8e6, 0)], GPU) == pytest.approx(12e-6)


def test_flops_are_the_adapters_and_diffusers_own() -> None:
    model = dit_launches.build("dit-s-2", 8)
    full = hrt.Schedule.full(model, 1)
    macs = adapt(model).macs(None, None, 2)
    (theirs,) = dit_launches.diffusers_launches(model, full, 2, reuse=False)
    (ours,) = dit_launches.program_launches(adapt(model), full, 2, shared=1)
    total = 2 * (macs.fixed + 12 * sum(macs.branches))
    assert sum(launch.flops for launch in theirs) == total
    assert sum(launch.flops for launch in ours) == pytest.approx(total, rel=0.01)


def test_launches_are_one_gap_and_the_stages_of_a_branch() -> None:
    model = dit_launches.build("dit-s-2", 8)
    computed, reused = dit_launches.program_launches(adapt(model), hrt.Schedule.uniform(model, 2, 2), 2, shared=2)
    around = len(reused) - 1
    assert len(computed) - around - 1 == 12 * (3 + 2 + 2), "a block: three calls of attention, two GEMMs, two Gaps"
    naive = dit_launches.diffusers_launches(model, hrt.Schedule.uniform(model, 2, 2), 2, reuse=True)
    assert len(naive[1]) < len(naive[0])
    assert len(naive[1]) > 10 * len(reused), "module-level reuse keeps the norms, gates and modulation of what it skips"


def test_counts_by_place_add_up_to_the_steps() -> None:
    model, schedule = dit_launches.build("dit-s-2"), hrt.Schedule.uniform(dit_launches.build("dit-s-2"), 2, 2)
    theirs, ours = dit_launches.diffusers_counts("dit-s-2", 2), dit_launches.program_counts(adapt(model), 2)
    for counts, steps in (
        (theirs, dit_launches.diffusers_launches(model, schedule, 2, reuse=True)),
        (ours, dit_launches.program_launches(adapt(model), schedule, 2, shared=2)),
    ):
        assert 12 * counts.computed + counts.around + (counts.reused if counts is ours else 0) == len(steps[0])
    assert 12 * theirs.reused + theirs.around == len(dit_launches.diffusers_launches(model, schedule, 2, reuse=True)[1])


def test_the_command_says_that_it_predicts(capsys: pytest.CaptureFixture) -> None:
    assert roofline.main(["--model", "dit-s-2", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("PREDICTION") == 2
    assert printed.count("COUNTED") == 1
    assert "not measured" in printed
    assert "H100" in printed
    assert torch.nn.functional.scaled_dot_product_attention is not attention
