"""The core of the affine form on a CPU, compiled: `native.cpp`, built once by the machine's g++ and kept in a cache.
Never required: without g++, or with DEEPVIT_NATIVE=0, `tiles.py` does the same in plain PyTorch. What the compiled form
adds is one parallel region a call, where PyTorch has dozens: on a busy machine those wait for each other."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from deepvit.ops.tiles import tokens_first

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
TILE_BYTES = 400_000  # of one maps buffer of one thread; three are alive in backward, beside keys and values (1 MiB L2)


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in "B H N D sb sh sn rows chunk".split()] + [("scale", ctypes.c_float)]

    chunks = property(lambda self: ceil(self.N / self.chunk))


def _processor() -> list[str]:
    """What `-march=native` looks at: a home may be shared with machines that lack this one's instructions."""
    fields = ("model name", "flags", "Features", "CPU part")  # x86 and Arm
    lines = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(fields)}
    return [platform.machine(), *sorted(lines)]


def _flags() -> tuple[str, ...]:
    """Where torch is held back to AVX2, so are we."""
    return (*FLAGS, "-mno-avx512f") if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2" else FLAGS


def _signature() -> str:
    return hashlib.sha256(repr((SOURCE.read_text(), _flags(), _processor())).encode()).hexdigest()[:16]


def _build(library: Path, compiler: str) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects, linked = Path(folder) / "native.o", Path(folder) / "native.so"
        subprocess.run([compiler, *_flags(), "-c", SOURCE, "-o", objects], check=True, capture_output=True)
        # linked without -fopenmp: the OpenMP runtime is the one torch has loaded, so that both share its threads
        subprocess.run([compiler, "-shared", objects, "-o", linked], check=True, capture_output=True)
        ctypes.CDLL(str(linked))  # one that does not load is not kept
        linked.replace(library)  # atomic, as several processes may build at once


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled library, or None and why there is none."""
    if os.environ.get("DEEPVIT_NATIVE") == "0":
        return None, "DEEPVIT_NATIVE=0"
    compiler = shutil.which("g++")
    if compiler is None or platform.system() != "Linux":
        return None, "no g++ here"
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepvit"
    try:
        library = cached / f"native-{_signature()}.so"
        if not library.exists():
            _build(library, compiler)
        return ctypes.CDLL(str(library)), ""
    except subprocess.CalledProcessError as error:
        return None, f"g++ failed: {error.stderr.decode(errors='replace').strip()[-200:]}"
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        return None, f"not built: {error}"


def instructions() -> str | None:
    """What the compiled form was built for, as torch names it: AVX512, AVX2 or DEFAULT; None without it."""
    library, _ = load()
    return library and ctypes.c_char_p.in_dll(library, "deepvit_instructions").value.decode()


def refusal(dtype: torch.dtype) -> str:
    """Why the compiled form does not serve q, k, v of `dtype`; empty if it does."""
    library, why = load()
    return "the compiled form has no float64" if library and dtype == torch.float64 else why


def _sizes(q: Tensor, scale: float) -> Sizes:
    B, H, N, D = q.shape
    most = max(8, min(TILE_BYTES // (4 * H * N) // 8 * 8, 64))
    rows = ceil(N / ceil(N / most) / 8) * 8  # of tiles as even as eights can be
    threads = torch.get_num_threads()
    parts = 1 if B % threads == 0 or B >= 2 * threads else ceil(2 * threads / B)  # tasks a sample is cut into
    chunk = ceil(ceil(N / parts) / rows) * rows
    return Sizes(B, H, N, D, *q.stride()[:3], rows, chunk, scale)


def _float_inputs(*inputs: Tensor) -> tuple[Tensor, ...]:
    """q, k, v in float32 of one stride; views of one packed tensor pass as they are."""
    inputs = tuple(x.float() for x in inputs)
    if len({x.stride() for x in inputs}) == 1 and inputs[0].stride(-1) == 1:
        return inputs
    return tuple(x.contiguous() for x in inputs)


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    """Addresses; the caller keeps the tensors alive by name, as a temporary would be freed before the call."""
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


def centred_mix(q: Tensor, k: Tensor, v: Tensor, mix: Tensor, scale: float, statistics: bool) -> tuple[Tensor, ...]:
    """`reference.centred_mix` for float32 and half precision, computed in float32, without autograd."""
    dtype = q.dtype
    q, k, v = _float_inputs(q, k, v)
    mix, sizes = mix.contiguous(), _sizes(q, scale)
    u = tokens_first(q)  # [B, H, N, d]
    sumsq = torch.zeros(sizes.B * sizes.chunks, sizes.H, dtype=torch.float64)
    total = q.new_empty(sizes.B, sizes.H, sizes.D)
    load()[0].deepvit_forward(*_pointers(q, k, v, mix, u, sumsq, total), ctypes.byref(sizes), torch.get_num_threads())
    return u.to(dtype), sumsq.view(sizes.B, sizes.chunks, sizes.H).sum(dim=1).to(mix.dtype), total


def centred_mix_backward(du: Tensor, dsumsq: Tensor, dtotal: Tensor, q: Tensor, k: Tensor, v: Tensor, mix: Tensor,
                         scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and mix; the arguments as in `tiles.centred_mix_backward`."""
    B, H, N, d = q.shape
    dtype = q.dtype
    q, k, v = _float_inputs(q, k, v)
    du = du.float().transpose(1, 2)  # [B, N, H, d]
    du, mix, dsumsq, dtotal = (x.contiguous() for x in (du, mix, dsumsq, dtotal))
    sizes = _sizes(q, scale)
    dq = tokens_first(q)  # [B, H, N, d]
    parts = [q.new_empty(B, sizes.chunks, N, H, d) for _ in (k, v)]  # dk and dv, of each task of a sample
    dmix = q.new_zeros(B * sizes.chunks, H, H)
    load()[0].deepvit_backward(*_pointers(q, k, v, mix, du, dsumsq, dtotal, dq, *parts, dmix), ctypes.byref(sizes),
                               torch.get_num_threads())
    dk, dv = (x.squeeze(1) if sizes.chunks == 1 else x.sum(dim=1) for x in parts)  # [B, N, H, d]
    return dq.to(dtype), dk.transpose(1, 2).to(dtype), dv.transpose(1, 2).to(dtype), dmix.sum(dim=0)
