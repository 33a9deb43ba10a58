"""The Gap op as torch sees it; the kernel itself is tested in tests/interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import aot
from harmonica_rt.kernels.gap import (
    DTYPES,
    NORMS,
    bytes_moved,
    gap,
    gap_kernel,
    gap_reference,
    launch_arguments,
    launch_config,
)


def operands(
    dtype: torch.dtype = torch.float32, batch: int = 2, tokens: int = 5, width: int = 12, terms: int = 3
) -> dict:
    return {
        "x": torch.randn(batch, tokens, width).to(dtype),
        "y": torch.zeros(batch, tokens, width, dtype=dtype),
        "arena": torch.randn(4, batch, tokens, width).to(dtype),
        "rows": torch.randn(2, batch, 6, width).to(dtype),
        "step": torch.tensor([1], dtype=torch.int32),
        "table": torch.tensor([gates(k) for k in range(terms)], dtype=torch.int32).view(-1, 3),
        "weights": torch.randn(terms),
        "norm": "layer",
        "shift": (0, 5),
        "scale": (1, -1),
        "eps": 1e-6,
        "split": min(2, tokens),
    }


def gates(term: int) -> list[int]:
    """Slot, and gate rows of both segments: none, a row, nothing to add."""
    return [term, 2 + term if term else -1, 3 if term % 2 else -2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["none", "rms"])
def test_the_op_is_what_it_says_to_torch(dtype: torch.dtype, norm: str) -> None:
    torch.library.opcheck(gap, tuple((operands(dtype) | {"norm": norm}).values()))


def test_the_cpu_op_works_in_place() -> None:
    call = operands()
    wanted = gap_reference(
        *(call["x"], call["arena"], call["rows"], 1, call["table"].tolist(), call["weights"].tolist()),
        *(call[name] for name in ("norm", "shift", "scale", "eps", "split")),
    )
    gap(**call)
    for actual, expected in zip((call["x"], call["y"]), wanted):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would take the current one: a model on cuda:1 would be launched on cuda:0."""
    current, launched = [None], []

    class Guard:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __enter__(self) -> None:
            current.append(self.tensor)

        def __exit__(self, *error: object) -> None:
            current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple) -> Any:
            return lambda *args, **kwargs: launched.append((current[-1], args[0]))

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr("harmonica_rt.kernels.gap.gap_kernel", Kernel())
    gap._init_fn(**(call := operands()))
    assert launched[0][0] is launched[0][1] is call["x"]
    assert current == [None]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"norm": "batch"}, "norm: expected one of .*, got 'batch'"),
        ({"y": torch.zeros(2, 5, 11)}, r"y: expected shape \(2, 5, 12\), got \(2, 5, 11\)"),
        ({"y": torch.zeros(2, 5, 12, dtype=torch.float16)}, "y: expected torch.float32, got torch.float16"),
        ({"y": torch.zeros(2, 12, 5).transpose(1, 2)}, "y: expected a contiguous tensor"),
        ({"arena": torch.zeros(4, 2, 6, 12)}, r"arena: expected \[slots, 2, 5, 12\]"),
        ({"rows": torch.zeros(2, 3, 6, 12)}, r"rows: expected \[steps, 2, rows, 12\]"),
        ({"rows": torch.zeros(2, 2, 6, 12, dtype=torch.float16)}, "rows: expected torch.float32 .*, got torch.float16"),
        ({"shift": (0, 6)}, r"shift: expected two rows, -1 to 5, got \(0, 6\)"),
        ({"scale": (-2, 0)}, r"scale: expected two rows, -1 to 5, got \(-2, 0\)"),
        ({"scale": (1,)}, r"scale: expected two rows, -1 to 5, got \(1,\)"),
        ({"split": 6}, "split: expected 0 to 5 tokens, got 6"),
        ({"split": -1}, "split: expected 0 to 5 tokens, got -1"),
        ({"table": torch.zeros(3, 3, dtype=torch.int64)}, r"table: expected int32 \[terms, 3\], got torch.int64"),
        ({"table": torch.zeros(3, 2, dtype=torch.int32)}, r"table: expected int32 \[terms, 3\], got .* \(3, 2\)"),
        ({"weights": torch.zeros(2)}, r"weights: expected float32 \[3\]"),
        ({"step": torch.zeros(1, dtype=torch.int64)}, "step: expected int32"),
        ({"x": torch.zeros(2, 5, 12, dtype=torch.float64)}, "x: expected one of .*, got torch.float64"),
    ],
)
def test_what_a_launch_refuses(change: dict, match: str) -> None:
    call = operands() | change
    before = call["x"].clone()
    with pytest.raises(AssertionError, match=match):
        gap(**call)
    assert torch.equal(call["x"], before)


