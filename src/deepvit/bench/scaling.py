"""How cost grows with tokens and with depth: time and memory of a train step, ours beside timm's ViT."""

from deepvit.bench.contestants import BASE, TrainStep, contestants
from deepvit.bench.memory import kept_bytes
from deepvit.bench.timing import interleaved, summary

PIXELS = {50: 112, 65: 128, 197: 224, 577: 384, 1025: 512}  # tokens -> pixels, in patches of 16
DEPTHS = (2, 8, 32, 64)
NAMES = (BASE, "deepvit, re-attention")


def measure(device: str = "cpu", *, seconds: float = 15.0) -> list[dict]:
    """Rows with `case`, `name`, `ms`, `spread`, `ratio`, `kept_mib`; `seconds` for each case, batch 2 (GPU: 64)."""
    batch = 64 if device == "cuda" else 2
    cases = [(f"{tokens} tokens, 2 blocks", 2, pixels) for tokens, pixels in PIXELS.items()]
    cases += [(f"{depth} blocks, 65 tokens", depth, 128) for depth in DEPTHS]
    rows = []
    for case, depth, pixels in cases:
        steps = {name: TrainStep(contestants(depth, pixels)[name], batch, pixels, device) for name in NAMES}
        times = interleaved(steps, device, seconds)
        rows += [{"case": case, "name": name, **summary(taken, times[BASE]),
                  "kept_mib": kept_bytes(steps[name]) / 2**20} for name, taken in times.items()]
    return rows
