"""Whole models of one size: time and memory of timm's ViT with fused attention, ours, and the published forms."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deepvit.bench.timing import apart, ceilings, fitting, interleaved, left_out, summary
from deepvit.engine.device import kept_storages, peak_bytes, reset_peak
from deepvit.errors import reason
from deepvit.models import ReAttention, create_model
from deepvit.models.registry import forward_flops
from deepvit.ops import reference

BASE, OURS = "timm ViT, fused attention", "deepvit, re-attention"
SIDE = 224  # pixels
EPOCHS, IMAGENET = 310, 1_281_167  # of recipe=imagenet, with cooldown; its training images
PAPER_DEPTHS = 16, 24, 32
GROWING_SIDES = {50: 112, 65: 128, 197: 224, 577: 384, 1025: 512}  # tokens -> pixels, in patches of 16
GROWING_DEPTHS = 2, 8, 32, 64
RATIOS = {"kept_ratio": "kept_mib", "ratio": "peak_mib"}  # of memory


class PublishedReAttention(ReAttention):
    """Re-attention as the published code computes it: every map made and kept. A peer to measure, not to use."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        track = self.training and self.track_stats
        return reference.reattention(q, k, v, *self._theta(), norm=self._head_norm(track), scale=self.scale,
                                     map_scale=self.map_scale, dropout_p=self.attn_drop, training=self.training)


def contestants(depth: int, img_size: int = SIDE) -> dict[str, Callable[[], nn.Module]]:
    """Name -> constructor, all of the published width 384, 12 heads and MLP ratio 3; the first is the base."""
    sizes = {"depth": depth, "img_size": img_size}
    published = {"name": "published", "class": "PublishedReAttention", "mix": True, "norm": True}
    return {
        BASE: partial(VisionTransformer, **sizes, embed_dim=384, num_heads=12, mlp_ratio=3.0,
                      norm_layer=partial(nn.LayerNorm, eps=1e-6)),
        "deepvit, self-attention": partial(create_model, "vit32", **sizes),
        OURS: partial(create_model, "deepvit32", **sizes),
        "re-attention, published form": partial(create_model, "deepvit32", attention=published, **sizes),
        "re-attention, vit-pytorch's form": partial(create_model, "deepvit32", attention="reattention_ln", **sizes),
    }


class TrainStep:
    """Forward, backward and a fused AdamW update on a batch that stays on the device; in bfloat16 on a GPU."""

    title = "train step"

    def __init__(self, make: Callable[[], nn.Module], batch: int, img_size: int, device: str, compiled: bool = False):
        torch.manual_seed(0)
        self.batch, self.make, self.model = batch, make, make().to(device).train()
        self.called = torch.compile(self.model) if compiled else self.model
        self.x = torch.randn(batch, 3, img_size, img_size, device=device)
        self.y = torch.randint(1000, (batch,), device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.autocast = partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")
        self.idle = reset_peak(torch.device(device))  # bytes held before the first step, which makes the moments

    def loss(self, network: nn.Module) -> Tensor:
        with self.autocast():
            return nn.functional.cross_entropy(network(self.x).float(), self.y)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.called).backward()
        self.optimizer.step()

    def kept(self) -> list[int]:
        """Bytes of each storage saved for backward, without parameters and batch; not compiled."""
        own = *self.model.parameters(), *self.model.buffers(), self.x, self.y
        return kept_storages(lambda: self.loss(self.model), own)

    def flops(self) -> float:
        """Of matrix products: forward, and twice that backward. Recomputation is not counted."""
        return 3 * self.batch * forward_flops(self.make, self.x.shape[1:])

    def moved(self) -> float:
        """Bytes at least: what is kept written and read, 7 accesses of each weight and its moments by AdamW."""
        return 2 * sum(self.kept()) + 7 * sum(x.nbytes for x in self.model.parameters())


class Forward(TrainStep):
    """Logits of one batch in eval mode."""

    title = "evaluation"

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.model.eval()

    def __call__(self) -> None:
        with torch.inference_mode(), self.autocast():
            self.called(self.x)

    def flops(self) -> float:
        return super().flops() / 3

    def moved(self) -> float:
        return self.x.nbytes + sum(x.nbytes for x in self.model.parameters())


