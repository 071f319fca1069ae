"""The machine that a bench ran on, without which a time means nothing."""

import os
import platform
import re
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deepvit.config.provenance import versions
from deepvit.engine.device import device_name, usable_cores
from deepvit.errors import UserError
from deepvit.ops import native

PROCESSOR = "/proc/cpuinfo"
STOOD_IN = " (stand-in)"
HELD_BACK = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def made_on(device: str) -> str:
    """The card, or the instruction set as torch names it; `AVX2 (stand-in)` on a processor that has AVX-512, which is
    not the same as `AVX2`. UserError if torch alone is held back to AVX2."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = torch.backends.cpu.get_cpu_capability()
    if name == "AVX2" and _found_in(PROCESSOR, r"^flags\s*:.* (avx512f) "):
        missing = [f"{key}={value}" for key, value in HELD_BACK.items() if os.environ.get(key) != value]
        if missing:
            raise UserError(f"ATEN_CPU_CAPABILITY holds torch back to AVX2, but not the other libraries: also set "
                            f"{' '.join(missing)}.")
        name += STOOD_IN
    return name if native.instructions() else f"{name}, no compiler"


def provenance(device: str) -> dict[str, Any]:
    """Where and when; on a CPU also its caches and the `instructions` of torch, its matrix library and our kernel."""
    on_cpu = {} if device != "cpu" else {
        "instructions": {"torch": torch.backends.cpu.get_cpu_capability(), "matrices": _matrix_library(),
                         "kernel": native.instructions() or native.load()[1]}, "caches": _caches()}
    return {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": platform.machine(),
            "processor": _found_in(PROCESSOR, r"^model name\s*: (.*)$") or platform.processor(),
            "cores": usable_cores(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
            "device": device_name(torch.device(device)), **on_cpu,
            "driver": _found_in("/proc/driver/nvidia/version", r"^NVRM version: .*?\s(\d+\.[\d.]+)\s"),
            "triton": next((found.version for found in metadata.distributions(name="triton")), None), **versions()}


def _found_in(path: str | Path, pattern: str) -> str | None:
    with suppress(OSError):
        if found := re.search(pattern, Path(path).read_text(), re.MULTILINE):
            return found[1]
    return None


@cache
def _matrix_library() -> str:
    """MKL with its instructions, which on an AMD processor it does not name."""
    program = [sys.executable, "-c", "import torch; torch.ones(2, 2) @ torch.ones(2, 2)"]
    output = subprocess.run(program, env={**os.environ, "MKL_VERBOSE": "1"}, capture_output=True, text=True).stdout
    found = re.search("MKL_VERBOSE (.*?), ", output)
    return found[1] if found else "not MKL"


def _caches() -> dict[str, str]:
    """Sizes by level and type: L1 Data, L1 Instruction, L2 Unified ..."""
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    read = ([_found_in(cache / key, "(.*)") for key in ("level", "type", "size")] for cache in caches)
    return {f"L{level} {kind}": size for level, kind, size in read}
