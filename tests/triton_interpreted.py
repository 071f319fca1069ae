"""Run by test_ops_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is first imported."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import itertools  # noqa: E402

import torch  # noqa: E402

from deepvit import ops  # noqa: E402
from deepvit.ops import HeadNorm, core, reference, tiles, triton_core  # noqa: E402

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [(2, 3, 7, 5), (1, 12, 33, 33), (2, 16, 17, 35), (1, 1, 1, 64), (1, 2, 50, 16), (1, 6, 40, 48)]


def relative(got, want):
    return float((got.double() - want).norm() / (want.norm() + 1e-6))


def check(B, H, N, d, dtype, packed, alike=0.0):
    """Outputs and gradients of the kernels against the tiles in float64, on the same rounded inputs; `alike`: what all
    tokens' values have in common."""
    rng = torch.Generator().manual_seed(B * N + d)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    packed_qkv = (draw(B, N, 3, H, d) + alike * torch.tensor([0, 0, 1])[:, None, None]).to(dtype)
    q, k, v = packed_qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if not packed:
        q = q.contiguous()
    mix, scale = draw(H, H), d ** -0.5
    u, sumsq, total, lse = triton_core.centred_mix(q, k, v, mix, scale, True)
    exact = [x.double() for x in (q, k, v, mix)]
    du, dsumsq, dtotal = draw(B, H, N, d).to(dtype), 0.3 * draw(B, H), draw(B, H, d)
    grads = triton_core.centred_mix_backward(du, dsumsq, dtotal, q, k, v, mix, lse, scale)
    want = (*tiles.centred_mix(*exact, scale, True),
            *tiles.centred_mix_backward(du.double(), dsumsq.double(), dtotal.double(), *exact, scale))
    for name, got, right in zip("U sumsq total dq dk dv dmix".split(), (u, sumsq, total, *grads), want, strict=True):
        assert relative(got, right) < BOUNDS[dtype], (name, (B, H, N, d), dtype, relative(got, right))


def check_initialisation(dtype, std):
    """The whole operation where maps are all but uniform, C is 1e-3 to 1e-5 and U 1e-4: nothing may fall out of the
    range of the dtype, on the way there or back."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    qkv = (draw(1, 40, 3, 12, 16) * torch.tensor([std, std, 1.0])[:, None, None]).to(dtype)
    head = [draw(12, 12) / 12**0.5, torch.ones(12), draw(12)]  # mix, gamma, beta
    seed, results = draw(1, 12, 40, 16), []
    for op, wide in ((ops.reattention, torch.float32), (reference.reattention, torch.float64)):
        given = qkv.to(dtype if wide == torch.float32 else wide).requires_grad_()
        mix, gamma, beta = (x.to(wide).requires_grad_() for x in head)
        norm = HeadNorm(gamma, beta, torch.zeros(12, dtype=wide), torch.ones(12, dtype=wide), momentum=1.0)
        out = op(*given.permute(2, 0, 3, 1, 4).unbind(0), mix, norm=norm, training=True)
        grads = torch.autograd.grad(out, (given, mix, gamma), seed.to(out.dtype))
        results.append([out.detach(), *grads[0].unbind(2), *grads[1:], norm.running_var])
    for name, got, want in zip("out dq dk dv dmix dgamma variance".split(), *results, strict=True):
        assert relative(got, want) < BOUNDS[dtype], (name, dtype, std, relative(got, want))


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert triton_core.INTERPRETED
    for width in (48, 64):  # no card holds them in float32, which shows best whether a kernel is right
        triton_core.TILES[width, 4] = triton_core.TILES[width, 2]
    half = len(SHAPES) if sys.argv[1] == "all" else 2  # shapes in half precision
    for shape in SHAPES:
        check(*shape, torch.float32, packed=shape[1] != 16)
    for shape in SHAPES[:half]:
        check(*shape, torch.bfloat16, packed=shape[1] != 16)
    for shape in SHAPES[:half // 2]:
        check(*shape, torch.float16, packed=True)
    check(2, 6, 40, 32, torch.float32, packed=True, alike=30.0)
    core._form = lambda *_: triton_core
    for dtype, std in itertools.product((torch.bfloat16, torch.float16), (0.02, 0.4)):
        check_initialisation(dtype, std)
    print("all cases agree")
