"""The core of the affine form as Triton kernels, forward and backward: no map ever leaves the chip.

A program holds a tile of maps of *all* heads at once, `[16, BM, BN]` (heads padded to the 16 rows a tensor core
wants), so that mixing them is one product `[16, 16] x [16, BM BN]`. Maps are centred by 1/N in float32 before they are
rounded to the inputs' dtype, and held LIFT-fold: near-uniform ones may differ from 1/N by 1e-6, below float16's
normal range. All sums over programs go through one slot per program, so results do not depend on their order.

The gradients take two sweeps that recompute the maps: by query rows, then by keys. With `dM = dU v^T + 2 dsumsq M` and
`dA = mix^T dM`, softmax's backward is `dS = A (dA - delta)`, `delta = sum_j A dA`. The first sweep needs no delta
beforehand: `dq = scale (X - delta Y)`, `X = sum_j (A dA) k`, `Y = sum_j A k`.

Names: `p_` pointers, `o_` offsets, `m_` masks, `b_` tiles; H is `HEADS`, 16. Inputs share the strides (sb, sh, sn, 1)
and have D = D0 + D1 columns, each a power of two (48 = 32 + 16), zeros beyond the head width d; everything else is laid
out `[B, N, H, d]`, `lse` and `delta` `[B, H, N]` (base 2). WIDEN: for the interpreter, whose products in half precision
are not to be trusted: tiles are rounded where the compiled kernel rounds them, and stay in float32."""

import triton
import triton.language as tl

HEADS = tl.constexpr(16)
LOG2_LIFT = tl.constexpr(8.0)
LIFT = tl.constexpr(256.0)


@triton.jit
def _load(p_x, o_rows, o_cols, sh, sn, H, N, WIDEN: tl.constexpr):
    """`[H, rows, cols]` of one image, zero where there is none."""
    o_heads = tl.arange(0, HEADS)
    p_x += o_heads[:, None, None] * sh + o_rows[None, :, None] * sn + o_cols[None, None, :]
    m_x = (o_heads < H)[:, None, None] & (o_rows < N)[None, :, None]
    b_x = tl.load(p_x, mask=m_x, other=0.0)  # [H, rows, cols]
    return b_x.to(tl.float32) if WIDEN else b_x


@triton.jit
def _store(p_x, b_x, o_rows, o_cols, H, N, d, WIDEN: tl.constexpr):
    o_heads = tl.arange(0, HEADS)
    m_x = (o_heads < H)[:, None, None] & (o_rows < N)[None, :, None] & (o_cols < d)[None, None, :]
    b_x = _round(b_x, p_x.dtype.element_ty, WIDEN).to(p_x.dtype.element_ty)
    tl.store(p_x + o_heads[:, None, None] * d + o_rows[None, :, None] * (H * d) + o_cols[None, None, :], b_x, mask=m_x)


@triton.jit
def _load_per_row(p_x, o_rows, H, N):
    """`[H, rows]` of one image's `[H, N]`."""
    o_heads = tl.arange(0, HEADS)
    m_x = (o_heads < H)[:, None] & (o_rows < N)[None, :]
    return tl.load(p_x + o_heads[:, None] * N + o_rows[None, :], mask=m_x, other=0.0)


@triton.jit
def _store_per_row(p_x, b_x, o_rows, H, N):
    o_heads = tl.arange(0, HEADS)
    tl.store(p_x + o_heads[:, None] * N + o_rows[None, :], b_x, mask=(o_heads < H)[:, None] & (o_rows < N)[None, :])


@triton.jit
def _per_head(p_x, H):
    o_heads = tl.arange(0, HEADS)
    return tl.load(p_x + o_heads, mask=o_heads < H, other=0.0)[:, None, None]  # [H, 1, 1]


@triton.jit
def _load_mix(p_mix, H, TRANSPOSED: tl.constexpr):
    """Theta or its transpose, `[H, H]`, zero beyond the heads there are."""
    o_rows, o_cols = tl.arange(0, HEADS)[:, None], tl.arange(0, HEADS)[None, :]
    p_mix += o_cols * H + o_rows if TRANSPOSED else o_rows * H + o_cols
    return tl.load(p_mix, mask=(o_rows < H) & (o_cols < H), other=0.0)  # [H, H]


