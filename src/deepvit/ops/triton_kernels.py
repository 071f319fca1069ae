"""The core of the affine form as Triton kernels: no map ever leaves the chip.

A program holds a tile of maps of *all* heads at once, `[16, BM, BN]` (heads padded to the 16 rows a tensor core
wants), so that mixing them is one product `[16, 16] x [16, BM BN]`. Maps are centred by 1/N in float32 before they are
rounded to the inputs' dtype. The head width is padded to D0 + D1, each a power of two: 48 = 32 + 16 serves 33 and 35.
All sums over programs go through one slot per program, so results do not depend on their order.

Pointers: inputs share the strides (sb, sh, sn, 1); everything else is laid out `[B, N, H, d]`, `lse` and `delta`
`[B, H, N]` (base 2). `WIDEN` computes in float32, for the interpreter, whose bf16 products are not to be trusted.
"""

import triton
import triton.language as tl

HEADS = tl.constexpr(16)


@triton.jit
def _load(base, rows, cols, sh, sn, H, N, D, WIDEN: tl.constexpr):
    """`[16, rows, cols]` of one sample's `[H, N, d]`, zero where there is none."""
    heads = tl.arange(0, HEADS)
    at = base + heads[:, None, None] * sh + rows[None, :, None] * sn + cols[None, None, :]
    there = (heads < H)[:, None, None] & (rows < N)[None, :, None] & (cols < D)[None, None, :]
    x = tl.load(at, mask=there, other=0.0)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def _store(base, x, rows, cols, H, N, D):
    heads = tl.arange(0, HEADS)
    at = base + heads[:, None, None] * D + rows[None, :, None] * (H * D) + cols[None, None, :]
    there = (heads < H)[:, None, None] & (rows < N)[None, :, None] & (cols < D)[None, None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=there)


@triton.jit
def _load_per_row(base, rows, H, N):
    """`[16, rows]` of one sample's `[H, N]`."""
    heads = tl.arange(0, HEADS)
    there = (heads < H)[:, None] & (rows < N)[None, :]
    return tl.load(base + heads[:, None] * N + rows[None, :], mask=there, other=0.0)


@triton.jit
def _store_per_row(base, x, rows, H, N):
    heads = tl.arange(0, HEADS)
    tl.store(base + heads[:, None] * N + rows[None, :], x, mask=(heads < H)[:, None] & (rows < N)[None, :])


@triton.jit
def _load_mix(mix, H, TRANSPOSED: tl.constexpr):
    """Theta or its transpose, `[16, 16]`, zero beyond H."""
    a, b = tl.arange(0, HEADS)[:, None], tl.arange(0, HEADS)[None, :]
    at = b * H + a if TRANSPOSED else a * H + b
    return tl.load(mix + at, mask=(a < H) & (b < H), other=0.0)


@triton.jit
def _exchange(mix, maps, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """`out[h] = sum_g mix[h, g] maps[g]`, `[16, BM, BN]`, float32."""
    flat = tl.dot(mix, tl.reshape(maps, [HEADS, BM * BN]), input_precision=PRECISION)
    return tl.reshape(flat, [HEADS, BM, BN])


@triton.jit
def _rows_by_rows(x0, x1, y0, y1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """`x y^T` over the head width, `[16, BM, BN]`, float32."""
    out = tl.dot(x0, tl.permute(y0, [0, 2, 1]), input_precision=PRECISION)
    if D1 > 0:
        out += tl.dot(x1, tl.permute(y1, [0, 2, 1]), input_precision=PRECISION)
    return out


@triton.jit
def _centred(p, rows, cols, N):
    """`A - 1/N` inside the `N x N` map, 0 outside, so that padding adds to no sum."""
    there = (rows < N)[None, :, None] & (cols < N)[None, None, :]
    return tl.where(there, p - 1.0 / N, 0.0)


@triton.jit
def forward(q, k, v, mix, u, lse, sumsq, sb, sh, sn, H, N, D, scale2,
            BM: tl.constexpr, BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WIDEN: tl.constexpr,
            PRECISION: tl.constexpr):
    """U and lse of BM query rows of one sample, and the sum of M^2 over them per head. scale2 = scale log2(e)."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, c0, c1 = tile * BM + tl.arange(0, BM), tl.arange(0, D0), D0 + tl.arange(0, max(D1, 16))
    q, k, v = q + b * sb, k + b * sb, v + b * sb
    q0 = _load(q, rows, c0, sh, sn, H, N, D, WIDEN)
    q1 = _load(q, rows, c1, sh, sn, H, N, D, WIDEN) if D1 > 0 else q0
    peak = tl.full([HEADS, BM], float("-inf"), tl.float32)
    weight = tl.zeros([HEADS, BM], tl.float32)
    for start in range(0, N, BN):
        cols = start + tl.arange(0, BN)
        k0 = _load(k, cols, c0, sh, sn, H, N, D, WIDEN)
        k1 = _load(k, cols, c1, sh, sn, H, N, D, WIDEN) if D1 > 0 else k0
        s = _rows_by_rows(q0, q1, k0, k1, D1, PRECISION) * scale2
        s = tl.where((cols < N)[None, None, :], s, float("-inf"))
        above = tl.maximum(peak, tl.max(s, 2))
        weight = weight * tl.exp2(peak - above) + tl.sum(tl.exp2(s - above[:, :, None]), 2)
        peak = above
    norm = peak + tl.log2(weight)
    _store_per_row(lse + b * H * N, norm, rows, H, N)
    theta = _load_mix(mix, H, False).to(q0.dtype)
    u0 = tl.zeros([HEADS, BM, D0], tl.float32)
    u1 = tl.zeros([HEADS, BM, max(D1, 16)], tl.float32)
    squares = tl.zeros([HEADS, BM], tl.float32)
    for start in range(0, N, BN):
        cols = start + tl.arange(0, BN)
        k0 = _load(k, cols, c0, sh, sn, H, N, D, WIDEN)
        k1 = _load(k, cols, c1, sh, sn, H, N, D, WIDEN) if D1 > 0 else k0
        p = tl.exp2(_rows_by_rows(q0, q1, k0, k1, D1, PRECISION) * scale2 - norm[:, :, None])
        m = _exchange(theta, _centred(p, rows, cols, N).to(q0.dtype), BM, BN, PRECISION)
        squares += tl.sum(m * m, 2)
        m = m.to(q0.dtype)
        u0 += tl.dot(m, _load(v, cols, c0, sh, sn, H, N, D, WIDEN), input_precision=PRECISION)
        if D1 > 0:
            u1 += tl.dot(m, _load(v, cols, c1, sh, sn, H, N, D, WIDEN), input_precision=PRECISION)
    _store(u + b * N * H * D, u0, rows, c0, H, N, D)
    if D1 > 0:
        _store(u + b * N * H * D, u1, rows, c1, H, N, D)
    slot = b * tl.num_programs(0) + tile
    tl.store(sumsq + slot * HEADS + tl.arange(0, HEADS), tl.sum(squares, 1))
