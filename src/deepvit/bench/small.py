"""A small model trained end to end, data and all: images a second, and the share of the time spent waiting for them."""

import statistics
from collections.abc import Iterator

from deepvit.bench.contestants import OURS
from deepvit.bench.timing import reason
from deepvit.bench.training import alone, trained
from deepvit.config.compose import compose
from deepvit.errors import UserError

LOGGED = 8  # lines of the log, of which the first two warm up
BATCH = {"cuda": 512, "cpu": 32}


def measure(device: str = "cpu", *, depth: int = 32, batch: int | None = None, cifar10: str | None = None,
            compiled: bool = False) -> Iterator[dict]:
    """Rows with `case`, `name`, `images_per_s` and `data_wait` (both medians over the lines of the log) and `top1`; or
    `failed`.

    Args:
        batch: default 512, on a CPU 32; cifar10: its folder; without it the built-in digits, enlarged.
        compiled: by torch.compile, on a GPU in its default mode and as CUDA graphs.
    """
    batch = batch or BATCH[device]
    case = f"training on {'CIFAR-10' if cifar10 else 'digits'}, {depth} blocks of width 192, 65 tokens, batch {batch}"
    modes = (("default", "reduce-overhead") if device == "cuda" else ("default",)) if compiled else (False,)
    for mode in modes:
        named = {"name": OURS, "case": f"{case}, compiled: {mode}" if mode else case}
        try:
            yield named | _train(device, depth, batch, cifar10, mode)
        except UserError:
            raise
        except Exception as error:  # one mode's failure is a row, and the other goes on
            yield named | {"failed": reason(error)}


def _train(device: str, depth: int, batch: int, cifar10: str | None, mode: str | bool) -> dict[str, float]:
    data = [f"data.root={cifar10}"] if cifar10 else ["data=digits"]
    every = 20 if device == "cuda" else 1
    config = compose(["recipe=cifar10", *data, "model=deepvit32", f"model.depth={depth}", "model.embed_dim=192",
                      "model.num_heads=6", "precision=bf16", "data.on_device=true", f"data.batch_size={batch}",
                      f"engine.log_every={every}", f"engine.compile={str(mode).lower()}", "probe.images=0",
                      "schedule.epochs=null", "schedule.warmup_epochs=null", f"schedule.steps={LOGGED * every}",
                      "schedule.warmup_steps=0"])
    lines = trained(config, alone(device))
    steady = [line for line in lines if "lr" in line][2:]
    return {**{field: statistics.median(line[field] for line in steady) for field in ("images_per_s", "data_wait")},
            "top1": next(line["top1"] for line in reversed(lines) if "top1" in line)}
