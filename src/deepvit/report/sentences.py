"""What a table shows and what it does not, and the recipe its cells share."""

from collections import Counter
from collections.abc import Sequence

from deepvit.report.grid import Grid
from deepvit.report.runs import flat, without_paths
from deepvit.report.tables import of_result, over_seeds

RECIPE = {  # what a reader asks for first, and how it is said
    "model.embed_dim": "width {}", "model.num_heads": "{} heads", "model.mlp_ratio": "MLP x {:g}",
    "model.img_size": "images of {} pixels", "model.patch_size": "patches of {}", "model.stem": "{} stem",
    "model.reattention_blocks": "the attention in blocks {}", "model.drop_path_rate": "drop path {:g}",
    "data.fraction": "{:.0%} of the training images", "data.batch_size": "batches of {}",
    "schedule.epochs": "{:g} epochs", "schedule.steps": "{:,} steps", "schedule.kind": "{} schedule",
    "optimizer.opt": "{}", "optimizer.lr": "learning rate {:g}", "optimizer.weight_decay": "weight decay {:g}",
    "augment": "augmentation {}", "precision": "precision {}", "ema.decay": "weights averaged over {:g}",
    "loss.cosine_blocks": "cosine regularisation of {} pairs of maps", "init": "started from {}"}


def summary(grids: Sequence[Grid]) -> str:
    """How many runs there are and how they went; of one experiment also its best cell."""
    runs = [run for grid in grids for run in grid.planned]
    states = Counter(run.state.split(" (")[0] for run in runs)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    told = f"{len(runs)} run{'s' * (len(runs) != 1)} ({counts})"
    if len(grids) > 1:
        return f"{told} in {len(grids)} experiments, each with tables of its own: their numbers do not compare."
    means = [(found.mean, cell) for cell in grids[0].cells if (found := over_seeds(cell, of_result("top1")))]
    if not means:
        return f"{told}."
    highest, cell = max(means, key=lambda one: one[0])
    where = ", ".join([cell.attention, f"{cell.depth} blocks", *cell.details(grids[0])])
    return f"{told}. The highest top-1 is {highest:.2f} %: {where}."


def revisions(grids: Sequence[Grid]) -> str:
    """Of the code that made the runs."""
    named = dict.fromkeys(run.result.get("git") or "unknown" for grid in grids for run in grid.runs if run.finished)
    return f"The runs are of revision {', '.join(named)}." if named else ""


def shared_recipe(grid: Grid) -> str:
    """The settings that all cells have in common."""
    known = dict(flat(grid.shared))
    said = [phrase.format(known[name]) for name, phrase in RECIPE.items() if known.get(name)]
    said += [f"{name}={value}" for name, value in known.items() if name.split(".")[0] in known and "." in name]
    seeds = f"seed{'s' * (len(grid.seeds) > 1)} {', '.join(map(str, grid.seeds))}"
    return without_paths(f"All cells share: {', '.join(said)}; {seeds}.")


def limits(grid: Grid) -> str:
    """What the tables do not show."""
    told = ["digits of 8 x 8 pixels, a small width and a short training are not ImageNet"] * (grid.data == "digits")
    if len(grid.seeds) == 1:
        counts = {run.result["n"] for run in grid.runs if "n" in run.result}
        sample = f" ({counts.pop()} test images)" if len(counts) == 1 else ""
        told.append(f"one seed, so differences within the 95 % bounds may be chance{sample}")
    told.append("similarity alone is no merit: the norm over heads lowers it by construction, as norm_only shows")
    return f"Limits: {'; '.join(told)}."
