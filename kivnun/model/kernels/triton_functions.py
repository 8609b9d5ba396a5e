"""The kernels in Triton: one program for a row, or for a piece of one. Imported only where Triton is.

Everything is computed in float32 and rounded once when it is stored, as in `reference.py`. Rows are at `row * stride`, in 64 bits:
logits of a chunk, or a large matrix, have more elements than 32 bits can count.
Shapes: T tokens, D or O width, F inner width, V vocabulary, R half the rotated width. Next: `triton.py` (who calls these).
"""

# Triton is no requirement, and pyright takes the neighbour `triton.py` for it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # below every score, and finite: the difference of two of them is no NaN


@triton.jit
def _store_normed(v, w, y, scale, row, width, eps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    here = at < width
    inverse = 1.0 / tl.sqrt(tl.sum(v * v, 0) / width + eps)
    tl.store(scale + row, inverse)
    tl.store(y + row * width + at, (v * inverse * tl.load(w + at, here, 0.0).to(tl.float32)).to(y.dtype.element_ty), here)


@triton.jit
def rms_norm(x, w, y, scale, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    v = tl.load(x + row * width + at, at < width, 0.0).to(tl.float32)
    _store_normed(v, w, y, scale, row, width, eps, BLOCK)


@triton.jit
def add_rms_norm(
    h, rest, delta, w, total, over, y, scale, width, eps, REST: tl.constexpr, OVER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    here = at < width
    exact = tl.load(h + row * width + at, here, 0.0).to(tl.float32)
    if REST:
        exact += tl.load(rest + row * width + at, here, 0.0).to(tl.float32)
    exact += tl.load(delta + row * width + at, here, 0.0).to(tl.float32)
    rounded = exact.to(total.dtype.element_ty)
    tl.store(total + row * width + at, rounded, here)
    if OVER:
        tl.store(over + row * width + at, (exact - rounded.to(tl.float32)).to(total.dtype.element_ty), here)
    _store_normed(rounded.to(tl.float32), w, y, scale, row, width, eps, BLOCK)


@triton.jit
def rms_norm_backward(dy, x, w, scale, dx, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    here = at < width
    inverse = tl.load(scale + row)
    n = tl.load(x + row * width + at, here, 0.0).to(tl.float32) * inverse
    g = tl.load(dy + row * width + at, here, 0.0).to(tl.float32) * tl.load(w + at, here, 0.0).to(tl.float32)
    mean = tl.sum(g * n, 0) / width
    tl.store(dx + row * width + at, ((g - n * mean) * inverse).to(dx.dtype.element_ty), here)


@triton.jit
def gate(gu, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    g = tl.load(gu + row * 2 * width + at, here, 0.0).to(tl.float32)
    u = tl.load(gu + row * 2 * width + width + at, here, 0.0).to(tl.float32)
    tl.store(out + row * width + at, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), here)


@triton.jit
def gate_backward(dh, gu, dgu, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    g = tl.load(gu + row * 2 * width + at, here, 0.0).to(tl.float32)
    u = tl.load(gu + row * 2 * width + width + at, here, 0.0).to(tl.float32)
    d = tl.load(dh + row * width + at, here, 0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(dgu + row * 2 * width + at, (d * u * s * (1.0 + g * (1.0 - s))).to(dgu.dtype.element_ty), here)
    tl.store(dgu + row * 2 * width + width + at, (d * g * s).to(dgu.dtype.element_ty), here)


@triton.jit
def _score_sums(scores, true, width, BLOCK: tl.constexpr):
    """Return a row's highest score and the sum of exp(score - highest) over all columns but the true one, in one reading."""
    lane = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + lane
        v = tl.load(scores + at, at < width, float("-inf")).to(tl.float32)
        # Not tl.maximum: its answer for NaN is the other operand; here a NaN reaches the sum either way.
        new = tl.where(v > highest, v, highest)
        others = others * tl.exp(highest - new) + tl.where(at == true, 0.0, tl.exp(v - new))
        highest = new
    top = tl.max(highest, 0)
    return top, tl.sum(others * tl.exp(highest - top), 0)


@triton.jit
def nll(logits, targets, weights, out, count, width, BLOCK: tl.constexpr):
    """Two readings of a row and one writing: the sums, then the gradient in place of the logits. Rows from `count` on: zeros."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    scores = logits + row * width
    if row < count:
        true = tl.load(targets + row)
        highest, others = _score_sums(scores, true, width, BLOCK)
        own_score = tl.load(scores + true).to(tl.float32)
        ahead = highest - own_score
        own = tl.exp(-ahead)
        # log(1 + x) for small x, where 1 + x keeps few of its digits (Goldberg 1991, theorem 4); the log elsewhere.
        wide = 1.0 + others
        log1p = tl.where(wide == 1.0, others, tl.log(wide) * (others / tl.where(wide == 1.0, 1.0, wide - 1.0)))
        tl.store(out + row, tl.where(ahead == 0.0, log1p, tl.log(own + others) + ahead))
        factor = tl.load(weights + row) / (own + others)
        for start in range(0, width, BLOCK):
            at = start + lane
            e = tl.exp(tl.load(scores + at, at < width, float("-inf")).to(tl.float32) - highest)
            gradient = tl.where(at == true, -others * factor, e * factor)
            tl.store(scores + at, gradient.to(logits.dtype.element_ty), at < width)
    else:
        for start in range(0, width, BLOCK):
            at = start + lane
            tl.store(scores + at, tl.zeros((BLOCK,), logits.dtype.element_ty), at < width)


@triton.jit
def log_prob(logits, targets, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    true = tl.load(targets + row)
    highest, others = _score_sums(logits + row * width, true, width, BLOCK)
    behind = tl.load(logits + row * width + true).to(tl.float32) - highest
    tl.store(out + row, behind - tl.log(tl.exp(behind) + others))


@triton.jit
def _mixed(z, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """`dropout._mix`: shifts of signed integers drag the sign along, the masks make them logical."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * FIRST
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * SECOND
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@triton.jit
def dropped(
    x, keys, out, site, limit, factor, width,
    ONTO: tl.constexpr, GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    key = _mixed(tl.load(keys + row) ^ tl.load(site), FIRST, SECOND)
    group = (at // 4).to(tl.int64)
    draw = (_mixed(key + group * GOLDEN, FIRST, SECOND) >> ((at % 4) * 16).to(tl.int64)) & 65535
    v = tl.load(x + row * width + at, here, 0.0).to(tl.float32)
    kept = tl.where(draw >= limit, v * factor, v * 0.0)
    if ONTO:
        kept += tl.load(out + row * width + at, here, 0.0).to(tl.float32)
    tl.store(out + row * width + at, kept.to(out.dtype.element_ty), here)


@triton.jit
def scale_columns(x, factor, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    v = tl.load(x + row * width + at, here, 0.0).to(tl.float32) * tl.load(factor + at, here, 0.0)
    tl.store(out + row * width + at, v.to(out.dtype.element_ty), here)


@triton.jit
def column_dots(x, y, out, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum over ROWS rows; the caller adds these up."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    first = tl.program_id(1).to(tl.int64) * ROWS
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(0, ROWS):
        start = (first + row) * width
        inside = at < tl.where(first + row < count, width, 0)
        a = tl.load(x + start + at, inside, 0.0).to(tl.float32)
        total += a * tl.load(y + start + at, inside, 0.0).to(tl.float32)
    tl.store(out + tl.program_id(1).to(tl.int64) * width + at, total, here)


@triton.jit
def turned(x, cos, sin, out, token_stride, heads, half, direction, width, H: tl.constexpr, K: tl.constexpr):
    """Rotate heads of one token, H at a time: [T, heads, width] with tokens `token_stride` apart into a whole tensor."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * H + tl.arange(0, H)
    k = tl.arange(0, K)
    here = (head < heads)[:, None] & (k < width)[None, :]
    low, rotated = k < half, k < 2 * half
    turn = tl.where(low, k, k - half)
    c = tl.load(cos + token * half + turn, rotated, 1.0)
    s = tl.load(sin + token * half + turn, rotated, 0.0) * direction
    partner = tl.where(low, k + half, tl.where(rotated, k - half, k))
    row = x + token * token_stride + head[:, None] * width
    v = tl.load(row + k[None, :], here, 0.0).to(tl.float32)
    other = tl.load(row + partner[None, :], here, 0.0).to(tl.float32)
    result = v * c[None, :] + other * tl.where(low, -s, s)[None, :]
    tl.store(out + (token * heads + head[:, None]) * width + k[None, :], result.to(out.dtype.element_ty), here)


@triton.jit
def nf4_decode(
    codes, scales, nf4, scale_map, group_scales, offset, out, size,
    block: tl.constexpr, group: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    byte = tl.load(codes + at // 2, here, 0).to(tl.int32)
    value = tl.load(nf4 + ((byte >> (4 - (at % 2).to(tl.int32) * 4)) & 15))
    which = at // block
    if NESTED:
        coarse = tl.load(group_scales + which // group, here, 0.0)
        scale = tl.load(scale_map + tl.load(scales + which, here, 0).to(tl.int32)) * coarse + tl.load(offset)
    else:
        scale = tl.load(scales + which, here, 0.0)
    tl.store(out + at, (value * scale).to(out.dtype.element_ty), here)


@triton.jit
def int8_decode(codes, absmax, out, width, by_127, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    v = tl.load(codes + row * width + at, here, 0).to(tl.float32) * tl.load(absmax + row) * by_127
    tl.store(out + row * width + at, v.to(out.dtype.element_ty), here)
