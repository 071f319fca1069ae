"""Trains one model by timm's own train.py and by ours, on the same images with the same settings, and compares them.

    python tests/parity.py TIMM_TRAIN.PY CIFAR10 --out docs/results/parity/plain

TIMM_TRAIN.PY is the training script of a checkout of huggingface/pytorch-image-models (not part of timm's package and
none of ours: give its path); CIFAR10 a folder of JPEGs, {train,test}/<class>/. The whole published augmentation is on:
RandAugment, mixup, cutmix, erasing, smoothing, stochastic depth, warm-up, cosine. The model is ours in both, by timm's
registry; timm's script runs with one change, without which Pillow 13 refuses what its RandAugment asks (0 bits).

docs/results/parity.md has the commands of its contests, each hours of two cores; --device cuda takes a GPU.

In miniature, in two minutes: ... --seeds 2 --epochs 1 --train 20 --test 10 --depth 2 --width 48

Rows go to OUT/rows.jsonl as they are made, and the same command goes on from them; the table to OUT/table.md and all
curves, laid over each other, to OUT/curves.png. The margin (--margin, in points of top-1) is to be fixed before the
runs: the trainers are called equivalent where the 90 % interval of the difference of means lies within it (two
one-sided t-tests of Welch at 5 %).
The rate of update k is timm's of update k + 1 (theirs starts at the schedule's 0, ours at its 1), and orders of images
and draws of the augmentation are each trainer's own; all else is the same.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from deepvit.models import attention_config
from deepvit.report.statistics import equivalence

ROOT = Path(__file__).resolve().parents[1]
RECIPE = {"weight_decay": 0.05, "warmup_lr": 1e-6, "min_lr": 1e-5}
THEIRS = """
import sys, runpy
import deepvit  # registers the models
from PIL import Image
from timm.data import auto_augment
posterize = auto_augment.posterize
for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[name] = lambda image, bits, **_: (
        posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Of two means: itself, its standard error, and Welch's degrees of freedom. Each sample has two values or more."""
    a, b = (np.asarray(values, float) for values in (first, second))
    parts = [values.var(ddof=1) / len(values) for values in (a, b)]
    scale = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    return float(a.mean() - b.mean()), float(np.sqrt(sum(parts))), sum(parts) ** 2 / scale if scale else 1.0


def subset(source: Path, folder: Path, counts: dict[str, int | None]) -> None:
    """The first images of each class, by name, as links: both trainers read the same folder."""
    for split, count in counts.items():
        for images in sorted((source / split).iterdir()):
            (folder / split / images.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(images.iterdir())[:count]:
                link = folder / split / images.name / image.name
                if not link.is_symlink():
                    link.symlink_to(image.resolve())


def model_settings(given: argparse.Namespace) -> dict[str, Any]:
    stem = {"stem": {"name": given.stem, "norm_batch": given.batch // 4}} if given.stem == "conv" else {}
    return {"img_size": 32, "patch_size": 4, "depth": given.depth, "embed_dim": given.width, "num_heads": given.heads,
            **stem}


def norm_batch(given: argparse.Namespace) -> dict[str, int]:
    """How many images share an attention's batch statistics, if it has any: a divisor of the batch."""
    return {"norm_batch": given.batch // 4} if "norm_batch" in attention_config(given.attention) else {}


def by_timm(given: argparse.Namespace, data: Path, seed: int) -> dict[str, Any]:
    attention = attention_config(given.attention) | norm_batch(given)
    keywords = [f"{name}={value}" for name, value in {**model_settings(given), "attention": attention}.items()]
    augment = (["--no-aug", "--smoothing", "0"] if given.no_augment else [
        "--aa", "rand-m9-mstd0.5-inc1", "--mixup", "0.8", "--cutmix", "1.0", "--reprob", "0.25", "--smoothing", "0.1",
        "--drop-path", str(given.drop_path), "--train-interpolation", "random"])
    out = given.out / "runs" / "timm"
    shutil.rmtree(out / f"seed-{seed}", ignore_errors=True)  # one that was cut short
    seconds = run(given, [sys.executable, "-c", THEIRS, str(given.timm), "--data-dir", str(data), "--train-split",
                          "train", "--val-split", "test", "--model", "vit", "--model-kwargs", *keywords,
                          "--num-classes", str(given.classes), "--input-size", "3", "32", "32", "--crop-pct", "1.0",
                          "--interpolation", "bicubic", "--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5",
                          "--opt", given.opt, "--lr", str(given.lr), "--weight-decay", str(RECIPE["weight_decay"]),
                          "--sched", "cosine", "--sched-on-updates", "--epochs", str(given.epochs),
                          "--warmup-epochs", str(given.warmup), "--warmup-lr", str(RECIPE["warmup_lr"]),
                          "--min-lr", str(RECIPE["min_lr"]), "-b", str(given.batch), "-j", str(given.workers),
                          *(["--amp", "--amp-dtype", "bfloat16"] if given.bf16 else []),
                          "--device", given.device, "--seed", str(seed), "--output", str(out),
                          "--experiment", f"seed-{seed}", "--checkpoint-hist", "1", *augment], out / f"{seed}.log")
    with (out / f"seed-{seed}" / "summary.csv").open() as file:
        lines = list(csv.DictReader(file))
    return {"cpu_s": seconds, "curve": [[float(line[name]) for name in ("train_loss", "eval_loss", "eval_top1")]
                                        for line in lines]}


def by_us(given: argparse.Namespace, data: Path, seed: int) -> dict[str, Any]:
    kind, drop_path = ("none", 0.0) if given.no_augment else ("deepvit", given.drop_path)
    folder = given.out / "runs" / "ours" / f"seed-{seed}"
    # Hydra wants keys without quotes
    model = [f"model.{name}={value}".replace("'", "") for name, value in model_settings(given).items()]
    precision = "bf16" if given.bf16 else "tf32" if given.device == "cuda" else "fp32"  # as timm's with --amp, without
    shutil.rmtree(folder, ignore_errors=True)
    seconds = run(given, [sys.executable, str(ROOT / "train.py"), "recipe=folder", "model=vit",
                          f"model/attention={given.attention}", f"data.root={data}", "data.crop_pct=1.0",
                          *model, *(f"model.attention.{name}={value}" for name, value in norm_batch(given).items()),
                          f"augment={kind}", f"model.drop_path_rate={drop_path}",
                          *(f"schedule.{name}={RECIPE[name]}" for name in ("warmup_lr", "min_lr")),
                          f"optimizer.opt={given.opt}", f"optimizer.lr={given.lr}",
                          f"optimizer.weight_decay={RECIPE['weight_decay']}",
                          f"schedule.epochs={given.epochs}", f"schedule.warmup_epochs={given.warmup}",
                          "schedule.decay_from=start", f"data.batch_size={given.batch}",
                          f"data.workers={given.workers}", "data.decoder=pil", "engine.device_batch=null",
                          f"precision={precision}",
                          "engine.log_every=1", "probe.images=0", f"engine.accelerator={given.device}", f"seed={seed}",
                          f"hydra.run.dir={folder}"], folder.with_suffix(".log"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve, losses = [], []
    for line in lines:
        if "top1" in line:
            curve.append([float(np.mean(losses)), line["loss"], line["top1"]])
            losses = []
        elif "loss" in line:
            losses.append(line["loss"])
    return {"cpu_s": seconds, "curve": curve}


TRAINERS = {"timm": by_timm, "ours": by_us}


def run(given: argparse.Namespace, command: list[str], log: Path) -> float:
    """CPU seconds that the command took with its children; what it says goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                   env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(given.threads)})
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:3])[:80]} ... ended with {os.waitstatus_to_exitcode(status)}; "
                         f"its last words are in {log}.")
    return round(used.ru_utime + used.ru_stime, 1)


def table(rows: Sequence[dict[str, Any]], margin: float) -> str:
    """Means, spreads and the test as markdown; then each seed."""
    lines = ["| | timm's train.py | ours | difference (90 %) | p of a difference of the margin |",
             "|:--|--:|--:|--:|--:|"]
    for title, place, digits, bound in (("top-1 %", 2, 2, margin), ("loss, evaluated", 1, 3, None),
                                        ("loss, training", 0, 3, None), ("CPU seconds", None, 0, None)):
        theirs, ours = ([row["cpu_s"] if place is None else row["curve"][-1][place] for row in rows
                         if row["trainer"] == name] for name in TRAINERS)
        if min(len(theirs), len(ours)) < 2:
            return "Two seeds of each trainer are needed for a table."
        mean, error, freedom = difference(ours, theirs)
        shown = round(mean, digits) + 0.0  # no minus before a zero
        found = equivalence(mean, error, freedom, bound or 0.0)
        lines.append(f"| {title} | {_spread(theirs, digits)} | {_spread(ours, digits)} | "
                     f"{shown:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f}) | "
                     f"{f'{found.p:.3g} (margin {bound:g})' if bound else ''} |")
        if place == 2:
            verdict = "lies" if found.p < 0.05 else "does not lie"
    lines += ["", f"The 90 % interval of the difference in top-1 {verdict} within the margin ({margin:g}).", "",
              "| seed | trainer | top-1 % by epoch | training loss by epoch |", "|--:|:--|:--|:--|"]
    for row in sorted(rows, key=lambda row: (row["seed"], row["trainer"])):
        step = max(1, len(row["curve"]) // 8)
        shown = row["curve"][step - 1::step]
        lines.append(f"| {row['seed']} | {row['trainer']} | {' '.join(f'{one[2]:.1f}' for one in shown)} | "
                     f"{' '.join(f'{one[0]:.3f}' for one in shown)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A line for each seed of each trainer, by epoch."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, (title, place) in zip(figure.subplots(1, 3), (
            ("training loss", 0), ("loss, evaluated", 1), ("top-1 (%)", 2)), strict=True):
        for name, colour, style in (("timm", "#0072B2", "-"), ("ours", "#D55E00", "--")):
            for number, row in enumerate(row for row in rows if row["trainer"] == name):
                label = {"timm": "timm's train.py", "ours": "ours"}[name] if number == 0 else None
                values = [one[place] for one in row["curve"]]
                axes.plot(range(1, len(values) + 1), values, style, color=colour, alpha=0.7, linewidth=1.2, label=label)
        axes.set(title=title, xlabel="epoch", xticks=range(1, len(values) + 1, max(1, len(values) // 8)))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f} (n = {len(values)})"


def main() -> None:
    given = _arguments()
    data, done = given.out / "data", given.out / "rows.jsonl"
    subset(given.cifar10, data, {"train": given.train, "test": given.test})
    given.classes = len(list((data / "train").iterdir()))
    settings = {name: value for name, value in sorted(vars(given).items())
                if name not in ("timm", "cifar10", "out", "seeds", "workers", "threads", "jobs")}
    rows = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    former = {"stem": "patch", "bf16": False, "drop_path": 0.2}  # of rows from before these were options
    if any({**former, **row["settings"]} != settings for row in rows):
        sys.exit(f"{done} holds rows of other settings: choose another --out.")
    missing = [(seed, name) for seed in range(given.seeds) for name in TRAINERS
               if not any((row["trainer"], row["seed"]) == (name, seed) for row in rows)]
    with ThreadPoolExecutor(given.jobs) as pool:
        for (seed, name), found in zip(missing, pool.map(lambda one: TRAINERS[one[1]](given, data, one[0]), missing),
                                       strict=True):
            rows.append({"trainer": name, "seed": seed, **found, "settings": settings})
            with done.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"seed {seed}  {name:5} top-1 {found['curve'][-1][2]:.2f} %  {found['cpu_s']:.0f} CPU s", flush=True)
    (given.out / "table.md").write_text(table(rows, given.margin))
    draw(rows, given.out / "curves.png")
    print((given.out / "table.md").read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("timm", type=Path, help="timm's train.py")
    parser.add_argument("cifar10", type=Path, help="folder with {train,test}/<class>/*.jpg")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--warmup", type=int, default=None, help="epochs (default: a tenth)")
    parser.add_argument("--margin", type=float, default=1.0, help="points of top-1 that make no difference")
    parser.add_argument("--train", type=int, default=None, help="images of a class (default: all)")
    parser.add_argument("--test", type=int, default=None)
    parser.add_argument("--attention", default="self")
    parser.add_argument("--stem", default="patch", choices=("patch", "conv"))
    parser.add_argument("--bf16", action="store_true", help="autocast in both")
    parser.add_argument("--opt", default="adamw", help="any of timm's: muon reaches 70 %% several times sooner")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--drop-path", type=float, default=0.2)
    parser.add_argument("--no-augment", action="store_true")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch", type=int, default=100, help="a divisor of the training set: timm drops what is left")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    given.warmup = max(1, given.epochs // 10) if given.warmup is None and given.epochs > 1 else given.warmup or 0
    given.out = given.out.resolve()
    return given


if __name__ == "__main__":
    main()
