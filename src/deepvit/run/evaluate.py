"""Checkpoints of any dialect on any data: exact numbers, one table, what was predicted for each image."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo

from deepvit.analysis.ablation import ablations
from deepvit.analysis.images import class_names, told_preparation
from deepvit.config.compare import flat, typed_names
from deepvit.config.provenance import versions
from deepvit.config.settings import Data, EvalSettings, read_evaluation, read_group
from deepvit.data import Batch, ImageSet, eval_folder, real_top1, resolve_decoder, source_of
from deepvit.data.sources import Folder
from deepvit.engine.device import device_name, prepare_device
from deepvit.engine.evaluate import Evaluation, mcnemar
from deepvit.engine.folder import RunFolder
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.errors import UserError
from deepvit.importers import find_checkpoint, open_model
from deepvit.importers.settings import checked
from deepvit.models import ViT
from deepvit.models.registry import count_flops, count_parameters
from deepvit.report.published import SOURCES, published_of
from deepvit.run import build, eval_results
from deepvit.run.launch import Stopped
from deepvit.run.measures import Evaluator, calibration

NEUTRAL = {"root": None, "fraction": 1.0, "classes": None, "val_fraction": None}  # the same in every source of data
# Settings that an evaluation has no use for
OF_TRAINING = {"data.batch_size", "data.hflip", "data.on_device", "precision.scale_gradients"} | {
    f"engine.{name}" for name in ("device_batch", "log_every", "save_every", "keep_epochs", "keep", "profile",
                                  "grad_checkpointing", "compile", "max_skipped")}
OF_TRAINING_IMAGES = {"data.fraction", "data.max_bad", "data.train_split"}  # which only `knn` and `calibrate` read
PREPARATION = ("norm", "crop_pct", "interpolation")  # settings of the data that belong to the model
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """A model, the images to evaluate it on, and the folder of the results."""

    model: ViT
    data: Data
    root: str | None  # of `also`: a further folder, in place of the data's own
    images: ImageSet
    calibration: Callable[[], Iterator[Batch]] | None  # see `measures.calibration`
    folder: Path


def evaluate_all(config: Mapping[str, Any], ranks: Ranks, stop: StopRequest) -> None:
    """Evaluates every checkpoint that `config` names; prints one table; each writes metrics.json, predictions.csv and
    classes.csv. Raises Stopped, or UserError for no checkpoint, an unreadable one, or data that do not fit a model's
    classes, once the others are evaluated."""
    asked, paths = prepare_evaluation(config, ranks)
    further = _listed(asked.also or [])
    with ranks.sync_errors():
        for root in further:
            if not Path(root).expanduser().is_dir():
                raise UserError(f"also={root} is not a folder: check the path, which is relative to {Path.cwd()}.")
    results, seen, refusals = [], [], []
    for path, root in product(paths, (None, *further)):
        try:
            case = _open(path, root, asked, ranks)
        except UserError as error:  # the others are evaluated all the same
            refusals.append(str(error))
            continue
        evaluation, result = _evaluate(case, asked, ranks, stop)
        results.append(result)
        seen.append((path, case.images.fingerprint(), case.model.load_report.said.get("classes"), evaluation))
        with ranks.sync_errors():
            if ranks.is_main:
                eval_results.write(case.folder, case.images, evaluation, result, readable_classes(case.model))
    if ranks.is_main and results:
        eval_results.report(results, seen)
    if refusals:
        raise UserError("\n".join(refusals))


def prepare_evaluation(config: Mapping[str, Any], ranks: Ranks) -> tuple[EvalSettings, list[Path]]:
    """What was asked, for which the device is set up, and the checkpoints."""
    with ranks.sync_errors():
        asked = read_evaluation(config)
        unused = OF_TRAINING if asked.knn or asked.calibrate else OF_TRAINING | OF_TRAINING_IMAGES
        if idle := sorted(typed_names(asked.origin) & unused):
            log.warning("No effect in an evaluation (whose batches have data.eval_batch_size images): %s.",
                        ", ".join(idle))
        paths, precision = checkpoints(asked.checkpoint), build.precision(asked.precision, ranks.device)
    prepare_device(precision, ranks, asked.engine.threads, asked.engine.deterministic)
    return asked, paths


def checkpoints(given: str | list[str] | None) -> list[Path]:
    """The files named, or every best checkpoint under runs/."""
    def warn(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            log.warning("%s cannot be read (%s): what is in it is not evaluated.", error.filename, error.strerror)

    if given is None:
        found = sorted(Path(folder, "best.pt") for folder, _, files in os.walk("runs", onerror=warn)
                       if Path(folder).name == "checkpoints" and "best.pt" in files)
        if not found:
            raise UserError("There is no checkpoint under runs/ here: train first, or give checkpoint=PATH.")
        return found
    return [find_checkpoint(one)[0] for one in _listed(given)]


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


def _open(path: Path, root: str | None, asked: EvalSettings, ranks: Ranks) -> Case:
    """What would be refused after a long evaluation is refused before it, on all ranks alike."""
    with ranks.sync_errors():
        model = load(path, asked)
        own = data = data_settings(model, asked)
        if root is not None:
            held_out = _held_out(model, root).get("val_fraction")
            data = replace(own, source="folder", root=root, classes=None, val_fraction=held_out, exclude=None)
    if ranks.world > 1 and source_of(own).may_download:
        build.shared_splits(own, ranks)  # one rank of each machine before the others
    with ranks.sync_errors():
        images, train = val_images(model, data), None
        if asked.labels == "real" and root is None:
            _real_top1(model, images, np.zeros(len(images), int))
        folder = out_folder(model, name_of_images(model, data, root), asked)
        if ranks.is_main:
            eval_results.check_place(folder)
        try:
            train = source_of(own).splits().train if asked.calibrate else None
        except UserError as error:
            raise UserError(f"calibrate= needs the training images. {error}") from None
        batches = calibration(asked.calibrate, data, train, model.norm_batches, ranks)
        return Case(model, data, root, images, batches, folder)


def load(path: Path, asked: EvalSettings) -> ViT:
    keywords = checked({name: value for name, value in asked.model.items() if value is not None})
    model = open_model(path, asked.weights, dialect=asked.dialect, **keywords)
    if asked.ablate:
        ablations(model, asked.ablate)  # refuses what it cannot do before anything is evaluated
    return model


def trained_on(model: ViT) -> Mapping[str, Any] | None:
    """The settings of its training data, where its file tells them."""
    return (model.load_report.said.get("run") or {}).get("data")


def known_classes(model: ViT) -> list[str] | None:
    """Ids of its classes in the order of the logits; ImageNet's for 1000 that its file does not name."""
    known = model.load_report.said.get("classes")
    return ImageNetInfo().label_names() if known is None and model.num_classes == 1000 else known


