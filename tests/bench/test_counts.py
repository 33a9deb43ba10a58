"""Counts of models at their real sizes, on a tiny one: those of the model's own adapter, and nothing twice."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench import counts
from bench.counts import count, fused
from bench.measure.record import Record
from bench.models.real_sizes import CASES, Case
from harmonica_rt.models import adapt_at_branches

TOKENS, TEXT, WIDTH, BYTES = 16, 6, 24, 2
FLUX = Case(
    "FluxTransformer2DModel",
    {
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 10,
        "pooled_projection_dim": 14,
        "axes_dims_rope": (4, 4, 4),
    },
    {
        "hidden_states": (1, TOKENS, 8),
        "encoder_hidden_states": (1, TEXT, 10),
        "pooled_projections": (1, 14),
        "timestep": (1,),
        "img_ids": (TOKENS, 3),
        "txt_ids": (TEXT, 3),
    },
    {},
    CASES["flux.1-dev"].levels,
)
STREAM = BYTES * (TEXT + TOKENS) * WIDTH


def macs(record: Record) -> float:
    return sum(launch.flops for launch in record.launches) / 2


@pytest.mark.parametrize("carry", [0.0, 1.0])
def test_blocks_are_the_forward_with_copies_of_streams(carry: float) -> None:
    model = FLUX.build()
    own = adapt_at_branches(model).macs(2 * 4, 2 * 4, 1, TEXT)
    got = count(model, FLUX.arguments(), level="blocks", carry=carry)
    assert macs(got.own) == macs(got.computed) == own.fixed + 2 * sum(own.branches[:2]) + 3 * own.branches[2]
    assert macs(got.reused) == own.fixed - macs_of_rows(model)
    # Text and image are streams of their own: two slots of each, and as many of what went in
    assert got.slot_bytes == 2 * STREAM * (1 + (carry > 0))
    assert len(got.computed.launches) == len(got.own.launches) + 2 * (1 + (carry > 0))
    extra = sum(launch.bytes for launch in got.computed.launches) - sum(launch.bytes for launch in got.own.launches)
    assert extra == got.slot_bytes, "each copy reads and writes a stream, and there are two slots of each"
    assert len(got.reused.launches) < len(got.own.launches) / 2


def macs_of_rows(model: torch.nn.Module) -> int:
    """Of the blocks' modulation layers, which a step that reuses the blocks does not call."""
    joint = [layer for block in model.transformer_blocks for layer in (block.norm1.linear, block.norm1_context.linear)]
    single = [block.norm.linear for block in model.single_transformer_blocks]
    return sum(layer.weight.numel() for layer in (*joint, *single))


def test_branches_reuse_in_one_launch_that_reads_each_slot_once() -> None:
    got = count(FLUX.build(), FLUX.arguments(), level="branches")
    slots = 2 * (2 * 2 + 3)
    assert got.slot_bytes == slots * STREAM
    (gap,) = [i for i, (reads, _) in enumerate(got.reused.tensors) if len(reads) == 3 and reads[1].ndim == 4]
    rows = BYTES * (slots + 2) * WIDTH
    assert got.reused.launches[gap].bytes == got.slot_bytes + 3 * STREAM + rows
    assert len(got.reused.launches) == 5


def test_what_lies_between_products_is_one_launch() -> None:
    kept = torch.empty(4, 4, device="meta")
    with torch.device("meta"), Record() as record:
        x, w = torch.empty(4, 4), torch.empty(4, 4)
        y = (x + 1).mul(x)  # reads x, writes y
        z = y @ w
        kept.copy_(z * 2)  # reads z, writes kept, which is not the recording's
        (z - y) @ w  # reads y and z, writes their difference
    size = 4 * 4 * 4
    assert [launch.bytes // size for launch in record.launches] == [2, 3, 3, 2, 2, 3, 3]
    assert [launch.bytes // size for launch in fused(record)] == [2, 3, 4, 3]
    assert [launch.flops for launch in fused(record)] == [0, 128, 0, 128]


def test_the_command_prints_a_line_a_level(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "CASES", {"tiny": FLUX})
    assert counts.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| tiny, blocks, carry 0",
        "| tiny, blocks, carry 1",
        "| tiny, branches",
    ]
    assert {line.count("|") for line in lines} == {len(counts.HEADS) + 1}
