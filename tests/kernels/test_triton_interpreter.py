"""Off the card the kernels count with the numbers that they have on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# To the nearest, halves to the even one, the largest for what is larger, those without an exponent.
AS_FLOAT8 = {
    1.97: 2.0,
    1.0625: 1.0,
    1.1875: 1.25,
    -500.0: -448.0,
    240.5: 240.0,
    0.0098: 0.009765625,
    0.0009: 0.0,
}


@triton.jit
def _in_float8(x, out, size: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, size)
    tl.store(out + at, tl.load(x + at).to(tl.float8e4nv).to(tl.float32))


@triton.jit
def _matrix_product(x, y, out, size: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conversions_to_eight_bits_are_the_cards(dtype: torch.dtype) -> None:
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no 8-bit floats")
    few = torch.tensor(list(AS_FLOAT8)).to(dtype)
    x = torch.cat(
        [few, torch.randn(256 - len(few), generator=torch.Generator().manual_seed(0)).to(dtype) * 30]
    )
    out = torch.empty(256, device=DEVICE)
    _in_float8[1,](x.to(DEVICE), out, size=256)
    assert torch.equal(out.cpu(), x.float().clamp(-448, 448).to(torch.float8_e4m3fn).float())
    if dtype == torch.float32:
        assert out[: len(few)].tolist() == list(AS_FLOAT8.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_of_the_numbers(dtype: torch.dtype) -> None:
    def normal() -> Any:
        return torch.randn(16, 16, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(0)
    x, y, out = normal(), normal(), torch.empty(16, 16, device=DEVICE)
    _matrix_product[1,](x.to(DEVICE), y.to(DEVICE), out, size=16)
    torch.testing.assert_close(out.cpu(), x.float() @ y.float())
