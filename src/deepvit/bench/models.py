"""Train step and evaluation of whole models, all contestants in turn."""

from collections.abc import Iterator, Sequence
from functools import partial

from deepvit.bench.ceilings import ceilings
from deepvit.bench.contestants import BASE, OURS, Forward, TrainStep, contestants
from deepvit.bench.timing import fitting, interleaved, left_out, reason, summary

EPOCHS, IMAGENET = 300, 1_281_167  # of recipe=imagenet; training images
DEPTHS = 16, 24, 32


def measure(job: type[TrainStep], device: str = "cpu", *, depth: int = 32, batch: int | None = None,
            img_size: int = 224, seconds: float = 120.0, compiled: bool = False, names: Sequence[str] = ()
            ) -> Iterator[dict]:
    """Rows with `case`, `name`, `ms`, `spread`, `ratio` to timm's ViT (of the time for an image; `paired`),
    `images_per_s`, `floor_ms`, and where it is so `note`: a smaller batch, or `failed`.

    Args:
        job: `TrainStep` or `Forward`.
        batch: images; default 4 on a CPU (fp32), 256 on a GPU (bf16); halved for what does not fit into memory.
        seconds: to spend in all, after a warm-up round.
        compiled: torch.compile the models (a minute each): by default timm's and ours alone.
        names: of the contestants; default all.
    """
    batch = batch or (256 if device == "cuda" else 4)
    title = ("compiled " if compiled else "") + ("train step" if job is TrainStep else "evaluation")
    case = f"{title}, {depth} blocks, {img_size} px, batch {batch}"
    makers, steps, batches, floors = contestants(depth, img_size), {}, {}, {}
    for name in names or ((BASE, OURS) if compiled else makers):
        make = partial(job, makers[name], img_size=img_size, device=device, compiled=compiled)
        try:
            step, batches[name] = fitting(make, batch)
            floors[name] = ceilings(device).floor_ms(step.flops(), step.moved())
            steps[name] = step
        except Exception as error:  # one contestant's failure is a row, and the others go on
            yield {"case": case, "name": name, "failed": reason(error)}
    times = interleaved(steps, device, seconds)
    yield from ({"case": case, **row} for row in left_out(steps, times))
    for name, taken in times.items():
        compared = summary(taken, times.get(BASE), batches[name] / batches.get(BASE, batches[name]))
        row = {"case": case, "name": name, **compared, "floor_ms": floors[name]}
        row["images_per_s"] = 1e3 * batches[name] / row["ms"]
        yield row | ({} if batches[name] == batch else {"note": f"at batch {batches[name]}, {batch} does not fit"})


def train_step(device: str = "cpu", **options) -> Iterator[dict]:
    return measure(TrainStep, device, **options)


def evaluation(device: str = "cpu", **options) -> Iterator[dict]:
    return measure(Forward, device, **options)


def imagenet(device: str = "cpu", *, depth: int | None = None, **options) -> Iterator[dict]:
    """Train steps at the depths of the paper, with the `hours` that the epochs of `recipe=imagenet` take at that rate;
    evaluation and what is waited for are not counted."""
    for blocks in [depth] if depth else DEPTHS:
        for row in measure(TrainStep, device, depth=blocks, names=(BASE, OURS), **options):
            hours = {} if "failed" in row else {"hours": EPOCHS * IMAGENET / row["images_per_s"] / 3600}
            yield row | {"case": f"{EPOCHS} epochs of ImageNet, {row['case']}"} | hours