def readable_classes(model: ViT) -> list[str]:
    """Names in the order of the logits, each once."""
    names = class_names(model)
    if len({*names}) < len(names):
        return model.load_report.said.get("classes") or [str(index) for index in range(len(names))]
    return names


def data_settings(model: ViT, asked: EvalSettings) -> Data:
    """The data asked for; where that is left open, the run's own. The image size is the model's, and so are how images
    are prepared and which part of a folder was held out, where its file tells it, but for what was typed."""
    given = {name: value for name, value in asked.data.items() if value is not None}
    if "source" not in given:
        given = {**(trained_on(model) or {}), **given}
    elif asked.origin:
        typed, told = typed_names(asked.origin), told_preparation(model) | _held_out(model, given.get("root"))
        if "mean" in told and "data.norm" not in typed:
            log.warning("%s was trained on images normalised by mean %s and std %s, which no data.norm has: it is "
                        "evaluated with others and does worse.", model.load_report.path, told["mean"], told["std"])
        own = {name: told[name] for name in (*PREPARATION, "val_fraction")
               if name in told and f"data.{name}" not in typed}
        if other := [f"data.{name}={value}" for name, value in own.items() if value != given.get(name)]:
            log.info("%s: as in its training: %s.", model.load_report.path, ", ".join(other))
        given |= own
    if "source" not in given:
        raise UserError(f"{model.load_report.path} does not name its training data: add data=imagenet data.root=...")
    return read_group("data", {**NEUTRAL, **given, "img_size": list(model.img_size)})


def _held_out(model: ViT, root: str | None) -> dict[str, float]:
    """The part of the folder `root` that its run held out, if it trained on the rest."""
    run = trained_on(model) or {}
    if root and run.get("root") and run.get("val_fraction"):
        given, trained = (Path(one).expanduser().resolve() for one in (root, run["root"]))
        if given == trained:
            return {"val_fraction": run["val_fraction"]}
    return {}


def val_images(model: ViT, data: Data) -> ImageSet:
    """The images to evaluate, their targets as indices of the model's logits. Folders of classes need no training set
    here and may lack classes (ImageNet's subsets, -V2, -A, -R): they are matched by name with the model's, by wnid for
    a model of ImageNet's 1000. UserError for classes that the model does not know, or another number of them."""
    count, known, path = model.num_classes, known_classes(model), model.load_report.path
    if model.pool == "":
        raise UserError(f"{path} has logits of tokens, not of images: give +model.pool=cls, mean or avg.")
    source = source_of(data)
    if known and isinstance(source, Folder) and data.root and data.classes is data.val_fraction is None:
        return _of_folders(data, known)
    splits = source.splits()
    if splits.class_ids == known:
        return splits.val
    if known is None:
        if len(splits.class_ids) != count:
            raise UserError(f"{path} has {count} classes, the data {len(splits.class_ids)}: change data=.")
        if splits.class_ids != sorted(splits.class_ids):
            log.warning("%s does not name its classes; they are taken in the order %s, ... (torchvision's ImageFolder "
                        "would sort these names as text).", path, ", ".join(splits.class_ids[:3]))
        return splits.val
    missing = [name for name in splits.class_ids if name not in set(known)]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} classes of the data, such as '{missing[0]}': change data=.")
    images = splits.val.take(np.arange(len(splits.val)))
    images.targets = np.array([known.index(name) for name in splits.class_ids])[images.targets]
    return images


