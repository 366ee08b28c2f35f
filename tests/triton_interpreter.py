"""Gives Triton's interpreter the conversions and products of small floats that a GPU has.

The interpreter (Triton 3.7) converts to 8-bit floats with bits of its own: 1.97 becomes 1, 500 becomes 256
and halves go up; and of bfloat16 numbers it converts and multiplies the bits. Then tests off the card would
choose by other numbers than the card does. PyTorch converts as the card: to the nearest, of two to the even
one; a number that is too large becomes the largest, which Triton asks of NVIDIA's GPUs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

_SMALL = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2, "bf16": torch.bfloat16}


def mend() -> None:
    """Put them in the place of the interpreter's own, in this process."""
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def converted(self: Any, source: Any, target: Any, _rounding: Any = None) -> Any:
        names = source.dtype.scalar.name, target.scalar.name
        if not any(name in _SMALL for name in names):
            return cast(self, source, target)
        return interpreter.TensorHandle(_in_bits(_numbers(source), target), target.scalar)

    def product(_self: Any, a: Any, b: Any, d: Any, _precision: Any, _imprecise: Any) -> Any:
        of_numbers = np.matmul(_numbers(a), _numbers(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(of_numbers + d.data, d.dtype.scalar)

    builder.cast_impl = converted
    builder.create_fp_to_fp = converted
    builder.create_dot = product


def _numbers(x: Any) -> np.ndarray[Any, Any]:
    """What the handle's bits mean; the interpreter holds small floats as unsigned integers."""
    small = _SMALL.get(x.dtype.scalar.name)
    if small is None:
        return x.data
    bits = torch.from_numpy(np.array(x.data, order="C").reshape(-1))
    return bits.view(small).float().numpy().reshape(x.data.shape)


def _in_bits(numbers: np.ndarray[Any, Any], target: Any) -> np.ndarray[Any, Any]:
    """As the interpreter holds numbers of the dtype `target`."""
    small = _SMALL.get(target.scalar.name)
    if small is None:
        return numbers.astype(interpreter._get_np_dtype(target))
    x = torch.from_numpy(np.array(numbers, order="C").reshape(-1)).double()
    if small.itemsize == 1:
        x = x.clamp(-torch.finfo(small).max, torch.finfo(small).max)  # NaN stays
    bits = x.to(small).view(torch.uint8).numpy()
    return bits.view(f"uint{8 * small.itemsize}").reshape(numbers.shape)
