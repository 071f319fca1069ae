"""What a train step keeps and needs: bytes saved for backward, and the peak of a fresh process."""

import multiprocessing
from pathlib import Path

import torch

from deepvit.bench.contestants import BASE, TrainStep, contestants
from deepvit.engine import memory

STEPS = 2  # the first makes the optimizer's moments


def measure(device: str = "cpu", *, depth: int = 32, batch: int | None = None, img_size: int = 224) -> list[dict]:
    """Rows with `case`, `name`, `kept_mib`, `peak_mib` (over the idle process with its model), their ratios to timm's.

    Each model is measured in a process of its own: an allocator's leftovers would hide a peak.
    """
    batch = batch or (256 if device == "cuda" else 8)
    case = f"memory of a train step, {depth} blocks, {img_size} px, batch {batch}"
    rows = []
    for name in contestants(depth, img_size):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            kept, peak = pool.apply(_one, (name, device, depth, batch, img_size))
        rows.append({"case": case, "name": name, "kept_mib": kept / 2**20, "peak_mib": peak / 2**20})
    base = next(row for row in rows if row["name"] == BASE)
    return [row | {"kept_ratio": row["kept_mib"] / base["kept_mib"],
                   "ratio": row["peak_mib"] / base["peak_mib"]} for row in rows]


def _one(name: str, device: str, depth: int, batch: int, img_size: int) -> tuple[int, int]:
    """(bytes kept for backward, peak bytes of train steps over the process with its model alone)."""
    dtype = torch.bfloat16 if device == "cuda" else None
    step = TrainStep(contestants(depth, img_size)[name], batch, img_size, device, dtype)
    idle = _resident(device)
    for _ in range(STEPS):
        step()
    return kept_bytes(step), _peak(device) - idle


def kept_bytes(step: TrainStep) -> int:
    """Bytes of the distinct storages saved for backward, parameters and the batch left out."""
    return memory.kept_bytes(step.loss, (*step.model.parameters(), *step.model.buffers(), step.x, step.y))


def _resident(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """Bytes, from Linux: of this program alone; getrusage's peak would be that of the process that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
