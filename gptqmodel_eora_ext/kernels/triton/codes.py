"""Reading packed integers in registers: the weight's codes and zeros, and the factors.

Layouts: `kernels.layout` (a row of codes is a little-endian bit stream) and `solve.quantized` (factors).
A *unit* is the shortest run of codes along a stream that fills whole words: one word at 2, 4 and 8 bits, three at 3.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_unit(qweight, unit, n, live, rows, columns, BITS: tl.constexpr):
    """The words of units: three uint32 tiles of the shape of ``unit`` × ``n``, all the same one unless at 3 bits."""
    if BITS == 3:
        row = unit * 3
        first = tl.load(qweight + row * columns + n, mask=live & (row < rows), other=0)
        second = tl.load(qweight + (row + 1) * columns + n, mask=live & (row + 1 < rows), other=0)
        third = tl.load(qweight + (row + 2) * columns + n, mask=live & (row + 2 < rows), other=0)
    else:
        first = tl.load(qweight + unit * columns + n, mask=live & (unit < rows), other=0)
        second = first
        third = first
    return (
        first.to(tl.uint32, bitcast=True),
        second.to(tl.uint32, bitcast=True),
        third.to(tl.uint32, bitcast=True),
    )


@triton.jit
def window(first, second, third, part, BITS: tl.constexpr):
    """The word that holds codes WINDOW · part … of each unit from its lowest bit on: 8 codes, 4 of 8 bits."""
    if BITS == 2:
        return first >> (part * 16)
    elif BITS == 3:  # noqa: RET505 - constexpr branches: only one of them is compiled
        shift = part * 24 % 32
        low = tl.where(part < 2, first, tl.where(part == 2, second, third))
        high = tl.where(part < 2, second, third)
        return (low >> shift) | ((high << 1) << (31 - shift))
    else:
        return first


@triton.jit
def mantissa(word, one, INDEX: tl.constexpr, BITS: tl.constexpr):
    """1 + code / 2^BITS as float32, of the code at INDEX of a `window`.

    The code is put at the top of the mantissa of 1.0: a shift and a logical operation, and no conversion from integers.
    ``one`` is 1.0 as an integer, given at run time: NVIDIA's assembler makes two operations of a mask and a union with
    two constants. Exact; `zero_mantissa` is what to subtract.
    """
    SHIFT: tl.constexpr = INDEX * BITS
    PLACE: tl.constexpr = 23 - BITS
    placed = word >> (SHIFT - PLACE) if SHIFT > PLACE else word << (PLACE - SHIFT)
    return ((placed & (((1 << BITS) - 1) << PLACE)) | one).to(tl.float32, bitcast=True)


@triton.jit
def unit_codes(first, second, third, index, BITS: tl.constexpr):
    """The codes at ``index`` (which broadcasts against the tiles), as int32."""
    start = index * BITS
    if BITS == 3:
        word = start // 32
        shift = (start % 32).to(tl.uint32)
        low = tl.where(word == 0, first, tl.where(word == 1, second, third))
        high = tl.where(word == 0, second, third)
        codes = (low >> shift) | ((high << 1) << (31 - shift))
    else:
        codes = first >> start.to(tl.uint32)
    return (codes & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def load_zeros(qzeros, group, n, live, columns, BITS: tl.constexpr):
    """The zeros of ``group`` × ``n`` as int32; ``qzeros`` of version 2, None for 2^(BITS − 1) throughout."""
    if qzeros is None:
        return 1 << (BITS - 1)
    else:  # noqa: RET505 - a constexpr branch: only one of both is compiled
        words = (columns * BITS + 31) // 32
        start = n * BITS
        shift = (start % 32).to(tl.uint32)
        place = qzeros + group * words + start // 32
        zeros = tl.load(place, mask=live, other=0).to(tl.uint32, bitcast=True) >> shift
        if BITS == 3:
            straddles = live & (start % 32 > 29)
            rest = tl.load(place + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True)
            zeros = zeros | ((rest << 1) << (31 - shift))
        return (zeros & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def zero_mantissa(zeros, BITS: tl.constexpr):
    """1 + zero / 2^BITS as float32: what a weight of value 0 has for `mantissa`."""
    return 1.0 + zeros * (1.0 / (1 << BITS))


@triton.jit
def load_factor(codes, scales, row, column, live, columns, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Values of a factor (rows × columns) at ``row`` × ``column``, float32; 0 where not ``live``.

    BITS is 16 for a floating factor of any width, 8 or 4 for the codes and scales of a `QuantizedFactor`.
    """
    if BITS == 16:
        values = tl.load(codes + row * columns + column, mask=live, other=0).to(tl.float32)
    else:
        if BITS == 8:
            # The bytes are read as int8: two's complement.
            integers = tl.load(codes + row * columns + column, mask=live, other=0).to(tl.float32)
        else:
            pair = tl.load(codes + row * ((columns + 1) // 2) + column // 2, mask=live, other=0).to(tl.int32)
            integers = (((pair >> (4 * (column % 2))) & 15) - 8).to(tl.float32)
        scale = tl.load(scales + row * ((columns + GROUP - 1) // GROUP) + column // GROUP, mask=live, other=0)
        values = integers * scale.to(tl.float32)
    return values
