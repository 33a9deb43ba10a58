"""Triton's interpreter (3.6, 3.7) computes bf16 on raw bits: make it round, compute and multiply as a GPU does.

`mend()` is called once, with TRITON_INTERPRET=1 set before triton is imported:
1. casts between fp32 and bf16 round to nearest even (stock: they truncate);
2. bf16 arithmetic without a cast to fp32 raises (stock: it works on the bit patterns and says nothing);
3. a kernel's language is patched once a launch, not at every nested call (speed);
4. a scalar, an array of one element, counts a loop's turns (stock 3.6: an error with numpy 2.4).
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder


def to_bits(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bit patterns, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns -> fp32, exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def needs_mending() -> bool:
    """Whether the interpreter truncates where it should round: false once triton has mended itself."""
    one = interpreter.TensorHandle(np.array([1.00390625 + 2**-20], np.float32), tl.float32)  # just above a tie
    return int(Builder().cast_impl(one, tl.bfloat16).data[0]) == 0x3F80


def mend() -> None:
    cast, convert, binary, unary = Builder.cast_impl, Builder.create_fp_to_fp, Builder.binary_op, Builder.unary_op

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        here, there = source.dtype.scalar, target.scalar
        if here == tl.bfloat16 and there != tl.bfloat16:
            widened = interpreter.TensorHandle(from_bits(source.data), tl.float32)
            return widened if there == tl.float32 else cast(self, widened, target)
        if there == tl.bfloat16 and here != tl.bfloat16:
            return interpreter.TensorHandle(to_bits(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        nearest = rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if nearest and tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
            raise TypeError(f"bf16 arithmetic ({op.__name__}) without a cast to fp32")
        return binary(self, left, right, op)

    def unary_op(self: Any, value: Any, op: Any) -> Any:
        if value.dtype.scalar == tl.bfloat16:
            raise TypeError(f"bf16 arithmetic ({op.__name__}) without a cast to fp32")
        return unary(self, value, op)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    Builder.binary_op, Builder.unary_op = binary_op, unary_op

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor

    patch = interpreter._patch_lang
    interpreter._patch_lang = lambda fn: patch(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # a nested device function, such as tl.sum
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