def measure(job: type[TrainStep], device: str = "cpu", *, depth: int = 32, batch: int | None = None,
            seconds: float = 120.0, compiled: bool = False, names: Sequence[str] = ()) -> Iterator[dict]:
    """Rows with `case`, `name`, `ms`, `spread`, `ratio` to timm's ViT (of the time for an image; `paired`),
    `images_per_s`, `floor_ms`, and where it applies `note` (a smaller batch) or `failed`. batch: default 4 on a CPU,
    256 on a GPU, halved for a model that does not fit. compiled: with torch.compile (a minute each). names: default
    all, compiled timm's and ours."""
    batch = batch or (256 if device == "cuda" else 4)
    case = f"{'compiled ' if compiled else ''}{job.title}, {depth} blocks, {SIDE} px, batch {batch}"
    makers, steps, floors = contestants(depth), {}, {}
    for name in names or ((BASE, OURS) if compiled else makers):
        try:
            step = fitting(partial(job, makers[name], img_size=SIDE, device=device, compiled=compiled), batch)
            floors[name] = ceilings(device).floor_ms(step.flops(), step.moved())
            steps[name] = step
        except Exception as error:  # one contestant's failure is a row, and the others go on
            yield {"case": case, "name": name, "failed": reason(error)}
    times = interleaved(steps, device, seconds)
    yield from ({"case": case, **row} for row in left_out(steps, times))
    for name, taken in times.items():
        used = steps[name].batch
        compared = summary(taken, times.get(BASE), used / steps.get(BASE, steps[name]).batch)
        yield {"case": case, "name": name, **compared, "floor_ms": floors[name],
               "images_per_s": 1e3 * used / compared["ms"], **_note(used, batch)}


def _note(used: int, batch: int) -> dict[str, str]:
    return {} if used == batch else {"note": f"at batch {used}, {batch} does not fit"}


def imagenet(device: str = "cpu", *, depth: int | None = None, batch: int | None = None, seconds: float = 120.0,
             compiled: bool = False) -> Iterator[dict]:
    """Train steps at the paper's depths, with the `hours` of `recipe=imagenet` at that rate, never waiting for data."""
    for blocks in [depth] if depth else PAPER_DEPTHS:
        for row in measure(TrainStep, device, depth=blocks, batch=batch, seconds=seconds, compiled=compiled,
                           names=(BASE, OURS)):
            hours = {} if "failed" in row else {"hours": EPOCHS * IMAGENET / row["images_per_s"] / 3600}
            yield row | {"case": f"{EPOCHS} epochs of ImageNet, {row['case']}"} | hours


def growth(device: str = "cpu", *, depth: int = 64, batch: int | None = None, seconds: float = 15.0) -> Iterator[dict]:
    """How a train step grows with tokens and with depth (up to `depth`), ours beside timm's ViT: rows with `case`,
    `name`, `ms`, `spread`, `ratio`, `kept_mib`; or `failed`. batch: default 2, on a GPU 64; seconds: for each case."""
    batch = batch or (64 if device == "cuda" else 2)
    few = min(2, depth)
    cases = [(f"{tokens} tokens, {few} blocks", few, side) for tokens, side in GROWING_SIDES.items()]
    cases += [(f"{blocks} blocks, 65 tokens", blocks, 128) for blocks in GROWING_DEPTHS if blocks <= depth]
    for case, blocks, side in cases:
        makers = contestants(blocks, side)
        steps = {name: TrainStep(makers[name], batch, side, device) for name in (BASE, OURS)}
        times = interleaved(steps, device, seconds)
        yield from ({"case": case, **row} for row in left_out(steps, times))
        for name, taken in times.items():
            yield {"case": case, "name": name, **summary(taken, times.get(BASE)),
                   "kept_mib": sum(steps[name].kept()) / 2**20}


def memory(device: str = "cpu", *, depth: int = 32, batch: int | None = None) -> Iterator[dict]:
    """A train step's memory, each model in a fresh process: rows with `case`, `name`, `kept_mib` for backward,
    `maps_mib` (the part of it that is attention maps), `peak_mib` (over the process with its model), and the ratios of
    kept and peak to timm's for an image; `failed` or `note`."""
    batch = batch or (256 if device == "cuda" else 8)
    case, base = f"memory of a train step, {depth} blocks, {SIDE} px, batch {batch}", None
    for name in contestants(depth):
        try:
            row, used = apart(_memory_of, name, device, depth, batch)
        except Exception as error:  # one contestant's failure is a row, and the others go on
            yield {"case": case, "name": name, "failed": reason(error)}
            continue
        share = {field: mib / used for field, mib in row.items()}
        base = share if name == BASE else base
        ratios = {ratio: share[mib] / base[mib] for ratio, mib in RATIOS.items()} if base else {}
        yield {"case": case, "name": name, **row, **ratios, **_note(used, batch)}


def _memory_of(name: str, device: str, depth: int, batch: int) -> tuple[dict[str, float], int]:
    """MiB kept and needed, and the batch."""
    step = fitting(partial(TrainStep, contestants(depth)[name], img_size=SIDE, device=device), batch)
    step()
    peak, kept = peak_bytes(torch.device(device)) - step.idle, step.kept()
    heads, tokens = 12, (SIDE // 16) ** 2 + 1
    maps = step.batch * heads * tokens**2 * (2 if device == "cuda" else 4)  # bytes; all else a block keeps is smaller
    sizes = {"kept_mib": sum(kept), "maps_mib": sum(size for size in kept if size >= maps), "peak_mib": peak}
    return {name: size / 2**20 for name, size in sizes.items()}, step.batch
