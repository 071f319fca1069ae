"""What the figures are to be, and whether they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OURS, OP, LOADER = "deepvit, re-attention", "re-attention, ours", "deepvit, torchvision"
FROM_INDEX = "1,281,167 names from the index"
BOTH_WAYS = "forward + backward, N="


@dataclass(frozen=True)
class Target:
    """A bound on one `field` of the row `name` of a bench's cases that begin with `case`."""

    what: str
    bench: str
    case: str
    name: str
    field: str
    bound: float
    at_most: bool = True

    def found(self, results: Mapping[str, list[dict[str, Any]]]) -> float | None:
        """The last such row's, so what was measured again counts."""
        return next((row[self.field] for row in reversed(results.get(self.bench) or [])
                     if row["case"].startswith(self.case) and row["name"] == self.name and self.field in row), None)

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


EVERYWHERE = [
    Target("evaluation against timm's ViT", "eval", "evaluation", OURS, "ratio", 1.08),
    Target("bytes kept for backward, likewise", "memory", "memory", OURS, "kept_ratio", 1.08),
    Target("peak memory of a train step, likewise", "memory", "memory", OURS, "ratio", 1.20),
    Target("op under bf16, relative error", "precision", "op", OP, "error", 0.005),
    Target("loader, decode + crop + flip, against timm's", "loader", "decode", LOADER, "ratio", 1.6, at_most=False),
    Target("... mean difference to PIL, of 255", "loader", "decode", LOADER, "difference", 0.05),
    Target("loader, full recipe", "loader", "full recipe", LOADER, "ratio", 1.3, at_most=False),
    Target("1.28 M images from the index, ms", "listing", "listing", FROM_INDEX, "ms", 1000),
    Target("... memory of a node with 8 ranks, MB", "listing", "listing", FROM_INDEX, "mb_node", 60),
    Target("train.py --help, ms", "startup", "start-up", "train.py --help", "ms", 1000),
    Target("train.py --cfg job, ms", "startup", "start-up", "train.py --cfg job", "ms", 1000),
]
TARGETS = {
    "cpu": [
        Target("train step against timm's ViT", "train-step", "train step", OURS, "ratio", 1.08),
        Target("op, forward + backward, N=197, against SDPA", "attention", f"{BOTH_WAYS}197", OP, "ratio", 1.5),
        Target("op, forward + backward, N=577, against SDPA", "attention", f"{BOTH_WAYS}577", OP, "ratio", 1.5),
        *EVERYWHERE],
    "cuda": [
        Target("train step against timm's ViT", "train-step", "train step", OURS, "ratio", 1.25),
        Target("... both compiled", "train-step", "compiled train step", OURS, "ratio", 1.25),
        Target("op, forward + backward, N=197, against flash SDPA", "attention", f"{BOTH_WAYS}197", OP, "ratio", 1.8),
        Target("op, forward + backward, N=577, against flash SDPA", "attention", f"{BOTH_WAYS}577", OP, "ratio", 1.8),
        Target("MiB kept of attention maps", "memory", "memory", OURS, "maps_mib", 0),
        Target("small model, images/s", "small", "", OURS, "images_per_s", 25_000, at_most=False),
        Target("... share of the time waiting for data", "small", "", OURS, "data_wait", 0.05),
        *EVERYWHERE],
}


def against_targets(results: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """A row for each target that the results (bench -> rows) tell something about."""
    return [{"what": target.what, "target": f"{'<=' if target.at_most else '>='} {target.bound:g}", "here": value,
             "met": "yes" if target.is_met(value) else "no"}
            for target in TARGETS[device] if (value := target.found(results)) is not None]
