"""Train step and evaluation of whole models, all contestants in turn."""

import torch

from deepvit.bench.contestants import BASE, Forward, TrainStep, contestants
from deepvit.bench.timing import interleaved, summary


def measure(job: type[TrainStep], device: str = "cpu", *, depth: int = 32, batch: int | None = None,
            img_size: int = 224, seconds: float = 120.0, compiled: bool = False) -> list[dict]:
    """Rows with `case`, `name`, `ms`, `spread`, `ratio` to timm's ViT, `images_per_s`.

    Args:
        job: `TrainStep` or `Forward`.
        batch: pictures; default 4 on a CPU (fp32), 256 on a GPU (bf16).
        seconds: to spend in all, after a warm-up round.
    """
    on_gpu = device == "cuda"
    batch, dtype = batch or (256 if on_gpu else 4), torch.bfloat16 if on_gpu else None
    makers = contestants(depth, img_size)
    times = interleaved({name: job(make, batch, img_size, device, dtype, compiled) for name, make in makers.items()},
                        device, seconds)
    case = f"{'train step' if job is TrainStep else 'evaluation'}, {depth} blocks, {img_size} px, batch {batch}"
    rows = [{"case": case, "name": name, **summary(taken, times[BASE])} for name, taken in times.items()]
    return [row | {"images_per_s": 1e3 * batch / row["ms"]} for row in rows]


def train_step(device: str = "cpu", **options) -> list[dict]:
    return measure(TrainStep, device, **options)


def evaluation(device: str = "cpu", **options) -> list[dict]:
    return measure(Forward, device, **options)
