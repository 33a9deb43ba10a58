"""LTX-Video at level branches: rms norms, text read by every block, positions told or as coordinates."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from hypothesis import strategies as st
from torch import Tensor

import harmonica_rt as hrt
from harmonica_rt.models import adapt
from tests.conftest import assert_close
from tests.pipelines.made import MADE

from .adapter_cases import STEPS, TIMES, Calls, Case, full

WIDTH = 16
CONFIG = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3}
CONFIG |= {"cross_attention_dim": WIDTH, "caption_channels": 6}
SCALE = (0.32, 32, 32)  # the pipeline's, at 25 frames a second


def given(
    config: Any, randn: Callable[..., Tensor], batch: int, text: int, frames: int, masked: bool = True
) -> tuple[Tensor, dict[str, Any]]:
    kept = torch.arange(text) <= torch.arange(batch)[:, None]  # one token more in each sample
    arguments = {
        "encoder_hidden_states": randn(batch, text, config.caption_channels),
        "encoder_attention_mask": kept.long() if masked else None,
        "num_frames": frames,
        "height": 2,
        "width": 3,
        "rope_interpolation_scale": SCALE,
    }
    return randn(STEPS, batch, frames * 6, config.in_channels), arguments


def with_another_norm() -> LTXVideoTransformer3DModel:
    model = LTX.make()
    model.transformer_blocks[1].norm2 = torch.nn.RMSNorm(WIDTH)
    return model


ENDS, NORM, CALL, TERM = 3, 2, 2, 1

LTX = Case(
    model=LTXVideoTransformer3DModel,
    config=CONFIG,
    width=WIDTH,
    given=given,
    size=2,
    sizes=st.integers(1, 4),
    layout=[("transformer_blocks", 3, ("attn", "cross_attn", "mlp"))],
    launches=(ENDS + 3 * (2 * NORM + 3 * (CALL + TERM)) + NORM, ENDS + 3 * 3 * TERM + NORM),
    kinds={
        "as published": {},
        "norms with weights": {"norm_elementwise_affine": True, "norm_eps": 1e-3},
        "other channels out": {"out_channels": 7},
        "patches": {"patch_size": 2, "patch_size_t": 3},
    },
    variants=({"norm_elementwise_affine": True}, {}),
    options=({"masked": True}, {"masked": False}),
    lora=("to_q", "to_out.0", "net.2", "proj_in", "linear_1"),
    refused_models={"a norm": (with_another_norm, r"transformer_blocks\.1\.norm2: expected a plain RMSNorm")},
    refused_calls={
        name: ({name: value}, message)
        for name, value, message in (
            ("attention_kwargs", {"scale": 0.5}, r"attention_kwargs: expected none at level 'branches'.*'blocks'"),
            ("timestep", torch.ones(2, 12), r"timestep: expected a tensor of shape \[2\], got \[2, 12\]"),
            (
                "hidden_states",
                torch.ones(2, 12, 5),
                r"hidden_states: expected a tensor \[batch, tokens, 4\], got \[2, 12, 5\]",
            ),
            (
                "encoder_hidden_states",
                torch.ones(1, 3, 6),
                r"encoder_hidden_states: expected .* \[2, 3, 6\], got \[1, 3, 6\]",
            ),
            (
                "encoder_attention_mask",
                torch.ones(2, 1, 3),
                r"encoder_attention_mask: expected .* \[2, 3\], got \[2, 1, 3\]",
            ),
            ("num_frames", 3, r"num_frames, height, width: expected those of 12 tokens, .* got \(3, 2, 3\)"),
            ("height", None, r"num_frames, height, width: .* got \(2, None, 3\)"),
            (
                "rope_interpolation_scale",
                (torch.ones(2), 32, 32),
                "rope_interpolation_scale: expected three numbers, got",
            ),
            (
                "video_coords",
                torch.ones(2, 12, 3),
                r"video_coords: expected a tensor of shape \[2, 3, 12\], got \[2, 12, 3\]",
            ),
        )
    },
)
POSITIONS = {
    "scaled": {},
    "coordinates": {"num_frames": None, "height": None, "width": None, "rope_interpolation_scale": None},
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_positions_are_the_models_to_the_last_bit(positions: dict[str, Any]) -> None:
    model = LTX.make()
    calls, adapter = Calls(LTX, model, size=3), adapt(model)
    calls.given |= positions
    if calls.given["num_frames"] is None:
        calls.given["video_coords"] = 50 * torch.rand(2, 3, 18)
    names = ("num_frames", "height", "width", "rope_interpolation_scale", "video_coords")
    wanted = model.rope(calls.samples[0], *(calls.given.get(name) for name in names))
    times = {"timestep": TIMES[:2], "return_dict": True, "attention_kwargs": None, "video_coords": None}
    read = [adapter.inputs({**times, "hidden_states": sample, **calls.given}) for sample in calls.samples[:2]]
    held = adapter.hold(SimpleNamespace(sample=(2, 18, 4), context=3, dtype=torch.float32, device="cpu"))
    adapter.encode(read[0].conditioning, held)
    assert torch.equal(held["cos"], wanted[0]) and torch.equal(held["sin"], wanted[1])
    assert all(a is b for a, b in zip(read[0].conditioning, read[1].conditioning))
    assert_close(calls.run(hrt.compile(model, full(model), backend="eager")), calls.run(model), 1e-5)


def test_diffusers_own_pipeline_runs_on_it() -> None:
    made = MADE["ltx"]
    pipe = made.make()
    model, wanted = pipe.transformer, made.call(pipe)
    pipe.transformer = hrt.compile(model, hrt.Schedule.full(model, made.steps, level="branches"), backend="eager")
    for _ in range(2):
        assert_close([made.call(pipe)], [wanted], 1e-5)
    assert len(pipe.transformer._plans) == 1


def test_macs_unless_told_are_the_pipelines() -> None:
    adapter = adapt(LTX.make())
    assert adapter.macs(None, None, 1) == adapter.macs(16, 22, 1, 128)
