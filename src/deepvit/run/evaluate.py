"""Checkpoints of any dialect on any data: exact numbers, one table, what was predicted for each image."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo

from deepvit.analysis.ablation import ablations
from deepvit.analysis.images import class_names
from deepvit.config.provenance import versions
from deepvit.config.settings import Data, read_evaluation, read_group
from deepvit.data import ImageSet, eval_folder, real_top1, resolve_decoder, source_of
from deepvit.engine.device import device_name, prepare_device
from deepvit.engine.evaluate import Evaluation, evaluate
from deepvit.engine.folder import RunFolder
from deepvit.engine.progress import Display
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.engine.step import Precision
from deepvit.errors import UserError
from deepvit.importers import find_checkpoint, open_model
from deepvit.importers.settings import checked
from deepvit.models import ViT
from deepvit.models.cost import count_flops, count_parameters
from deepvit.report.published import published_of, sources
from deepvit.report.runs import flat
from deepvit.run import build, eval_results
from deepvit.run.ablate import ablate
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
    """Evaluates every checkpoint that `config` names; prints one table; each writes metrics.json,
    predictions.csv and classes.csv.

    Returns:
        the results; None if it was asked to stop before all were there.
    Raises:
        UserError: no checkpoint, an unreadable one, data that do not fit a model's classes.
    """
    with ranks.sync_errors():
        asked = read_evaluation(config)
        paths, precision = checkpoints(asked.checkpoint), build.precision(asked.precision, ranks.device)
        further = [asked.also] if isinstance(asked.also, str) else asked.also or []
        for root in further:
            if not Path(root).expanduser().is_dir():
                raise UserError(f"also={root} is no folder: check the path, which is taken from {Path.cwd()}.")
    prepare_device(precision, ranks, asked.engine.threads, asked.engine.deterministic)
    results, seen, refusals = [], [], []
    for path, root in ((path, root) for path in paths for root in (None, *further)):
        try:
            candidate, data, images, train = _open(path, root, config, ranks)
        except UserError as error:  # the others are evaluated all the same
            refusals.append(str(error))
            continue
        run = _evaluator(candidate, data, images, config["calibrate"], train, ranks, precision, stop)
        evaluation = run()
        if evaluation is None:
            return None
        result = _result(candidate, data, images, evaluation, root, config, ranks)
        if config["ablate"]:
            result["ablations"] = ablate(candidate.model, config["ablate"], evaluation, run)
            if result["ablations"] is None:
                return None
        results.append(result)
        seen.append((path, images.fingerprint(), candidate.classes, evaluation))
        with ranks.sync_errors():
            if ranks.is_main:
                eval_results.write(_out(candidate, data, root, config["out"]), images, evaluation, result,
                                   _names(candidate))
    if ranks.is_main and results:
        log.info("\n%s", eval_results.table(results))
        for result in results:
            eval_results.say_published(result)
            eval_results.say_worst(result)
        eval_results.compare(seen)
    if refusals:
        raise UserError("\n".join(refusals))
    return results


def _open(path: Path, root: str | None, config: Mapping[str, Any], ranks: Ranks
          ) -> tuple[Candidate, Data, ImageSet, ImageSet | None]:
    """What would be refused after a long evaluation is refused before it, on all ranks alike.

    Args:
        root: a further folder of the same classes, in the place of the data's own.
    Returns:
        the model, its data, the images to evaluate, and those of the training set if the model is calibrated on them.
    """
    with ranks.sync_errors():
        candidate = load(path, config)
        own = data = data_settings(candidate, config)
        if root is not None:
            data = replace(own, source="folder", root=root, classes=None, val_fraction=None, exclude=None)
    if ranks.world > 1 and source_of(own).may_download:
        build.shared_splits(own, ranks)  # one rank of each machine before the others
    with ranks.sync_errors():
        images = val_images(candidate, data)
        _check_wishes(candidate, data, images, root, config, ranks)
        return candidate, data, images, _train_images(own) if config["calibrate"] else None


def _train_images(data: Data) -> ImageSet:
    try:
        return build.splits(data).train
    except UserError as error:
        raise UserError(f"calibrate= needs the training images. {error}") from None


def _check_wishes(candidate: Candidate, data: Data, images: ImageSet, root: str | None,
                  config: Mapping[str, Any], ranks: Ranks) -> None:
    if config["labels"] == "real" and root is None:
        names = [images.name(index) for index in range(len(images))]
        real_top1(np.zeros(len(names), int), names)
    if ranks.is_main:
        folder = _out(candidate, data, root, config["out"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise eval_results.unwritable(folder, error) from error


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
    model = open_model(path, config["weights"], dialect=config["dialect"], **keywords)
    if config["ablate"]:
        ablations(model, config["ablate"])  # refuses what it cannot do before anything is evaluated
    said = model.load_report.said
    run = said.get("run")
    return Candidate(path, model, model.load_report.weights, said.get("classes"), run and run["data"], said)


def data_settings(candidate: Candidate, config: Mapping[str, Any]) -> Data:
    """The data asked for; where that is left open, the run's own. The image size is the model's."""
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
    """The images to evaluate, their targets as indices of the model's logits.

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
            log.info("%s has images of %d of the %d classes: top-1 is told among all, and among its own (as published "
                     "for ImageNet-A and -R).", data.root, present, count)
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