def _of_folders(data: Data, classes: list[str]) -> ImageSet:
    images = eval_folder(data.root, classes, decoder=data.decoder, in_memory_mb=data.in_memory_mb, exclude=data.exclude)
    present = len(np.unique(images.targets))
    if present < len(classes):
        log.info("%s has images of %d of the %d classes: top-1 is given among all, and among its own (as published for "
                 "ImageNet-A and -R).", data.root, present, len(classes))
    return images


def name_of_images(model: ViT, data: Data, also: str | None = None) -> str:
    """For the folder of results; with a mark of their place, unless the model's run had its images there."""
    home, place = trained_on(model) or {}, _mark(Path(data.root or "", data.name or ""))
    if also or (data.root or data.name) and place != _mark(Path(home.get("root") or "", home.get("name") or "")):
        return f"{Path(also).name if also else data.source}-{place}"
    return data.source


def out_folder(model: ViT, data_name: str, asked: EvalSettings) -> Path:
    """Where results are written: in the checkpoint's run, below `out`, or in runs/eval/; of a sweep's cell its own."""
    path, out, cell = model.load_report.path, asked.out, (asked.origin or {}).get("cell")
    name, run = f"{path.stem}-{model.load_report.weights}-{data_name}{f'-{cell}' if cell else ''}", path.parent.parent
    in_run = (run / "config.yaml").exists() and RunFolder(run).is_ours()
    if in_run and out is None:
        return run / "eval" / name
    return Path(out or "runs/eval") / f"{f'{run.name}-' if in_run else ''}{name}-{_mark(path)}"


def _mark(path: str | Path) -> str:
    """A hash that distinguishes paths of the same name."""
    return hashlib.blake2b(os.fsencode(Path(path).resolve()), digest_size=4).hexdigest()


def _evaluate(case: Case, asked: EvalSettings, ranks: Ranks, stop: StopRequest) -> tuple[Evaluation, dict[str, Any]]:
    """The evaluation, and what metrics.json says of it."""
    data, images, report = case.data, case.images, case.model.load_report
    model, present = case.model.to(ranks.device), np.unique(images.targets)
    among = torch.as_tensor(present, device=ranks.device) if len(present) < model.num_classes else None
    precision = build.precision(asked.precision, ranks.device)
    evaluator = Evaluator(data, images, build.prepare(data, model.num_classes), ranks, precision, stop,
                          case.calibration, among)

    def evaluate() -> Evaluation:
        if (found := evaluator(model, title=report.path.name)) is None:
            raise Stopped("Stopped on request.")
        return found

    evaluation = evaluate()
    result = {
        "checkpoint": str(report.path), "weights": report.weights,
        "calibrate": asked.calibrate if case.calibration else 0,
        **evaluation.summary(), **({"real_top1": _real_top1(case.model, images, evaluation.predictions[:, 0])}
                                   if asked.labels == "real" and case.root is None else {}),
        "worst_classes": eval_results.by_class(evaluation, readable_classes(model))[:3],
        "data": Path(case.root).name if case.root else data.source, "root": data.root,
        **{name: getattr(data, name) for name in PREPARATION},
        "precision": str(precision.dtype or torch.float32).removeprefix("torch."),
        "decoder": resolve_decoder(data.decoder), "img_size": list(model.img_size), "depth": model.depth,
        "params": count_parameters(model), "flops": count_flops(model), "dialect": report.dialect,
        "step": report.said.get("step"), "arch": report.said.get("arch"), "published": _published(model, data),
        "device": device_name(ranks.device), "devices": ranks.world, **versions()}
    if asked.ablate:
        result["ablations"] = _ablate(model, asked.ablate, evaluation, evaluate)
    return evaluation, result


def _real_top1(model: ViT, images: ImageSet, predictions: np.ndarray) -> float:
    names = [images.name(index) for index in range(len(images))]
    return real_top1(predictions, names, known_classes(model) or ["unnamed"])


def _published(model: ViT, data: Data) -> dict[str, Any] | None:
    """The published figure for this model on this data, where there is one; none for weights that were trained here."""
    if model.load_report.dialect == "ours":
        return None
    settings = dict(flat({"model": model.config, "data": vars(data)}))
    if isinstance(settings["model.img_size"], list):
        settings["model.img_size"] = settings["model.img_size"][0]
    found = published_of(settings)
    return {"model": found[0].model, "top1": found[0].top1, "source": SOURCES[found[0].source]} if found else None


def _ablate(model: ViT, what: str, whole: Evaluation, evaluate: Callable[[], Evaluation]) -> list[dict[str, Any]]:
    """What the model still gets right without one of its parts (see `analysis.ablation`): prints a table, and gives for
    each form `form`, `top1`, `loss` and McNemar's test against the `whole` model."""
    found = []
    for form, inside in ablations(model, what).items():
        with inside:
            evaluation = evaluate()
        found.append({"form": form, "top1": evaluation.top1, "loss": evaluation.loss,
                      **mcnemar(whole.correct, evaluation.correct)})
    log.info("\n%s", eval_results.ablation_table(found, whole.top1))
    return found
