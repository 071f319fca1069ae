"""Checkpoints of any dialect on any data: exact numbers, one table, what was predicted for each picture."""

import csv
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import ImageNetInfo

from deepvit.config.provenance import versions
from deepvit.config.settings import Data, read_evaluation, read_group
from deepvit.data import ImageSet, eval_folder, resolve_decoder, source_of
from deepvit.data.real_labels import real_top1
from deepvit.engine.checkpoint import write_text_synced
from deepvit.engine.device import device_name, prepare_device
from deepvit.engine.evaluate import Evaluation, evaluate, mcnemar
from deepvit.engine.folder import RunFolder
from deepvit.engine.progress import Display
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.engine.step import Precision
from deepvit.errors import UserError
from deepvit.importers import load_model
from deepvit.importers.files import find_checkpoint, takes_average
from deepvit.importers.settings import checked
from deepvit.models import ViT
from deepvit.models.cost import count_flops, count_parameters
from deepvit.report.published import IMAGENET_VAL, published_of, sources
from deepvit.report.render import printed
from deepvit.report.runs import flat
from deepvit.run import build
from deepvit.run.calibration import calibration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, and what its file says of its origin."""

    path: Path
    model: ViT
    weights: str  # "raw" or "ema"
    classes: list[str] | None  # class ids in the order of the logits
    data: Mapping[str, Any] | None  # the settings of the data it was trained on
    said: Mapping[str, Any]


def evaluate_all(config: Mapping[str, Any], ranks: Ranks, stop: StopRequest) -> list[dict[str, Any]] | None:
    """Evaluates every checkpoint that `config` names; prints one table; writes metrics.json and predictions.csv each.

    Returns:
        the results; None if it was asked to stop before all were there.
    Raises:
        UserError: no checkpoint, an unreadable one, data that do not fit a model's classes.
    """
    with ranks.together():
        asked = read_evaluation(config)
        paths, precision = checkpoints(asked.checkpoint), build.precision(asked.precision, ranks.device)
    prepare_device(precision, ranks, asked.engine.threads, asked.engine.deterministic)
    results, seen, refusals = [], [], []
    for path in paths:
        try:
            candidate, data, images, train = _open(path, config, ranks)
        except UserError as error:  # the others are evaluated all the same
            refusals.append(str(error))
            continue
        evaluation = _run(candidate, data, images, config["calibrate"], train, ranks, precision, stop)
        if evaluation is None:
            return None
        result = _result(candidate, data, images, evaluation, config, ranks)
        results.append(result)
        seen.append((path, images.fingerprint(), candidate.classes, evaluation))
        if ranks.is_main:
            _write(candidate, data, images, evaluation, result, config["out"])
    if ranks.is_main and results:
        log.info("\n%s", table(results))
        for result in results:
            _say_published(result)
        _compare(seen)
    if refusals:
        raise UserError("\n".join(refusals))
    return results


def _open(path: Path, config: Mapping[str, Any], ranks: Ranks) -> tuple[Candidate, Data, ImageSet, ImageSet | None]:
    """What would be refused after a long evaluation is refused before it, on all ranks alike.

    Returns:
        the model, its data, the images to evaluate, and those of the training set if the model is calibrated on them.
    """
    with ranks.together():
        candidate = load(path, config)
        data = data_settings(candidate, config)
        images = val_images(candidate, data)
        _check_wishes(candidate, data, images, config, ranks)
        return candidate, data, images, _train_images(data) if config["calibrate"] else None


def _train_images(data: Data) -> ImageSet:
    try:
        return build.splits(data).train
    except UserError as error:
        raise UserError(f"calibrate= needs the training images. {error}") from None


def _check_wishes(candidate: Candidate, data: Data, images: ImageSet, config: Mapping[str, Any], ranks: Ranks) -> None:
    if config["labels"] == "real":
        names = [images.name(index) for index in range(len(images))]
        real_top1(np.zeros(len(names), int), names)
    if ranks.is_main:
        folder = _out(candidate, data, config["out"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"The results cannot be written to {folder} ({error.strerror}): give out=FOLDER.")


def checkpoints(given: str | list[str] | None) -> list[Path]:
    """The files named, or every best checkpoint under runs/."""
    if given is None:
        found = sorted(Path(folder, "best.pt") for folder, _, files in os.walk("runs", onerror=_say_left_out)
                       if Path(folder).name == "checkpoints" and "best.pt" in files)
        if not found:
            raise UserError("There is no checkpoint under runs/ here: train first, or give checkpoint=PATH.")
        return found
    paths = [find_checkpoint(one)[0] for one in ([given] if isinstance(given, str) else given)]
    for path in paths:
        if not path.exists():
            raise UserError(f"There is no checkpoint at {path}.")
    return paths


def _say_left_out(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        log.warning("%s cannot be read (%s): what lies there is not evaluated.", error.filename, error.strerror)


def load(path: Path, config: Mapping[str, Any]) -> Candidate:
    keywords = checked({name: value for name, value in config["model"].items() if value is not None})
    model = load_model(path, dialect=config["dialect"], ema=takes_average(path, config["weights"]), **keywords)
    said = model.load_report.said
    run = said.get("run")
    return Candidate(path, model, model.load_report.weights, said.get("classes"), run and run["data"], said)


def data_settings(candidate: Candidate, config: Mapping[str, Any]) -> Data:
    """The data asked for; where that is left open, the run's own. The picture size is the model's."""
    asked = {name: value for name, value in config["data"].items() if value is not None}
    trained_on = dict(candidate.data or {})
    if "source" not in asked and not trained_on:
        raise UserError(f"{candidate.path} does not tell what it was trained on: add data=imagenet data.root=..., "
                        f"or another data=.")
    merged = asked if "source" in asked else {**trained_on, **asked}
    everything = {**_NEUTRAL, **merged, "img_size": list(candidate.model.img_size)}
    return read_group("data", everything)


_NEUTRAL = {"root": None, "fraction": 1.0, "classes": None, "val_fraction": None}  # null means the same in every source


def val_images(candidate: Candidate, data: Data) -> ImageSet:
    """The pictures to evaluate, their targets as indices of the model's logits.

    Folders of classes need no training set here and may lack classes (ImageNet's subsets, -V2, -A, -R): classes are
    found by name among the model's, by wnid for a model of ImageNet's 1000.

    Raises:
        UserError: classes that the model does not know, or another number of them where it does not tell their names.
    """
    if candidate.model.pool == "":
        raise UserError(f"{candidate.path} has no pooling (pool=''), so its logits are of tokens, not of images: "
                        f"give +model.pool=cls, mean or avg.")
    count, known = candidate.model.num_classes, candidate.classes
    if known is None and count == 1000:
        known = ImageNetInfo().label_names()
    source = source_of(data)
    if known and source.has_class_folders and data.root and data.classes is data.val_fraction is None:
        images = eval_folder(data.root, known, decoder=data.decoder, in_memory_mb=data.in_memory_mb,
                             exclude=data.exclude)
        present = len(np.unique(images.targets))
        if present < count:
            log.info("%s has pictures of %d of the %d classes; predictions are among all %d (published figures of "
                     "ImageNet-A and -R choose among their 200).", data.root, present, count, count)
        return images
    splits = source.splits()
    if splits.class_ids == known:
        return splits.val
    if known is None and len(splits.class_ids) == count:
        if splits.class_ids != sorted(splits.class_ids):
            log.warning("%s does not name its classes; they are taken in the order %s, ... (torchvision's ImageFolder "
                        "would sort these names as text).", candidate.path, ", ".join(splits.class_ids[:3]))
        return splits.val
    if known is None:
        raise UserError(f"{candidate.path} has {count} classes, the data has {len(splits.class_ids)}: evaluate it on "
                        f"data with its classes.")
    missing = [name for name in splits.class_ids if name not in set(known)]
    if missing:
        raise UserError(f"The data has {len(missing)} classes that {candidate.path} does not know, such as "
                        f"'{missing[0]}': evaluate it on data with its {count} classes.")
    images = splits.val.take(np.arange(len(splits.val)))
    images.targets = np.array([known.index(name) for name in splits.class_ids])[images.targets]
    return images


def _run(candidate: Candidate, data: Data, images: ImageSet, calibrate: int, train: ImageSet | None, ranks: Ranks,
         precision: Precision, stop: StopRequest) -> Evaluation | None:
    model = candidate.model.to(ranks.device)
    prepare, batches = build.prepare(data, model.num_classes), build.eval_batches(data, images, ranks)
    calibrated = calibration(calibrate, data, train, model.norm_batches, prepare, ranks, precision,
                             stop)
    with Display(ranks.is_main) as display:
        def once() -> Evaluation | None:
            bar = display.bar(candidate.path.name, len(images))
            return evaluate(model, batches(), prepare, ranks, precision, n=len(images), advance=bar.advance,
                            should_stop=lambda: ranks.any_asked_to_stop(bool(stop)))

        return calibrated(model, once)


def _result(candidate: Candidate, data: Data, images: ImageSet, evaluation: Evaluation, config: Mapping[str, Any],
            ranks: Ranks) -> dict[str, Any]:
    real = {}
    if config["labels"] == "real":
        names = [images.name(index) for index in evaluation.indices]
        real = {"real_top1": real_top1(evaluation.predictions[:, 0], names)}
    model = candidate.model
    return {"checkpoint": str(candidate.path), "weights": candidate.weights, "calibrate": config["calibrate"],
            **evaluation.summary(), **real,
            "data": data.source, "root": data.root, "decoder": resolve_decoder(data.decoder),
            "img_size": list(model.img_size), "params": count_parameters(model), "flops": count_flops(model),
            "depth": model.depth, "dialect": model.load_report.dialect, "step": candidate.said.get("step"),
            "arch": candidate.said.get("arch"), "published": _published(candidate, data),
            "device": device_name(ranks.device), "devices": ranks.world, **versions()}


def _published(candidate: Candidate, data: Data) -> dict[str, Any] | None:
    """The published figure for this model on this data, where there is one; none for weights that were trained here."""
    if candidate.model.load_report.dialect == "ours":
        return None
    settings = flat({"model": candidate.model.config, "data": vars(data)})
    found = published_of({name: value[0] if name == "model.img_size" and isinstance(value, list) else value
                          for name, value in settings})
    return {"model": found[0].model, "top1": found[0].top1, "source": sources()[found[0].source]} if found else None


def _say_published(result: Mapping[str, Any]) -> None:
    known = result["published"]
    if known is None:
        return
    whole = result["data"] == "imagenet" and result["n"] == IMAGENET_VAL
    log.info("%s: %.2f %% is ours, measured here on %d pictures; %.2f %% is the authors' figure for %s (%s)%s.",
             label(result["checkpoint"]), result["top1"], result["n"], known["top1"], known["model"], known["source"],
             "" if whole else f", on all {IMAGENET_VAL:,} pictures: the two are not comparable")


def table(results: list[dict[str, Any]]) -> str:
    """The results as a markdown table."""
    head = ["checkpoint", "weights", "data", "top-1 %", "95 % interval", "top-5 %", "loss", "pictures", "images/s"]
    more = {"uncalibrated_top1": "uncalibrated top-1 %", "real_top1": "ReaL top-1 %"}
    more = {name: text for name, text in more.items() if any(name in result for result in results)}
    rows = [[label(result["checkpoint"]), result["weights"], result["data"], f"{result['top1']:.2f}",
             f"{result['top1_low']:.2f} to {result['top1_high']:.2f}", f"{result['top5']:.2f}", f"{result['loss']:.4f}",
             f"{result['n']:,}", f"{result['eval_images_per_s']:.1f}",
             *(f"{result.get(name, float('nan')):.2f}" for name in more)] for result in results]
    return printed([*head, *more.values()], rows, markdown=True)


def label(path: str | Path) -> str:
    """A run's best checkpoint goes by the name of its folder."""
    return str(path).removesuffix("/checkpoints/best.pt")


def _compare(seen: list[tuple[Path, str, list[str] | None, Evaluation]]) -> None:
    """Each checkpoint against the first of those that saw the same pictures of the same classes."""
    for path, pictures, classes, other in seen:
        first_path, _, _, first = next(one for one in seen if one[1:3] == (pictures, classes))
        if first is other:
            continue
        test = mcnemar(first.correct, other.correct)
        log.info("%s against %s on the same %d pictures: only the first is right on %d, only the second on %d; exact "
                 "McNemar p = %.3g.", label(first_path), label(path), first.n, test["only_first"],
                 test["only_second"], test["p"])


def _write(candidate: Candidate, data: Data, images: ImageSet, evaluation: Evaluation, result: Mapping[str, Any],
           out: str | None) -> None:
    folder = _out(candidate, data, out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_synced(folder / "metrics.json", json.dumps(result, indent=1) + "\n")
        with (folder / "predictions.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["picture", "target", "prediction", "confidence"])
            for row in zip(evaluation.indices, evaluation.targets, evaluation.predictions[:, 0],
                           evaluation.confidences, strict=True):
                writer.writerow([images.name(int(row[0])), int(row[1]), int(row[2]), f"{row[3]:.6f}"])
    except OSError as error:
        raise _unwritable(folder, error) from error
    log.info("Results and the prediction for every picture: %s", folder)


def _out(candidate: Candidate, data: Data, out: str | None) -> Path:
    name, run = f"{candidate.path.stem}-{candidate.weights}-{data.source}", candidate.path.parent.parent
    in_run = (run / "config.yaml").exists() and RunFolder(run).is_ours()
    if in_run and out is None:
        return run / "eval" / name
    mark = hashlib.blake2b(os.fsencode(candidate.path.resolve()), digest_size=4).hexdigest()  # names may be the same
    return Path(out or "runs/eval") / f"{f'{run.name}-' if in_run else ''}{name}-{mark}"

