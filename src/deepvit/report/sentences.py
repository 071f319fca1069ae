"""What a table shows and what it does not, and the recipe its cells share."""

from deepvit.report.grid import Grid
from deepvit.report.runs import flat

RECIPE = ("model.embed_dim", "model.num_heads", "model.mlp_ratio", "model.img_size", "model.patch_size", "model.stem",
          "model.drop_path_rate", "data.fraction", "data.batch_size", "schedule.epochs", "schedule.steps",
          "schedule.kind", "optimizer.opt", "optimizer.lr", "optimizer.weight_decay", "augment", "precision",
          "ema.decay", "loss.cosine_blocks", "init")


def shared_recipe(grid: Grid) -> str:
    """The settings that all cells have in common, those that a reader asks for first."""
    known = dict(flat(grid.shared))
    listed = ", ".join(f"{name.split('.')[-1]} {known[name]}" for name in RECIPE if known.get(name) is not None)
    return f"All cells share: {listed}."


def reading(grid: Grid) -> list[str]:
    """Two lines: what the table shows, and what it does not."""
    axes = ", ".join(["depth"] * (len(grid.depths) > 1) + ["attention"] + list(grid.extras))
    shows = (f"It shows: how accuracy and the similarity of adjacent blocks' attention go with {axes}, under one "
             f"recipe, each similarity beside its value at initialisation.")
    limits = ["similarity alone is no merit: the norm over heads lowers it by construction, as norm_only shows"]
    if len(grid.seeds) == 1:
        limits.insert(0, f"one seed, so differences within the 95 % bounds may be chance{_sample(grid)}")
    if grid.data == "digits":
        limits.insert(0, "digits of 8 x 8 pixels, a small width and a short training are not ImageNet")
    return [shows, f"It does not show more: {'; '.join(limits)}."]


def _sample(grid: Grid) -> str:
    counts = {run.result["n"] for run in grid.runs if "n" in run.result}
    return f" ({counts.pop()} test pictures)" if len(counts) == 1 else ""
