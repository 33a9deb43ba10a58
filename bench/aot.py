"""Compile every variant of the Triton kernels for NVIDIA GPUs, without one, and read what the compiler made of them.

    make kernels

Registers, spills and shared memory come from the cubin; loads and stores from the PTX. Exits with 1 if a kernel spills
or moves a tensor by less than 128 bits at a time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harmonica_rt.kernels import combine
from harmonica_rt.kernels.gap import NORMS, gap_kernel, launch_config

ARCHITECTURES = (80, 90, 100, 120)
DTYPES = ("fp32", "fp16", "bf16")
WIDTHS = (384, 1152, 3072, 5120)  # DiT-S; DiT-XL, PixArt; Flux, Qwen-Image; Wan 14B
SUMS = (1, 2, 3, 7)  # values: orders 0 to 2, and order 2 with a carry
SCALARS = 5  # loads of one number each: the step, and a term's slot, gate in either segment and weight


@dataclass(frozen=True)
class Built:
    """What became of one variant on one architecture."""

    architecture: int
    dtype: str
    variant: tuple[str, ...]  # width, norm and rows of a Gap; of a sum its values and weights
    scalars: int  # loads of one number each
    registers: int
    spilled: int  # bytes of stack and local memory
    shared: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int

    @property
    def good(self) -> bool:
        return self.spilled == 0 and self.loads - self.wide_loads == self.scalars and self.stores == self.wide_stores


def build(architecture: int, dtype: str, width: int, norm: str, rows: str) -> Built:
    """Compile Gap for tensors whose addresses and strides are multiples of 16, as torch's allocator gives them.

    `rows` is the dtype of modulation rows.
    """
    config = launch_config(width)
    tensors = dict.fromkeys(("x_ptr", "y_ptr", "arena_ptr"), f"*{dtype}") | {"rows_ptr": f"*{rows}"}
    tensors |= {"step_ptr": "*i32", "table_ptr": "*i32", "weights_ptr": "*fp32"}
    strides = dict.fromkeys(("slot_stride", "step_stride", "sample_stride"), "i64")
    constants = {"WIDTH": width, "BLOCK": config.block, "ROWS": config.rows, "NORM": norm}
    kinds = tensors | strides | {"eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in gap_kernel.arg_names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in tensors | strides}
    variant = (str(width), f"{norm}, {rows} rows")
    return _built(architecture, dtype, variant, SCALARS, gap_kernel, signature, constants, divisible, config.warps)


def build_sum(architecture: int, dtype: str, terms: int, per_channel: bool) -> Built:
    """Compile the weighted sum likewise. Weights per channel are read one by one: 4 elements of a thread each."""
    numbers = {name: "fp32" if name[0] == "w" else "i32" for name in combine._NUMBERS}
    tensors = dict.fromkeys(("out_ptr", *(f"v{k}" for k in range(combine.MOST))), f"*{dtype}")
    tensors["channels_ptr"] = "*fp32"
    constants = {"TERMS": terms, "CHANNELS": per_channel, "BLOCK": combine.BLOCK}
    kinds = tensors | numbers | dict.fromkeys(("total", "inner", "count"), "i32")
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds[name] for name in combine.combine_kernel.arg_names}
    aligned = {*tensors, "total"}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    each = combine.BLOCK // (32 * combine.WARPS)
    variant = (f"{terms} values", "per channel" if per_channel else "numbers")
    scalars = terms * each if per_channel else 0
    return _built(
        architecture, dtype, variant, scalars, combine.combine_kernel, signature, constants, divisible, combine.WARPS
    )


def _built(
    architecture: int,
    dtype: str,
    variant: tuple[str, ...],
    scalars: int,
    function: triton.JITFunction,
    signature: dict[str, str],
    constants: dict[str, object],
    divisible: dict[tuple[int], list],
    warps: int,
) -> Built:
    kernel = triton.compile(
        ASTSource(function, signature, constants, divisible),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps},
    )
    registers, stack, shared, local = _resources(kernel.asm["cubin"])
    loads, stores = (re.findall(rf"\b{op}\.global\S*", kernel.asm["ptx"]) for op in ("ld", "st"))
    return Built(
        architecture,
        dtype,
        variant,
        scalars,
        registers,
        stack + local,
        shared,
        len(loads),
        sum(_wide(load) for load in loads),
        len(stores),
        sum(_wide(store) for store in stores),
    )


def _wide(instruction: str) -> bool:
    """128 bits at a time: four words of 32 bits or two of 64."""
    return bool(re.search(r"\.v4\.[bfus]32|\.v2\.[bfus]64", instruction))


def _resources(cubin: bytes) -> tuple[int, int, int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return tuple(int(re.search(rf"\b{name}:(\d+)", done.stdout)[1]) for name in ("REG", "STACK", "SHARED", "LOCAL"))


def variants(architectures: tuple[int, ...] = ARCHITECTURES, widths: tuple[int, ...] = WIDTHS) -> Iterator[tuple]:
    for architecture in architectures:
        for dtype in DTYPES:
            for width in widths:
                for norm in NORMS:
                    for rows in sorted({dtype, "fp32"}):
                        yield architecture, dtype, width, norm, rows


def sum_variants(architectures: tuple[int, ...] = ARCHITECTURES) -> list[tuple]:
    return [
        (sm, dtype, terms, own) for sm in architectures for dtype in DTYPES for terms in SUMS for own in (False, True)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sm", type=int, action="append", help=f"architecture; by default {ARCHITECTURES}")
    arguments = parser.parse_args(argv)
    console = Console(width=120)
    wanted = list(variants(tuple(arguments.sm or ARCHITECTURES)))
    sums = sum_variants(tuple(arguments.sm or ARCHITECTURES))
    jobs = [(build, variant) for variant in wanted] + [(build_sum, variant) for variant in sums]
    built = [make(*variant) for make, variant in track(jobs, "compiling", console=console, transient=True)]
    out = Table(title=f"Kernels, compiled ahead of time with triton {triton.__version__} (no GPU involved)")
    columns = (
        "sm",
        "dtype",
        "width, values",
        "norm, weights",
        "registers",
        "spilled",
        "shared",
        "128-bit loads",
        "128-bit stores",
        "",
    )
    for column in columns:
        out.add_column(column, justify="right")
    for b in built:
        out.add_row(
            *(str(b.architecture), b.dtype, *b.variant),
            *(str(b.registers), str(b.spilled), str(b.shared)),
            f"{b.wide_loads} of {b.loads - b.scalars}",
            f"{b.wide_stores} of {b.stores}",
            "" if b.good else "BAD",
        )
    console.print(out)
    return 0 if all(b.good for b in built) else 1


if __name__ == "__main__":
    sys.exit(main())
