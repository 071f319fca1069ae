"""The Triton kernels: interpreted on the CPU, compiled for sm_90 without a GPU, run where there is one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from deepvit import ops  # noqa: E402
from deepvit.ops import HeadNorm, dispatch, reference, triton_core, triton_report  # noqa: E402


def test_interpreted_kernels_equal_the_tiles():
    script = Path(__file__).parent / "triton_interpreted.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0 and "cases agree" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("kernel", triton_report.KERNELS)
def test_compiles_for_hopper_without_spills(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    used = triton_report.usage(kernel, d=32)
    assert used["spills"] == 0 and used["registers"] <= 255 and used["shared"] <= 227 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("dtype, d", [(torch.bfloat16, 33), (torch.bfloat16, 64), (torch.float32, 32),
                                      (torch.float32, 48)])
@pytest.mark.parametrize("kernel", triton_report.KERNELS)
def test_every_served_width_fits_hopper(kernel, dtype, d):
    assert triton_report.usage(kernel, d, dtype)["shared"] <= 227 * 1024


def test_head_widths_pad_least():
    assert [sum(triton_core.head_widths(d)) for d in (8, 32, 33, 35, 64)] == [16, 32, 48, 48, 64]


def test_refusals_say_why():
    refused = lambda H, d, dtype: triton_core.refusal(torch.device("cuda"), dtype, H, d)  # noqa: E731
    assert "float64" in refused(4, 32, torch.float64)
    assert "17 heads" in refused(17, 32, torch.bfloat16)
    assert "width 80" in refused(4, 80, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("shape", [(2, 12, 197, 32), (3, 12, 50, 33), (2, 12, 70, 35), (4, 16, 17, 16), (2, 1, 5, 48)],
                         ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_on_a_gpu(shape, dtype, bound, training):
    B, H, N, d = shape
    torch.manual_seed(0)
    packed = torch.randn(B, N, 3, H, d, device="cuda").to(dtype)
    head = [torch.randn(H, H), torch.randn(H), torch.randn(H)]  # mix, gamma, beta
    seed = torch.randn(B, H, N, d, device="cuda").to(dtype)
    assert dispatch.choose(*packed.permute(2, 0, 3, 1, 4).unbind(0))[0] == "triton"
    results = []
    for op, wide in ((reference.reattention, torch.float64), (ops.reattention, torch.float32)):
        qkv = (packed.double() if op is reference.reattention else packed).detach().clone().requires_grad_()
        mix, gamma, beta = (x.to("cuda", wide).requires_grad_() for x in head)
        stats = torch.zeros(H, device="cuda", dtype=wide), torch.ones(H, device="cuda", dtype=wide)
        out = op(*qkv.permute(2, 0, 3, 1, 4).unbind(0), mix, norm=HeadNorm(gamma, beta, *stats), training=training)
        grads = torch.autograd.grad(out, (qkv, mix, gamma, beta), seed.to(out.dtype))
        results.append([out, *grads, *stats])
    for exact, got in zip(*results):
        assert (got.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.gpu
def test_repeats_bit_for_bit_and_keeps_no_map():
    torch.manual_seed(0)
    qkv = torch.randn(8, 1025, 3, 12, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mix = torch.randn(12, 12, device="cuda", requires_grad=True)
    grads = []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = ops.reattention(*qkv.permute(2, 0, 3, 1, 4).unbind(0), mix)
        grads.append(torch.autograd.grad(out.float().square().sum(), (qkv, mix)))
        assert torch.cuda.max_memory_allocated() - before < 7 * qkv.nbytes < 8 * 12 * 1025 ** 2 * 2
    assert all(torch.equal(a, b) for a, b in zip(*grads))
