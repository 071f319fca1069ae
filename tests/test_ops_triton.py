"""The Triton kernels: interpreted on the CPU, compiled for many cards without one, run where there is one."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton_report  # noqa: E402

from deepvit import ops  # noqa: E402
from deepvit.ops import HeadNorm, core, reference, tiles, triton_core  # noqa: E402


@pytest.mark.parametrize("cases", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_interpreted_kernels_equal_the_tiles(cases):
    script = Path(__file__).parent / "triton_interpreted.py"
    done = subprocess.run([sys.executable, script, cases], capture_output=True, text=True)
    if "only 0-dimensional arrays" in done.stderr:
        pytest.skip("triton's interpreter before 3.7 reads numbers as numpy 2.5 forbids")
    assert done.returncode == 0 and "all cases agree" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("kernel", triton_report.KERNELS)
def test_compiles_for_hopper_without_spills(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    used = triton_report.usage(kernel, d=32)
    assert used["stack"] == 0 and used["registers"] <= 255 and all(used["async"])
    assert used["shared"] <= triton_core.TILES[32, 2][kernel].shared * 1024


SERVED = [(arch, dtype, d) for arch, shared in triton_report.CARDS.items() for dtype in triton_core.DTYPES
          for d in (16, 32, 33, 64) if triton_core.shared_memory(d, dtype) <= shared]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", triton_report.KERNELS)
@pytest.mark.parametrize("arch, dtype, d", SERVED, ids=str)
def test_the_table_of_tiles_is_what_the_compiler_says(kernel, arch, dtype, d, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = triton_core.TILES[sum(triton_core.head_widths(d)), dtype.itemsize][kernel]
    for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        used = triton_report.usage(kernel, d, dtype, arch)
        assert used["shared"] <= tile.shared * 1024, (precision, used)
        assert used["stack"] <= (800 if dtype == torch.float32 else 256 if d > 48 else 16 if d > 32 else 0), used


def test_reports_the_kernel_that_is_launched():
    """Triton's own view of each argument: its type, whether it is a multiple of 16, and 1 as a constant."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend
    aligned = torch.empty(64, dtype=torch.bfloat16)
    for value in (16, 17, 32, 0.25, aligned):
        kind, hint = native_specialize_impl(CUDABackend, value, False, True, True)
        assert triton_report._specialised(value) == (kind, hint == "D")
    assert native_specialize_impl(CUDABackend, 1, False, True, True)[0] == "constexpr"
    launch = triton_report.launch_of("bwd_dkv", 33, torch.bfloat16)
    given = dict(zip(launch.kernel.arg_names, launch.arguments))
    assert (given["d"], given["sh"], given["sn"]) == (33, 48, 576)  # padded inputs, whose rows are all aligned
    assert len(launch.arguments) + len(launch.options) - 2 == len(launch.kernel.arg_names)


def test_head_widths_pad_least():
    """Two powers of two from 16 on (what `tl.dot` takes), or one: of all that hold d, the fewest columns."""
    powers = (16, 32, 64)
    sums = {first + second for first in powers for second in (0, *powers)}
    for d in range(1, 65):
        first, second = triton_core.head_widths(d)
        assert first in powers and second in (0, *powers)
        assert first + second == min(total for total in sums if total >= d)


BF16, FP16, FP32 = triton_core.DTYPES


@pytest.mark.parametrize("card, served, refused", [
    (("A100", 8, 163), [(BF16, 64), (FP16, 33), (FP32, 16)], [(FP32, 32), (BF16, 80)]),
    (("RTX 4090", 8, 99), [(BF16, 32), (FP16, 16), (FP32, 16)], [(BF16, 33), (FP16, 64), (FP32, 32)]),
    (("H100", 9, 227), [(BF16, 64), (FP16, 64), (FP32, 32)], [(FP32, 48), (torch.float64, 32)]),
    (("B200", 10, 227), [(BF16, 64), (FP32, 32)], []),
    (("RTX 5090", 12, 99), [(BF16, 32)], [(BF16, 64)]),
    (("T4", 7, 64), [], [(FP16, 16)])], ids=["A100", "4090", "H100", "B200", "5090", "T4"])
def test_cards_that_people_own(monkeypatch, card, served, refused):
    """What no kernel serves says why, and goes to the tiles of PyTorch."""
    name, major, shared = card
    known = types.SimpleNamespace(name=name, major=major, shared_memory_per_block_optin=shared * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    core._form.cache_clear()
    for dtype, d in served + refused:
        why = triton_core.refusal(torch.device("cuda"), dtype, 12, d)
        assert bool(why) == ((dtype, d) in refused) and (not why or f"width {d}" in why)
        assert core._form(torch.device("cuda"), dtype, 12, d) is (tiles if why else triton_core)
    core._form.cache_clear()
    assert "17 heads" in triton_core.refusal(torch.device("cuda"), BF16, 17, 32)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("shape", [(2, 12, 197, 32), (3, 12, 50, 33), (2, 12, 70, 35), (4, 16, 17, 16), (2, 1, 5, 48),
                                   (1, 6, 577, 64), (2, 4, 70, 80)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_what_serves_a_shape_equals_the_definition(device, shape, dtype, bound, training, monkeypatch):
    monkeypatch.setattr(core, "choose", lambda *_, **__: ("as on a GPU", ""))  # on a CPU the core of that form differs
    B, H, N, d = shape
    torch.manual_seed(0)
    packed = torch.randn(B, N, 3, H, d).to(device, dtype)
    head = [torch.randn(H, H), torch.randn(H), torch.randn(H)]  # mix, gamma, beta
    seed = torch.randn(B, H, N, d).to(device, dtype)
    results = []
    for op, wide in ((reference.reattention, torch.float64), (ops.reattention, torch.float32)):
        qkv = (packed.double() if op is reference.reattention else packed).detach().clone().requires_grad_()
        mix, gamma, beta = (x.to(device, wide).requires_grad_() for x in head)
        stats = torch.zeros(H, device=device, dtype=wide), torch.ones(H, device=device, dtype=wide)
        out = op(*qkv.permute(2, 0, 3, 1, 4).unbind(0), mix, norm=HeadNorm(gamma, beta, *stats), training=training)
        grads = torch.autograd.grad(out, (qkv, mix, gamma, beta), seed.to(out.dtype))
        results.append([out, *grads, *stats])
    for name, exact, got in zip("out dqkv dmix dgamma dbeta mean var".split(), *results, strict=True):
        if (name, H, training) != ("dmix", 1, True):  # the norm undoes the mix of one head: all of it is rounding
            assert (got.double() - exact).norm() <= bound * exact.norm(), name


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
