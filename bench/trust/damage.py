"""Bytes of a file changed at random, as a disk, a transfer or someone with a purpose would."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from random import Random

LENGTHS = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = (
    b"0",
    b"-1",
    b"1e308",
    b"1e999",
    b"NaN",
    b"1" + b"0" * 30,
    b"4294967296",
    b"99999999",
    b"0.5",
    b"true",
    b"[]",
)
PIECES = (
    b"[" * 3000,
    b'{"a":' * 3000,
    b"cos\nsystem\n",
    b"\x80\x02cbuiltins\neval\n",
    b"\x00" * 64,
    b'"' * 9,
    b"\xff\xfe",
)
PIECES += (b"__builtin__\nbytearray\n", b'"weights": null, ', b"PK\x05\x06" + b"\x00" * 18, b"\\ud800")
PIECES += (b"\xed\xa0\x80", b'"' * 9, b"\xff\xfe")


def damaged(rng: Random, data: bytes) -> bytes:
    """`data` after one to four changes; never equal to it."""
    out = data
    while out == data:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            out = rng.choice(CHANGES)(rng, out)
    return out


def _stretch(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randint(0, len(data))
    return start, min(len(data), start + rng.choice((1, 1, 2, 8, 64, len(data))))


def _flip(rng: Random, data: bytes) -> bytes:
    if not data:
        return b"\x00"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _overwrite(rng: Random, data: bytes) -> bytes:
    start, end = _stretch(rng, data)
    return data[:start] + rng.choice((bytes(end - start), rng.randbytes(end - start))) + data[end:]


def _insert(rng: Random, data: bytes) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + rng.choice((rng.randbytes(rng.choice((1, 4, 100))), *PIECES)) + data[at:]


def _delete(rng: Random, data: bytes) -> bytes:
    start, end = _stretch(rng, data)
    return data[:start] + data[end:]


def _cut(rng: Random, data: bytes) -> bytes:
    return data[: rng.randint(0, len(data))]


def _double(rng: Random, data: bytes) -> bytes:
    start, end = _stretch(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 50 if end - start <= 64 else 1)) + data[end:]


def _move(rng: Random, data: bytes) -> bytes:
    start, end = _stretch(rng, data)
    rest = data[:start] + data[end:]
    at = rng.randint(0, len(rest))
    return rest[:at] + data[start:end] + rest[at:]


def _length(rng: Random, data: bytes) -> bytes:
    """A count, as headers have it: often at the start, where safetensors has its own, or in the end of an archive."""
    form = rng.choice(("<Q", "<I", "<H", ">I"))
    size = struct.calcsize(form)
    at = rng.choice((0, rng.randint(0, len(data)), max(0, len(data) - rng.randint(size, 100))))
    return data[:at] + struct.pack(form, rng.choice(LENGTHS) % 256**size) + data[at + size :]


def _number(rng: Random, data: bytes) -> bytes:
    """One that is written in digits."""
    found = [match.span() for match in re.finditer(rb"\d+(\.\d+)?", data)]
    if not found:
        return _flip(rng, data)
    start, end = rng.choice(found)
    return data[:start] + rng.choice(NUMBERS) + data[end:]


CHANGES: tuple[Callable[[Random, bytes], bytes], ...] = (
    _flip, _flip, _overwrite, _insert, _delete, _cut, _double, _move, _length, _number, _number,
)  # fmt: skip
