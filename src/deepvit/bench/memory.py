"""What a train step keeps and needs: bytes saved for backward, and the peak of a fresh process."""

from collections.abc import Iterator

import torch

from deepvit.bench.apart import apart
from deepvit.bench.contestants import BASE, TrainStep, contestants
from deepvit.bench.timing import fitting, reason
from deepvit.engine.device import peak_bytes, reset_peak


def measure(device: str = "cpu", *, depth: int = 32, batch: int | None = None, img_size: int = 224) -> Iterator[dict]:
    """Rows with `case`, `name`, `kept_mib`, `maps_mib` (that part of it which is attention maps), `peak_mib` (over the
    process with its model), and the ratios of kept and peak to timm's, all for an image; `failed` or `note`.

    Each model is measured in a process of its own: an allocator's leftovers would hide a peak.
    """
    batch = batch or (256 if device == "cuda" else 8)
    case, base = f"memory of a train step, {depth} blocks, {img_size} px, batch {batch}", None
    for name in contestants(depth, img_size):
        try:
            row, used = apart(_one, name, device, depth, batch, img_size)
        except Exception as error:  # one contestant's failure is a row, and the others go on
            yield {"case": case, "name": name, "failed": reason(error)}
            continue
        share = {field: mib / used for field, mib in row.items()}
        base = share if name == BASE else base
        row |= {"kept_ratio": share["kept_mib"] / base["kept_mib"],
                "ratio": share["peak_mib"] / base["peak_mib"]} if base else {}
        yield {"case": case, "name": name, **row} | (
            {} if used == batch else {"note": f"at batch {used}, {batch} does not fit"})


def _one(name: str, device: str, depth: int, batch: int, img_size: int) -> tuple[dict[str, float], int]:
    """MiB kept and needed, and the batch. The first step, which makes the optimizer's moments, is `fitting`'s."""
    idle = 0

    def make(images: int) -> TrainStep:
        nonlocal idle
        step = TrainStep(contestants(depth, img_size)[name], images, img_size, device)
        idle = reset_peak(torch.device(device))
        return step

    step, batch = fitting(make, batch)
    step()
    peak, kept = peak_bytes(torch.device(device)) - idle, step.kept()
    heads, tokens = 12, (img_size // 16) ** 2 + 1
    maps = batch * heads * tokens**2 * (2 if device == "cuda" else 4)  # bytes; nothing else a block keeps is so large
    return {"kept_mib": sum(kept) / 2**20, "maps_mib": sum(size for size in kept if size >= maps) / 2**20,
            "peak_mib": peak / 2**20}, batch