def _evaluator(candidate: Candidate, data: Data, images: ImageSet, calibrate: int, train: ImageSet | None,
               ranks: Ranks, precision: Precision, stop: StopRequest) -> Callable[[], Evaluation | None]:
    """Evaluates the model as it then is; None: it was asked to stop."""
    model = candidate.model.to(ranks.device)
    prepare, batches = build.prepare(data, model.num_classes), build.eval_batches(data, images, ranks)
    calibrated = calibration(calibrate, data, train, model.norm_batches, prepare, ranks, precision,
                             stop)
    present = np.unique(images.targets)
    among = torch.as_tensor(present, device=ranks.device) if len(present) < model.num_classes else None

    def run() -> Evaluation | None:
        with Display(ranks.is_main) as display:
            def once() -> Evaluation | None:
                bar = display.bar(candidate.path.name, len(images))
                return evaluate(model, batches(), prepare, ranks, precision, n=len(images), among=among,
                                advance=bar.advance, should_stop=lambda: ranks.any_asked_to_stop(bool(stop)))

            return calibrated(model, once)

    return run


def _result(candidate: Candidate, data: Data, images: ImageSet, evaluation: Evaluation, root: str | None,
            config: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    real = {}
    if config["labels"] == "real" and root is None:
        names = [images.name(index) for index in evaluation.indices]
        real = {"real_top1": real_top1(evaluation.predictions[:, 0], names)}
    model = candidate.model
    return {"checkpoint": str(candidate.path), "weights": candidate.weights, "calibrate": config["calibrate"],
            **evaluation.summary(), **real,
            "worst_classes": eval_results.by_class(evaluation, _names(candidate))[:3],
            "data": Path(root).name if root else data.source, "root": data.root,
            "decoder": resolve_decoder(data.decoder), "img_size": list(model.img_size),
            "params": count_parameters(model), "flops": count_flops(model),
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


def _names(candidate: Candidate) -> list[str]:
    """Readable names of the classes, each once."""
    names = class_names(candidate.model)
    return names if len(set(names)) == len(names) else candidate.classes or list(map(str, range(len(names))))


def _out(candidate: Candidate, data: Data, root: str | None, out: str | None) -> Path:
    own = candidate.data or {}
    if root is not None:
        what = f"{Path(root).name}-{_mark(root)}"
    elif data.source == own.get("source") and data.root != own["root"]:  # other images of the same kind
        what = f"{data.source}-{_mark(data.root)}"
    else:
        what = data.source
    return out_folder(candidate, what, out)


def out_folder(candidate: Candidate, what: str, out: str | None) -> Path:
    """Where results on the data `what` are written: in the checkpoint's run, below `out`, or in runs/eval/."""
    name, run = f"{candidate.path.stem}-{candidate.weights}-{what}", candidate.path.parent.parent
    in_run = (run / "config.yaml").exists() and RunFolder(run).is_ours()
    if in_run and out is None:
        return run / "eval" / name
    return Path(out or "runs/eval") / f"{f'{run.name}-' if in_run else ''}{name}-{_mark(candidate.path)}"


def _mark(path: str | Path) -> str:
    """Tells paths of the same name apart."""
    return hashlib.blake2b(os.fsencode(Path(path).resolve()), digest_size=4).hexdigest()

