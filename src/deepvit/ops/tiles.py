"""The core of the affine form in PyTorch, on any device: tiles of maps, recomputed in backward, never kept.

A tile is some samples with all their query rows, or some query rows of one sample, heads first: `[H, S, R, N]`, so
that mixing the heads is one matrix product `[H, H] x [H, S R N]`. The last row of the tile's maps buffer holds the
constant 1/N, and the mix has `-sum_g mix[h, g]` as its last column, so the product comes out centred."""

import threading
from collections.abc import Iterator
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

# Of one maps buffer; two are alive in forward, three in backward
CPU_TILE = 2_900_000  # bytes: 2 MiB of L2 and a shared L3
DEVICE_TILE = 85_000_000  # bytes: matrix products large enough for a GPU, a quarter of a gigabyte at once

_workspace = threading.local()


def tokens_first(x: Tensor) -> Tensor:
    """An empty `[B, H, N, d]` laid out `[B, N, H, d]`, so that the reshape to `[B, N, D]` after attention is a view."""
    B, H, N, d = x.shape
    return x.new_empty_strided((B, H, N, d), (N * H * d, d, H * d, 1))


class Tile(NamedTuple):
    samples: slice
    rows: slice
    shape: tuple[int, int, int]  # S, R, N


def cover(batch: int, heads: int, tokens: int, itemsize: int, device: str) -> Iterator[Tile]:
    """Cover `batch` samples of `tokens` query rows by tiles that fit the device, all rows of a sample in order."""
    rows = max(1, (CPU_TILE if device == "cpu" else DEVICE_TILE) // (heads * tokens * itemsize))
    samples = max(1, min(batch, rows // tokens))
    rows = ceil(tokens / ceil(tokens / min(rows, tokens)))  # of equal height
    for b in range(0, batch, samples):
        for i in range(0, tokens, rows):
            stop_b, stop_i = min(b + samples, batch), min(i + rows, tokens)
            yield Tile(slice(b, stop_b), slice(i, stop_i), (stop_b - b, stop_i - i, tokens))


def _buffers(like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Uninitialised tensors; on a CPU from one block that this thread keeps, as fresh ones cost page faults."""
    if like.device.type != "cpu":
        return [like.new_empty(shape) for shape in shapes]
    dtype = like.dtype
    sizes = [ceil(prod(shape) / 16) * 16 for shape in shapes]
    block = getattr(_workspace, str(dtype), None)
    if block is None or block.numel() < sum(sizes):
        block = torch.empty(sum(sizes), dtype=dtype)
        setattr(_workspace, str(dtype), block)
    return [part[:prod(shape)].view(shape) for part, shape in zip(block[:sum(sizes)].split(sizes), shapes)]


def _heads_first(x: Tensor, tile: Tile, dtype: torch.dtype, rows: bool, factor: float = 1.0) -> Tensor:
    """The tile's part of `[B, H, N, d]` as a contiguous `[H, S, R or N, d]`."""
    part = x[tile.samples, :, tile.rows] if rows else x[tile.samples]
    part = part.transpose(0, 1)
    out = torch.empty(part.shape, dtype=dtype, device=x.device)
    return torch.mul(part, factor, out=out) if factor != 1.0 else out.copy_(part)


class _Maps:
    """The maps of one tile: `softmax [H + 1, S, R, N]` (the last is the constant) and scratch of `[H, S, R, N]`."""

    def __init__(self, mix: Tensor, tile: Tile, scratch: int):
        H, (S, R, N) = len(mix), tile.shape
        self.softmax, *self.scratch = _buffers(mix, (H + 1, S, R, N), *[(H, S, R, N)] * scratch)
        self.softmax[-1].fill_(1 / N)
        self.centring = torch.cat([mix, -mix.sum(dim=1, keepdim=True)], dim=1)  # [H, H + 1]

    def fill(self, q: Tensor, k: Tensor) -> Tensor:
        """Computes the softmax maps, and returns the mixed centred ones `[H, S, R, N]` in the first scratch."""
        logits = self.scratch[0]
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT, out=logits.flatten(0, 1))
        torch.softmax(logits, dim=-1, out=self.softmax[:-1])
        torch.mm(self.centring, self.softmax.flatten(1), out=logits.flatten(1))
        return logits


def centred_mix(q: Tensor, k: Tensor, v: Tensor, mix: Tensor, scale: float, statistics: bool) -> tuple[Tensor, ...]:
    """`reference.centred_mix` tile by tile, without autograd."""
    B, H, N, d = q.shape
    dtype = mix.dtype
    u = tokens_first(q)  # [B, H, N, d]
    sumsq = mix.new_zeros(B, H)
    for tile in cover(B, H, N, dtype.itemsize, q.device.type):
        if tile.rows.start == 0:
            keys, values = (_heads_first(x, tile, dtype, rows=False) for x in (k, v))  # [H, S, N, d]
        mixed = _Maps(mix, tile, scratch=1).fill(_heads_first(q, tile, dtype, True, scale), keys)
        if statistics:
            sumsq[tile.samples] += torch.linalg.vector_norm(mixed.flatten(2), dim=2).T.square()
        part = torch.bmm(mixed.flatten(0, 1), values.flatten(0, 1)).view(H, *tile.shape[:2], d)
        u[tile.samples, :, tile.rows].copy_(part.transpose(0, 1))
    return u, sumsq, v.sum(dim=2, dtype=dtype)


def centred_mix_backward(du: Tensor, dsumsq: Tensor, dtotal: Tensor, q: Tensor, k: Tensor, v: Tensor, mix: Tensor,
                         scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (laid out `[B, N, H, d]`) and mix, from those of the three results of `centred_mix`:
    `dM = dU v^T + 2 dsumsq M`, `dmix = sum dM C^T`, `dA = mix^T dM`, then softmax's backward (constants vanish)."""
    B, H, N, d = q.shape
    dtype = mix.dtype
    dq, dk, dv = (tokens_first(x) for x in (q, k, v))  # [B, H, N, d]
    dmix = mix.new_zeros(H, H + 1)
    twice = 2 * dsumsq.T[:, :, None, None]  # [H, B, 1, 1]
    for tile in cover(B, H, N, dtype.itemsize, q.device.type):
        if tile.rows.start == 0:
            keys, values = (_heads_first(x, tile, dtype, rows=False) for x in (k, v))  # [H, S, N, d]
            dkeys = torch.zeros_like(keys)
            dvalues = torch.empty_like(values).copy_(dtotal[tile.samples].transpose(0, 1)[:, :, None])
        queries, dout = _heads_first(q, tile, dtype, True, scale), _heads_first(du, tile, dtype, True)  # [H, S, R, d]
        maps = _Maps(mix, tile, scratch=2)
        mixed, dmixed = maps.fill(queries, keys), maps.scratch[1]
        _accumulate(dvalues, mixed, dout)
        torch.bmm(dout.flatten(0, 1), values.flatten(0, 1).mT, out=dmixed.flatten(0, 1))
        dmixed.addcmul_(mixed, twice[:, tile.samples])
        dmix.addmm_(dmixed.flatten(1), maps.softmax.flatten(1).T)
        dmaps = torch.mm(mix.T, dmixed.flatten(1), out=mixed.flatten(1)).view(mixed.shape)  # [H, S, R, N]
        dlogits = torch.ops.aten._softmax_backward_data.out(dmaps, maps.softmax[:-1], -1, dtype, grad_input=dmixed)
        dqueries = torch.bmm(dlogits.flatten(0, 1), keys.flatten(0, 1)).view(dout.shape)
        torch.mul(dqueries.transpose(0, 1), scale, out=dq[tile.samples, :, tile.rows])
        _accumulate(dkeys, dlogits, queries)
        if tile.rows.stop == N:
            dk[tile.samples].copy_(dkeys.transpose(0, 1))
            dv[tile.samples].copy_(dvalues.transpose(0, 1))
    return dq, dk, dv, dmix[:, :H] - dmix[:, H:]


def _accumulate(into: Tensor, maps: Tensor, rows: Tensor) -> None:
    """`into += maps^T rows` for `[H, S, N, d]`, `[H, S, R, N]`, `[H, S, R, d]`."""
    into.flatten(0, 1).baddbmm_(maps.flatten(0, 1).mT, rows.flatten(0, 1))