def test_few_variants_serve_every_schedule() -> None:
    """What makes a variant are the constants of a launch: the same for any terms, batch, tokens, split and rows.

    Of what differs between them triton specialises on no number's value.
    """
    seen = set()
    for batch, tokens, terms in [(1, 1, 0), (2, 5, 1), (3, 16, 2), (16, 256, 56)]:
        for norm in NORMS:
            call = operands(batch=batch, tokens=tokens, terms=terms) | {"norm": norm}
            call["arena"] = torch.zeros(60, batch, tokens, 12)
            call["rows"] = torch.zeros(2, batch, 60, 12)
            constants = launch_arguments(**call)[2]
            seen.add(tuple(constants.items()))
    assert len(seen) == len(NORMS)
    numbers = {"terms", "tokens", "split", "total", "shift_0", "shift_1", "scale_0", "scale_1", "eps", "fresh"}
    assert {p.name for p in gap_kernel.params if p.do_not_specialize} == numbers


@pytest.mark.parametrize("width", [1, 4, 33, 128, 384, 1152, 1536, 2048, 3072, 5120, 8192])
def test_every_width_has_a_launch(width: int) -> None:
    config = launch_config(width)
    assert config.block >= width
    assert config.block & (config.block - 1) == 0
    assert config.block * config.rows <= 8192
    per_thread = config.block * config.rows / (32 * config.warps)
    assert per_thread <= 32, "a thread's share of a row must fit its registers"


def test_rows_in_the_millions_have_int64_offsets() -> None:
    """2^22 rows of 1152 do not fit 32 bits: the offsets are made of 64-bit numbers."""
    x = torch.empty(1 << 14, 1 << 8, 1152, dtype=torch.bfloat16, device="meta")
    call = operands() | {"x": x, "y": x, "arena": x[None], "rows": torch.empty(1, 1 << 14, 6, 1152, device="meta")}
    call["rows"] = call["rows"].bfloat16()
    for name in ("step", "table", "weights"):
        call[name] = call[name].to("meta")
    grid, arguments, _ = launch_arguments(**call)
    assert grid == (1 << 22,)
    assert x.numel() > 2**31
    strides = dict(zip(gap_kernel.arg_names, arguments))
    assert strides["slot_stride"] == x.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [0, 1, 3])
@pytest.mark.parametrize("split", [0, 63, 256])
@pytest.mark.parametrize("fresh", [False, True])
def test_bytes_are_each_operand_once(dtype: torch.dtype, terms: int, split: int, fresh: bool) -> None:
    call = operands(dtype, batch=2, tokens=256, width=384, terms=terms) | {"split": split}
    call["rows"] = call["rows"].float()
    token, row, table = 2 * 384 * dtype.itemsize, 2 * 384 * 4, call["table"].tolist()
    first = [gate for _, gate, _ in table] * (split > 0)
    second = [gate for _, _, gate in table] * (split < 256)
    read = {gate for gate in (*first, *second) if gate >= 0}
    read |= ({0, 1} if split > 0 else set()) | ({5} if split < 256 else set())
    streams = 2 if fresh else 2 + (terms > 0)  # x is written though not read, or read and written
    least = token * (256 * streams + split * len(first) + (256 - split) * (len(second) - second.count(-2)))
    least += row * len(read)
    names = ("x", "rows", "table", "norm", "shift", "scale", "split")
    moved = bytes_moved(*(call[name] for name in names), fresh=fresh)
    assert least <= moved <= least + 64


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_compiled_kernels_neither_spill_nor_move_less_than_128_bits(architecture: int) -> None:
    built = [aot.build(*variant) for variant in aot.variants((architecture,))]
    assert len(built) == 60
    assert [b for b in built if not b.good] == []
    assert max(b.registers for b in built) <= 128
