"""Results of evaluations: one table, the worst classes, paired tests, and the files that are written of each."""

import csv
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deepvit.config.records import check_writable
from deepvit.data import ImageSet
from deepvit.engine.evaluate import Evaluation, mcnemar
from deepvit.engine.folder import plain, write_text_synced
from deepvit.errors import writing
from deepvit.report.published import IMAGENET_VAL
from deepvit.report.render import printed

OPTIONAL = {"top5": "top-5 %", "present_top1": "top-1 % among its classes", "uncalibrated_top1": "uncalibrated top-1 %",
            "real_top1": "ReaL top-1 %"}  # columns of the table where a result has them
Seen = tuple[Path, str, list[str] | None, Evaluation]  # checkpoint, fingerprint of its images, its classes
log = logging.getLogger(__name__)


def report(results: list[dict[str, Any]], seen: list[Seen]) -> None:
    """Prints all results: the table, and in sentences published figures, the worst classes and paired tests."""
    head = ["checkpoint", "weights", "data", "top-1 %", "95 % interval", "loss", "images", "images/s"]
    more = {name: text for name, text in OPTIONAL.items() if any(name in result for result in results)}
    rows = [[label(result["checkpoint"]), result["weights"], result["data"], f"{result['top1']:.2f}",
             f"{result['top1_low']:.2f} to {result['top1_high']:.2f}", f"{result['loss']:.4f}",
             f"{result['n']:,}", f"{result['eval_images_per_s']:.1f}",
             *(f"{result[name]:.2f}" if name in result else "" for name in more)] for result in results]
    log.info("\n%s", printed([*head, *more.values()], rows, markdown=True))
    for result in results:
        name, known = label(result["checkpoint"]), result["published"]
        if known:
            whole = result["data"] == "imagenet" and result["n"] == IMAGENET_VAL
            log.info("%s: %.2f %% is ours, measured here on %d images; %.2f %% is the authors' figure for %s (%s)%s.",
                     name, result["top1"], result["n"], known["top1"], known["model"], known["source"],
                     "" if whole else f", on all {IMAGENET_VAL:,} images: the two are not comparable")
        worst = [f"{row['class']} {row['top1']:.2f} % of {row['n']} (taken for {row['taken_for']} {row['times']} times)"
                 for row in result["worst_classes"] if row["times"]]
        if worst:
            log.info("%s on %s: worst classes: %s.", name, result["data"], "; ".join(worst))
    compare(seen)


def ablation_table(found: list[dict[str, Any]], whole_top1: float) -> str:
    rows = [[one["form"], f"{one['top1']:.2f}", f"{one['top1'] - whole_top1:+.2f}", f"{one['loss']:.4f}",
             str(one["only_first"]), str(one["only_second"]), f"{one['p']:.3g}"] for one in found]
    return printed(["form", "top-1 %", "difference", "loss", "only whole right", "only this right", "McNemar p"], rows,
                   markdown=True)


def label(path: str | Path) -> str:
    """A run's best checkpoint goes by the name of its folder."""
    return str(path).removesuffix("/checkpoints/best.pt")


def compare(seen: list[Seen]) -> None:
    """Each checkpoint against the first of those that saw the same images of the same classes."""
    for path, images, classes, other in seen:
        first_path, _, _, first = next(one for one in seen if one[1:3] == (images, classes))
        if first_path == path:
            continue
        test = mcnemar(first.correct, other.correct)
        log.info("%s against %s on the same %d images: only the first is right on %d, only the second on %d; exact "
                 "McNemar p = %.3g.", label(first_path), label(path), first.n, *test.values())


def write(folder: Path, images: ImageSet, evaluation: Evaluation, result: Mapping[str, Any], names: list[str]) -> None:
    """metrics.json, the prediction for every image, and the accuracy of every class; `names`: in the logits' order."""
    with results_in(folder):
        write_text_synced(folder / "metrics.json", json.dumps(plain(result), indent=1) + "\n")
        predicted = zip(evaluation.targets, evaluation.predictions[:, 0], evaluation.confidences, strict=True)
        _write_csv(folder / "predictions.csv", ["image", "target", "prediction", "confidence"],
                   ([images.name(index), names[target], names[guess] if guess >= 0 else "", f"{confidence:.6f}"]
                    for index, (target, guess, confidence) in enumerate(predicted)))
        _write_csv(folder / "classes.csv", ["class", "images", "top1", "taken_for", "times"],
                   ([row["class"], row["n"], f"{row['top1']:.2f}", row["taken_for"], row["times"]]
                    for row in by_class(evaluation, names)))
    log.info("Results, the prediction for every image and the accuracy of every class: %s", folder)


def _write_csv(path: Path, head: list[str], rows: Iterable[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([head, *rows])


def check_place(folder: Path) -> None:
    """UserError where results could not be written to `folder`; leaves nothing behind."""
    with writing("The results", folder, "give out=FOLDER"):
        check_writable(folder)


@contextmanager
def results_in(folder: Path) -> Iterator[None]:
    """Makes the folder; UserError where it, or what is written inside, cannot be."""
    with writing("The results", folder, "give out=FOLDER"):
        folder.mkdir(parents=True, exist_ok=True)
        yield


def by_class(evaluation: Evaluation, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each class that has images, worst first: their number, its top-1 in percent, and what it is taken for most."""
    rows = []
    for target in np.unique(evaluation.targets):
        guesses = evaluation.predictions[evaluation.targets == target, 0]
        others, times = np.unique(guesses[(guesses != target) & (guesses >= 0)], return_counts=True)
        rows.append({"class": names[target], "n": len(guesses), "top1": 100 * float((guesses == target).mean()),
                     "taken_for": names[others[times.argmax()]] if len(others) else "",
                     "times": int(times.max(initial=0))})
    return sorted(rows, key=lambda row: row["top1"])
