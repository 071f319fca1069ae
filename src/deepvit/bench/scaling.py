"""How cost grows with tokens and with depth: time and memory of a train step, ours beside timm's ViT."""

from collections.abc import Iterator

from deepvit.bench.contestants import BASE, OURS, TrainStep, contestants
from deepvit.bench.timing import interleaved, summary

PIXELS = {50: 112, 65: 128, 197: 224, 577: 384, 1025: 512}  # tokens -> pixels, in patches of 16
DEPTHS = (2, 8, 32, 64)


def measure(device: str = "cpu", *, depth: int = 64, batch: int | None = None, seconds: float = 15.0) -> Iterator[dict]:
    """Rows with `case`, `name`, `ms`, `spread`, `ratio`, `kept_mib`.

    Args:
        depth: no deeper than this; batch: default 2, on a GPU 64; seconds: for each case.
    """
    batch = batch or (64 if device == "cuda" else 2)
    cases = [(f"{tokens} tokens, {min(2, depth)} blocks", min(2, depth), pixels) for tokens, pixels in PIXELS.items()]
    cases += [(f"{blocks} blocks, 65 tokens", blocks, 128) for blocks in DEPTHS if blocks <= depth]
    for case, blocks, pixels in cases:
        makers = contestants(blocks, pixels)
        steps = {name: TrainStep(makers[name], batch, pixels, device) for name in (BASE, OURS)}
        times = interleaved(steps, device, seconds)
        for name, taken in times.items():
            yield {"case": case, "name": name, **summary(taken, times[BASE]),
                   "kept_mib": sum(steps[name].kept()) / 2**20}
