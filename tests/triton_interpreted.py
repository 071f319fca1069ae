"""Run by test_ops_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is first imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools  # noqa: E402

import torch  # noqa: E402

from deepvit.ops import tiles, triton_core  # noqa: E402

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
    bound = 2e-6 if dtype == torch.float32 else 8e-3
    for name, got, right in zip("U sumsq total dq dk dv dmix".split(), (u, sumsq, total, *grads), want, strict=True):
        assert relative(got, right) < bound, (name, (B, H, N, d), dtype, relative(got, right))


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert triton_core.INTERPRETED
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        check(*shape, dtype, packed=shape[1] != 16)
    check(2, 6, 40, 32, torch.float32, packed=True, alike=30.0)
    print(f"{2 * len(SHAPES) + 1} cases agree")
