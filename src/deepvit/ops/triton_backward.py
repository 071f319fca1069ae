"""Gradients of `triton_kernels.forward`, in two sweeps that recompute the maps: by query rows, then by keys.

With `dM = dU v^T + 2 dsumsq M` and `dA = mix^T dM`, softmax's backward is `dS = A (dA - delta)`, `delta = sum_j A dA`.
The first sweep needs no delta beforehand: `dq = scale (X1 - delta X2)`, `X1 = sum_j (A dA) k`, `X2 = sum_j A k`.
"""

import triton
import triton.language as tl

from deepvit.ops.triton_kernels import (
    HEADS,
    _centred,
    _exchange,
    _load,
    _load_mix,
    _load_per_row,
    _rows_by_rows,
    _store,
    _store_per_row,
)


@triton.jit
def _head_vector(base, H):
    heads = tl.arange(0, HEADS)
    return tl.load(base + heads, mask=heads < H, other=0.0)[:, None, None]


@triton.jit
def by_queries(q, k, v, du, mix, lse, twice, dq, delta, dmix, sb, sh, sn, H, N, D, scale, scale2,
               BM: tl.constexpr, BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WIDEN: tl.constexpr,
               PRECISION: tl.constexpr):
    """dq and delta of BM query rows of one sample, and their part of dmix. twice = 2 dsumsq `[B, H]`."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, c0, c1 = tile * BM + tl.arange(0, BM), tl.arange(0, D0), D0 + tl.arange(0, max(D1, 16))
    q, k, v, du, dq = q + b * sb, k + b * sb, v + b * sb, du + b * N * H * D, dq + b * N * H * D
    q0, g0 = _load(q, rows, c0, sh, sn, H, N, D, WIDEN), _load(du, rows, c0, D, H * D, H, N, D, WIDEN)
    q1 = _load(q, rows, c1, sh, sn, H, N, D, WIDEN) if D1 > 0 else q0
    g1 = _load(du, rows, c1, D, H * D, H, N, D, WIDEN) if D1 > 0 else g0
    norm = _load_per_row(lse + b * H * N, rows, H, N)[:, :, None]
    theta, back = _load_mix(mix, H, False).to(q0.dtype), _load_mix(mix, H, True).to(q0.dtype)
    twice = _head_vector(twice + b * H, H)
    x0, y0 = tl.zeros([HEADS, BM, D0], tl.float32), tl.zeros([HEADS, BM, D0], tl.float32)
    x1, y1 = tl.zeros([HEADS, BM, max(D1, 16)], tl.float32), tl.zeros([HEADS, BM, max(D1, 16)], tl.float32)
    mean = tl.zeros([HEADS, BM], tl.float32)
    outer = tl.zeros([HEADS, HEADS], tl.float32)
    for start in range(0, N, BN):
        cols = start + tl.arange(0, BN)
        k0, v0 = _load(k, cols, c0, sh, sn, H, N, D, WIDEN), _load(v, cols, c0, sh, sn, H, N, D, WIDEN)
        k1 = _load(k, cols, c1, sh, sn, H, N, D, WIDEN) if D1 > 0 else k0
        v1 = _load(v, cols, c1, sh, sn, H, N, D, WIDEN) if D1 > 0 else v0
        p = tl.exp2(_rows_by_rows(q0, q1, k0, k1, D1, PRECISION) * scale2 - norm)
        p = tl.where((cols < N)[None, None, :], p, 0.0)
        c = _centred(p, rows, cols, N).to(q0.dtype)
        dm = _rows_by_rows(g0, g1, v0, v1, D1, PRECISION) + twice * _exchange(theta, c, BM, BN, PRECISION)
        dm = dm.to(q0.dtype)
        outer += tl.dot(tl.reshape(dm, [HEADS, BM * BN]), tl.trans(tl.reshape(c, [HEADS, BM * BN])),
                        input_precision=PRECISION)
        pa = p * _exchange(back, dm, BM, BN, PRECISION)
        mean += tl.sum(pa, 2)
        pa, p = pa.to(q0.dtype), p.to(q0.dtype)
        x0 += tl.dot(pa, k0, input_precision=PRECISION)
        y0 += tl.dot(p, k0, input_precision=PRECISION)
        if D1 > 0:
            x1 += tl.dot(pa, k1, input_precision=PRECISION)
            y1 += tl.dot(p, k1, input_precision=PRECISION)
    _store_per_row(delta + b * H * N, mean, rows, H, N)
    _store(dq, (x0 - mean[:, :, None] * y0) * scale, rows, c0, H, N, D)
    if D1 > 0:
        _store(dq, (x1 - mean[:, :, None] * y1) * scale, rows, c1, H, N, D)
    slot = (b * tl.num_programs(0) + tile) * HEADS * HEADS
    at = tl.arange(0, HEADS)[:, None] * HEADS + tl.arange(0, HEADS)[None, :]
    tl.store(dmix + slot + at, outer)


@triton.jit
def by_keys(q, k, v, du, mix, lse, twice, delta, dtotal, dk, dv, sb, sh, sn, H, N, D, scale, scale2,
            BM: tl.constexpr, BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WIDEN: tl.constexpr,
            PRECISION: tl.constexpr):
    """dk and dv of BN keys of one sample. dtotal: `[B, H, d]`, added to every dv."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols, c0, c1 = tile * BN + tl.arange(0, BN), tl.arange(0, D0), D0 + tl.arange(0, max(D1, 16))
    q, k, v, du = q + b * sb, k + b * sb, v + b * sb, du + b * N * H * D
    k0, v0 = _load(k, cols, c0, sh, sn, H, N, D, WIDEN), _load(v, cols, c0, sh, sn, H, N, D, WIDEN)
    k1 = _load(k, cols, c1, sh, sn, H, N, D, WIDEN) if D1 > 0 else k0
    v1 = _load(v, cols, c1, sh, sn, H, N, D, WIDEN) if D1 > 0 else v0
    theta, back = _load_mix(mix, H, False).to(k0.dtype), _load_mix(mix, H, True).to(k0.dtype)
    twice = _head_vector(twice + b * H, H)
    same = tl.zeros([BN], tl.int32)  # every key row reads the one row of dtotal
    dk0 = tl.zeros([HEADS, BN, D0], tl.float32)
    dk1 = tl.zeros([HEADS, BN, max(D1, 16)], tl.float32)
    dv0 = _load(dtotal + b * H * D, same, c0, D, 0, H, 1, D, True)
    dv1 = _load(dtotal + b * H * D, same, c1, D, 0, H, 1, D, True) if D1 > 0 else dk1
    for start in range(0, N, BM):
        rows = start + tl.arange(0, BM)
        q0, g0 = _load(q, rows, c0, sh, sn, H, N, D, WIDEN), _load(du, rows, c0, D, H * D, H, N, D, WIDEN)
        q1 = _load(q, rows, c1, sh, sn, H, N, D, WIDEN) if D1 > 0 else q0
        g1 = _load(du, rows, c1, D, H * D, H, N, D, WIDEN) if D1 > 0 else g0
        norm = _load_per_row(lse + b * H * N, rows, H, N)[:, :, None]
        p = tl.exp2(_rows_by_rows(q0, q1, k0, k1, D1, PRECISION) * scale2 - norm)
        m = _exchange(theta, _centred(p, rows, cols, N).to(k0.dtype), BM, BN, PRECISION)
        dm = _rows_by_rows(g0, g1, v0, v1, D1, PRECISION) + twice * m
        mt = tl.permute(m.to(k0.dtype), [0, 2, 1])
        dv0 += tl.dot(mt, g0, input_precision=PRECISION)
        ds = p * (_exchange(back, dm.to(k0.dtype), BM, BN, PRECISION)
                  - _load_per_row(delta + b * H * N, rows, H, N)[:, :, None])
        dst = tl.permute(tl.where((rows < N)[None, :, None], ds, 0.0).to(k0.dtype), [0, 2, 1])
        dk0 += tl.dot(dst, q0, input_precision=PRECISION)
        if D1 > 0:
            dv1 += tl.dot(mt, g1, input_precision=PRECISION)
            dk1 += tl.dot(dst, q1, input_precision=PRECISION)
    dk, dv = dk + b * N * H * D, dv + b * N * H * D
    _store(dk, dk0 * scale, cols, c0, H, N, D)
    _store(dv, dv0, cols, c0, H, N, D)
    if D1 > 0:
        _store(dk, dk1 * scale, cols, c1, H, N, D)
        _store(dv, dv1, cols, c1, H, N, D)