@triton.jit
def _round(b_x, DTYPE: tl.constexpr, WIDEN: tl.constexpr):
    """To the nearest of DTYPE, and in DTYPE but for WIDEN."""
    if WIDEN and DTYPE == tl.bfloat16:  # which the interpreter would cut off
        bits = b_x.to(tl.int32, bitcast=True)
        b_x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    elif WIDEN:
        b_x = b_x.to(DTYPE).to(tl.float32)
    else:
        b_x = b_x.to(DTYPE)
    return b_x


@triton.jit
def _exchange(b_mix, b_maps, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """`out[h] = sum_g mix[h, g] maps[g]`, in float32."""
    b_out = tl.dot(b_mix, tl.reshape(b_maps, [HEADS, BM * BN]), input_precision=PRECISION)  # [H, BM BN]
    return tl.reshape(b_out, [HEADS, BM, BN])


@triton.jit
def _rows_by_rows(b_x0, b_x1, b_y0, b_y1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """`x y^T` over the head width, `[H, BM, BN]`, in float32."""
    b_out = tl.dot(b_x0, tl.permute(b_y0, [0, 2, 1]), input_precision=PRECISION)  # [H, BM, BN]
    if D1 > 0:
        b_out += tl.dot(b_x1, tl.permute(b_y1, [0, 2, 1]), input_precision=PRECISION)
    return b_out


@triton.jit
def _centred(b_p, o_rows, o_cols, N):
    """LIFT (A - 1/N) from LIFT A inside the `N x N` map; 0 outside, so that padding adds to no sum."""
    m_map = (o_rows < N)[None, :, None] & (o_cols < N)[None, None, :]
    return tl.where(m_map, b_p - LIFT / N, 0.0)  # [H, BM, BN]


@triton.jit
def forward(p_q, p_k, p_v, p_mix, p_u, p_lse, p_sumsq, sb, sh, sn, H, N, d, scale2,
            BM: tl.constexpr, BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WIDEN: tl.constexpr,
            PRECISION: tl.constexpr):
    """U and lse of BM query rows of one image, and the sum of M^2 over them per head. scale2 = scale log2(e)."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    i_tile, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_rows, o_c0, o_c1 = i_tile * BM + tl.arange(0, BM), tl.arange(0, D0), D0 + tl.arange(0, max(D1, 16))
    p_q, p_k, p_v, p_u = p_q + i_b * sb, p_k + i_b * sb, p_v + i_b * sb, p_u + i_b * N * H * d
    b_q0 = _load(p_q, o_rows, o_c0, sh, sn, H, N, WIDEN)  # [H, BM, D0]
    b_q1 = _load(p_q, o_rows, o_c1, sh, sn, H, N, WIDEN) if D1 > 0 else b_q0  # [H, BM, D1]
    b_peak = tl.full([HEADS, BM], float("-inf"), tl.float32)
    b_weight = tl.zeros([HEADS, BM], tl.float32)
    for start in range(0, N, BN):
        o_cols = start + tl.arange(0, BN)
        b_k0 = _load(p_k, o_cols, o_c0, sh, sn, H, N, WIDEN)  # [H, BN, D0]
        b_k1 = _load(p_k, o_cols, o_c1, sh, sn, H, N, WIDEN) if D1 > 0 else b_k0  # [H, BN, D1]
        b_s = _rows_by_rows(b_q0, b_q1, b_k0, b_k1, D1, PRECISION) * scale2  # [H, BM, BN]
        b_s = tl.where((o_cols < N)[None, None, :], b_s, float("-inf"))
        b_above = tl.maximum(b_peak, tl.max(b_s, 2))  # [H, BM]
        b_weight = b_weight * tl.exp2(b_peak - b_above) + tl.sum(tl.exp2(b_s - b_above[:, :, None]), 2)
        b_peak = b_above
    b_lse = b_peak + tl.log2(b_weight)  # [H, BM]
    _store_per_row(p_lse + i_b * H * N, b_lse, o_rows, H, N)
    b_norm = (b_lse - LOG2_LIFT)[:, :, None]
    b_mix = _round(_load_mix(p_mix, H, False) / LIFT, DTYPE, WIDEN)  # [H, H]
    b_u0 = tl.zeros([HEADS, BM, D0], tl.float32)
    b_u1 = tl.zeros([HEADS, BM, max(D1, 16)], tl.float32)
    b_squares = tl.zeros([HEADS, BM], tl.float32)
    for start in range(0, N, BN):
        o_cols = start + tl.arange(0, BN)
        b_k0 = _load(p_k, o_cols, o_c0, sh, sn, H, N, WIDEN)  # [H, BN, D0]
        b_k1 = _load(p_k, o_cols, o_c1, sh, sn, H, N, WIDEN) if D1 > 0 else b_k0  # [H, BN, D1]
        b_p = tl.exp2(_rows_by_rows(b_q0, b_q1, b_k0, b_k1, D1, PRECISION) * scale2 - b_norm)  # [H, BM, BN], LIFT A
        b_c = _round(_centred(b_p, o_rows, o_cols, N), DTYPE, WIDEN)
        b_m = _exchange(b_mix, b_c, BM, BN, PRECISION)  # [H, BM, BN]
        b_squares += tl.sum(b_m * b_m, 2)
        b_m = _round(b_m, DTYPE, WIDEN)
        b_u0 += tl.dot(b_m, _load(p_v, o_cols, o_c0, sh, sn, H, N, WIDEN), input_precision=PRECISION)  # [H, BM, D0]
        if D1 > 0:
            b_u1 += tl.dot(b_m, _load(p_v, o_cols, o_c1, sh, sn, H, N, WIDEN), input_precision=PRECISION)
    _store(p_u, b_u0, o_rows, o_c0, H, N, d, WIDEN)
    if D1 > 0:
        _store(p_u, b_u1, o_rows, o_c1, H, N, d, WIDEN)
    i_slot = i_b * tl.num_programs(0) + i_tile
    tl.store(p_sumsq + i_slot * HEADS + tl.arange(0, HEADS), tl.sum(b_squares, 1))


@triton.jit
def bwd_dq(p_q, p_k, p_v, p_du, p_mix, p_lse, p_twice, p_dq, p_delta, p_dmix, sb, sh, sn, H, N, d, scale, scale2,
           BM: tl.constexpr, BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WIDEN: tl.constexpr,
           PRECISION: tl.constexpr):
    """dq and delta of BM query rows of one image, and their part of dmix, a slot `[16, 16]` per program. du:
    `[B, N, H, D]`; twice: 2 dsumsq, `[B, H]`."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    D: tl.constexpr = D0 + D1
    i_tile, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_rows, o_c0, o_c1 = i_tile * BM + tl.arange(0, BM), tl.arange(0, D0), D0 + tl.arange(0, max(D1, 16))
    p_q, p_k, p_v, p_du = p_q + i_b * sb, p_k + i_b * sb, p_v + i_b * sb, p_du + i_b * N * H * D
    p_dq += i_b * N * H * d
    b_q0, b_g0 = _load(p_q, o_rows, o_c0, sh, sn, H, N, WIDEN), _load(p_du, o_rows, o_c0, D, H * D, H, N, WIDEN)
    b_q1 = _load(p_q, o_rows, o_c1, sh, sn, H, N, WIDEN) if D1 > 0 else b_q0  # [H, BM, D1]
    b_g1 = _load(p_du, o_rows, o_c1, D, H * D, H, N, WIDEN) if D1 > 0 else b_g0  # [H, BM, D1]
    b_norm = (_load_per_row(p_lse + i_b * H * N, o_rows, H, N) - LOG2_LIFT)[:, :, None]  # [H, BM, 1]
    b_mix = _round(_load_mix(p_mix, H, False) / LIFT, DTYPE, WIDEN)  # [H, H]
    b_back = _round(_load_mix(p_mix, H, True), DTYPE, WIDEN)  # [H, H]
    b_twice = _per_head(p_twice + i_b * H, H)
    b_x0, b_y0 = tl.zeros([HEADS, BM, D0], tl.float32), tl.zeros([HEADS, BM, D0], tl.float32)
    b_x1, b_y1 = tl.zeros([HEADS, BM, max(D1, 16)], tl.float32), tl.zeros([HEADS, BM, max(D1, 16)], tl.float32)
    b_delta = tl.zeros([HEADS, BM], tl.float32)
    b_dmix = tl.zeros([HEADS, HEADS], tl.float32)
    for start in range(0, N, BN):
        o_cols = start + tl.arange(0, BN)
        b_k0, b_v0 = _load(p_k, o_cols, o_c0, sh, sn, H, N, WIDEN), _load(p_v, o_cols, o_c0, sh, sn, H, N, WIDEN)
        b_k1 = _load(p_k, o_cols, o_c1, sh, sn, H, N, WIDEN) if D1 > 0 else b_k0  # [H, BN, D1]
        b_v1 = _load(p_v, o_cols, o_c1, sh, sn, H, N, WIDEN) if D1 > 0 else b_v0  # [H, BN, D1]
        b_p = tl.exp2(_rows_by_rows(b_q0, b_q1, b_k0, b_k1, D1, PRECISION) * scale2 - b_norm)  # [H, BM, BN], LIFT A
        b_p = tl.where((o_cols < N)[None, None, :], b_p, 0.0)
        b_c = _round(_centred(b_p, o_rows, o_cols, N), DTYPE, WIDEN)
        b_m = _exchange(b_mix, b_c, BM, BN, PRECISION)  # [H, BM, BN]
        b_dm = _rows_by_rows(b_g0, b_g1, b_v0, b_v1, D1, PRECISION) + b_twice * b_m
        b_dm = _round(b_dm, DTYPE, WIDEN)
        b_dmix += tl.dot(tl.reshape(b_dm, [HEADS, BM * BN]), tl.trans(tl.reshape(b_c, [HEADS, BM * BN])),
                         input_precision=PRECISION)
        b_p *= 1 / LIFT
        b_pda = b_p * _exchange(b_back, b_dm, BM, BN, PRECISION)  # [H, BM, BN]
        b_delta += tl.sum(b_pda, 2)
        b_pda, b_p = _round(b_pda, DTYPE, WIDEN), _round(b_p, DTYPE, WIDEN)
        b_x0 += tl.dot(b_pda, b_k0, input_precision=PRECISION)
        b_y0 += tl.dot(b_p, b_k0, input_precision=PRECISION)
        if D1 > 0:
            b_x1 += tl.dot(b_pda, b_k1, input_precision=PRECISION)
            b_y1 += tl.dot(b_p, b_k1, input_precision=PRECISION)
    _store_per_row(p_delta + i_b * H * N, b_delta, o_rows, H, N)
    _store(p_dq, (b_x0 - b_delta[:, :, None] * b_y0) * scale, o_rows, o_c0, H, N, d, WIDEN)
    if D1 > 0:
        _store(p_dq, (b_x1 - b_delta[:, :, None] * b_y1) * scale, o_rows, o_c1, H, N, d, WIDEN)
    p_dmix += (i_b * tl.num_programs(0) + i_tile) * HEADS * HEADS
    tl.store(p_dmix + tl.arange(0, HEADS)[:, None] * HEADS + tl.arange(0, HEADS)[None, :], b_dmix / LIFT)


@triton.jit
def bwd_dkv(p_q, p_k, p_v, p_du, p_mix, p_lse, p_twice, p_delta, p_dtotal, p_dk, p_dv, sb, sh, sn, H, N, d, scale,
            scale2, BM: tl.constexpr, BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WIDEN: tl.constexpr,
            PRECISION: tl.constexpr):
    """dk and dv of BN keys of one image. dtotal: `[B, H, D]`, added to every dv."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    D: tl.constexpr = D0 + D1
    i_tile, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_cols, o_c0, o_c1 = i_tile * BN + tl.arange(0, BN), tl.arange(0, D0), D0 + tl.arange(0, max(D1, 16))
    p_q, p_k, p_v, p_du = p_q + i_b * sb, p_k + i_b * sb, p_v + i_b * sb, p_du + i_b * N * H * D
    p_dtotal += i_b * H * D
    b_k0, b_v0 = _load(p_k, o_cols, o_c0, sh, sn, H, N, WIDEN), _load(p_v, o_cols, o_c0, sh, sn, H, N, WIDEN)
    b_k1 = _load(p_k, o_cols, o_c1, sh, sn, H, N, WIDEN) if D1 > 0 else b_k0  # [H, BN, D1]
    b_v1 = _load(p_v, o_cols, o_c1, sh, sn, H, N, WIDEN) if D1 > 0 else b_v0  # [H, BN, D1]
    b_mix = _round(_load_mix(p_mix, H, False) / LIFT, DTYPE, WIDEN)  # [H, H]
    b_back = _round(_load_mix(p_mix, H, True), DTYPE, WIDEN)  # [H, H]
    b_twice = _per_head(p_twice + i_b * H, H)
    o_same = tl.zeros([BN], tl.int32)  # every key row reads the one row of dtotal
    b_dk0 = tl.zeros([HEADS, BN, D0], tl.float32)
    b_dk1 = tl.zeros([HEADS, BN, max(D1, 16)], tl.float32)
    b_dv0 = _load(p_dtotal, o_same, o_c0, D, 0, H, 1, True)  # [H, BN, D0]
    b_dv1 = _load(p_dtotal, o_same, o_c1, D, 0, H, 1, True) if D1 > 0 else b_dk1  # [H, BN, D1]
    for start in range(0, N, BM):
        o_rows = start + tl.arange(0, BM)
        b_q0, b_g0 = _load(p_q, o_rows, o_c0, sh, sn, H, N, WIDEN), _load(p_du, o_rows, o_c0, D, H * D, H, N, WIDEN)
        b_q1 = _load(p_q, o_rows, o_c1, sh, sn, H, N, WIDEN) if D1 > 0 else b_q0  # [H, BM, D1]
        b_g1 = _load(p_du, o_rows, o_c1, D, H * D, H, N, WIDEN) if D1 > 0 else b_g0  # [H, BM, D1]
        b_norm = (_load_per_row(p_lse + i_b * H * N, o_rows, H, N) - LOG2_LIFT)[:, :, None]  # [H, BM, 1]
        b_p = tl.exp2(_rows_by_rows(b_q0, b_q1, b_k0, b_k1, D1, PRECISION) * scale2 - b_norm)  # [H, BM, BN], LIFT A
        b_c = _round(_centred(b_p, o_rows, o_cols, N), DTYPE, WIDEN)
        b_m = _exchange(b_mix, b_c, BM, BN, PRECISION)  # [H, BM, BN]
        b_dm = _rows_by_rows(b_g0, b_g1, b_v0, b_v1, D1, PRECISION) + b_twice * b_m
        b_mt = tl.permute(_round(b_m, DTYPE, WIDEN), [0, 2, 1])  # [H, BN, BM]
        b_dv0 += tl.dot(b_mt, b_g0, input_precision=PRECISION)
        b_ds = _exchange(b_back, _round(b_dm, DTYPE, WIDEN), BM, BN, PRECISION)  # [H, BM, BN], dA so far
        b_ds = b_p * (1 / LIFT) * (b_ds - _load_per_row(p_delta + i_b * H * N, o_rows, H, N)[:, :, None])
        b_ds = _round(tl.where((o_rows < N)[None, :, None], b_ds, 0.0), DTYPE, WIDEN)
        b_dst = tl.permute(b_ds, [0, 2, 1])  # [H, BN, BM]
        b_dk0 += tl.dot(b_dst, b_q0, input_precision=PRECISION)
        if D1 > 0:
            b_dv1 += tl.dot(b_mt, b_g1, input_precision=PRECISION)
            b_dk1 += tl.dot(b_dst, b_q1, input_precision=PRECISION)
    p_dk, p_dv = p_dk + i_b * N * H * d, p_dv + i_b * N * H * d
    _store(p_dk, b_dk0 * scale, o_cols, o_c0, H, N, d, WIDEN)
    _store(p_dv, b_dv0, o_cols, o_c0, H, N, d, WIDEN)
    if D1 > 0:
        _store(p_dk, b_dk1 * scale, o_cols, o_c1, H, N, d, WIDEN)
        _store(p_dv, b_dv1, o_cols, o_c1, H, N, d, WIDEN)
