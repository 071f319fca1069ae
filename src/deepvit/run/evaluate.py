"""Checkpoints of any dialect on any data: exact numbers, one table, what was predicted for each image."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo

from deepvit.analysis.ablation import ablations
from deepvit.analysis.images import class_names
from deepvit.config.compare import flat
from deepvit.config.provenance import versions
from deepvit.config.settings import Data, EvalSettings, read_evaluation, read_group
from deepvit.data import Batch, ImageSet, eval_folder, real_top1, resolve_decoder, source_of
from deepvit.engine.device import device_name, prepare_device
from deepvit.engine.evaluate import Evaluation, mcnemar
from deepvit.engine.folder import RunFolder
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.engine.step import Precision
from deepvit.errors import UserError
from deepvit.importers import find_checkpoint, open_model
from deepvit.importers.settings import checked
from deepvit.models import ViT
from deepvit.models.cost import count_flops, count_parameters
from deepvit.report.published import SOURCES, published_of
from deepvit.run import build, eval_results
from deepvit.run.measures import Evaluator, calibration

NEUTRAL = {"root": None, "fraction": 1.0, "classes": None, "val_fraction": None}  # the same in every source of data
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, and the metadata of its file."""

    path: Path
    model: ViT
    weights: str  # "raw" or "ema"
    classes: list[str] | None  # class ids in the order of the logits
    data: Mapping[str, Any] | None  # the settings of the data it was trained on
    metadata: Mapping[str, Any]

    @property
    def class_names(self) -> list[str]:
        """Readable, each once."""
        names = class_names(self.model)
        return names if len(set(names)) == len(names) else self.classes or list(map(str, range(len(names))))


@dataclass(frozen=True)
class Case:
    """A candidate, the images to evaluate it on, and the folder of the results."""

    candidate: Candidate
    data: Data
    root: str | None  # of `also`: a further folder, in place of the data's own
    images: ImageSet
    calibration: Callable[[], Iterator[Batch]] | None  # see `measures.calibration`
    folder: Path


def evaluate_all(config: Mapping[str, Any], ranks: Ranks, stop: StopRequest) -> list[dict[str, Any]] | None:
    """Evaluates every checkpoint that `config` names; prints one table; each writes metrics.json, predictions.csv and
    classes.csv. Returns the results, or None if it was asked to stop before all were there. Raises UserError for no
    checkpoint, an unreadable one, or data that do not fit a model's classes, once the others are evaluated."""
    asked, paths, precision = prepare_evaluation(config, ranks)
    further = [asked.also] if isinstance(asked.also, str) else asked.also or []
    with ranks.sync_errors():
        for root in further:
            if not Path(root).expanduser().is_dir():
                raise UserError(f"also={root} is not a folder: check the path, which is relative to {Path.cwd()}.")
    results, seen, refusals = [], [], []
    for path, root in ((path, root) for path in paths for root in (None, *further)):
        try:
            case = _open(path, root, asked, ranks)
        except UserError as error:  # the others are evaluated all the same
            refusals.append(str(error))
            continue
        found = _evaluate(case, asked, ranks, precision, stop)
        if found is None:
            return None
        evaluation, result = found
        results.append(result)
        seen.append((path, case.images.fingerprint(), case.candidate.classes, evaluation))
        with ranks.sync_errors():
            if ranks.is_main:
                eval_results.write(case.folder, case.images, evaluation, result, case.candidate.class_names)
    if ranks.is_main and results:
        eval_results.report(results, seen)
    if refusals:
        raise UserError("\n".join(refusals))
    return results


def prepare_evaluation(config: Mapping[str, Any], ranks: Ranks) -> tuple[EvalSettings, list[Path], Precision]:
    """What was asked, the checkpoints and the precision, for which the device is set up."""
    with ranks.sync_errors():
        asked = read_evaluation(config)
        paths, precision = checkpoints(asked.checkpoint), build.precision(asked.precision, ranks.device)
    prepare_device(precision, ranks, asked.engine.threads, asked.engine.deterministic)
    return asked, paths, precision


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
    paths = [find_checkpoint(one)[0] for one in ([given] if isinstance(given, str) else given)]
    for path in paths:
        if not path.exists():
            raise UserError(f"There is no checkpoint at {path}.")
    return paths


def _open(path: Path, root: str | None, asked: EvalSettings, ranks: Ranks) -> Case:
    """What would be refused after a long evaluation is refused before it, on all ranks alike."""
    with ranks.sync_errors():
        candidate = load(path, asked)
        own = data = data_settings(candidate, asked)
        if root is not None:
            data = replace(own, source="folder", root=root, classes=None, val_fraction=None, exclude=None)
    if ranks.world > 1 and source_of(own).may_download:
        build.shared_splits(own, ranks)  # one rank of each machine before the others
    with ranks.sync_errors():
        images, train = val_images(candidate, data), None
        if asked.labels == "real" and root is None:
            real_top1(np.zeros(len(images), int), [images.name(index) for index in range(len(images))])
        if root is not None:
            name = f"{Path(root).name}-{_mark(root)}"
        elif candidate.data and data.source == candidate.data.get("source") and data.root != candidate.data["root"]:
            name = f"{data.source}-{_mark(data.root)}"  # other images of the same kind
        else:
            name = data.source
        folder = out_folder(candidate, name, asked.out)
        if ranks.is_main:
            with eval_results.results_in(folder):
                pass
        try:
            train = build.splits(own).train if asked.calibrate else None
        except UserError as error:
            raise UserError(f"calibrate= needs the training images. {error}") from None
        batches = calibration(asked.calibrate, data, train, candidate.model.norm_batches, ranks)
        return Case(candidate, data, root, images, batches, folder)


def load(path: Path, asked: EvalSettings) -> Candidate:
    keywords = checked({name: value for name, value in asked.model.items() if value is not None})
    model = open_model(path, asked.weights, dialect=asked.dialect, **keywords)
    if asked.ablate:
        ablations(model, asked.ablate)  # refuses what it cannot do before anything is evaluated
    metadata = model.load_report.said
    run = metadata.get("run")
    return Candidate(path, model, model.load_report.weights, metadata.get("classes"), run and run["data"], metadata)


def data_settings(candidate: Candidate, asked: EvalSettings) -> Data:
    """The data asked for; where that is left open, the run's own. The image size is the model's."""
    given = {name: value for name, value in asked.data.items() if value is not None}
    if "source" not in given and not candidate.data:
        raise UserError(f"{candidate.path} does not say what it was trained on: add data=imagenet data.root=..., "
                        f"or another data=.")
    merged = given if "source" in given else {**candidate.data, **given}
    return read_group("data", {**NEUTRAL, **merged, "img_size": list(candidate.model.img_size)})


def val_images(candidate: Candidate, data: Data) -> ImageSet:
    """The images to evaluate, their targets as indices of the model's logits.

    Folders of classes need no training set here and may lack classes (ImageNet's subsets, -V2, -A, -R): classes are
    matched by name with the model's, by wnid for a model of ImageNet's 1000. UserError for classes that the model does
    not know, or another number of them where its file does not name them.
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
            log.info("%s has images of %d of the %d classes: top-1 is given among all, and among its own (as published "
                     "for ImageNet-A and -R).", data.root, present, count)
        return images
    splits = source.splits()
    if splits.class_ids == known:
        return splits.val
    if known is None:
        if len(splits.class_ids) != count:
            raise UserError(f"{candidate.path} has {count} classes, the data has {len(splits.class_ids)}: evaluate it "
                            f"on data with its classes.")
        if splits.class_ids != sorted(splits.class_ids):
            log.warning("%s does not name its classes; they are taken in the order %s, ... (torchvision's ImageFolder "
                        "would sort these names as text).", candidate.path, ", ".join(splits.class_ids[:3]))
        return splits.val
    missing = [name for name in splits.class_ids if name not in set(known)]
    if missing:
        raise UserError(f"The data has {len(missing)} classes that {candidate.path} does not know, such as "
                        f"'{missing[0]}': evaluate it on data with its {count} classes.")
    images = splits.val.take(np.arange(len(splits.val)))
    images.targets = np.array([known.index(name) for name in splits.class_ids])[images.targets]
    return images


def out_folder(candidate: Candidate, data_name: str, out: str | None) -> Path:
    """Where results are written: in the checkpoint's run, below `out`, or in runs/eval/."""
    name, run = f"{candidate.path.stem}-{candidate.weights}-{data_name}", candidate.path.parent.parent
    in_run = (run / "config.yaml").exists() and RunFolder(run).is_ours()
    if in_run and out is None:
        return run / "eval" / name
    return Path(out or "runs/eval") / f"{f'{run.name}-' if in_run else ''}{name}-{_mark(candidate.path)}"


def _mark(path: str | Path) -> str:
    """A hash that distinguishes paths of the same name."""
    return hashlib.blake2b(os.fsencode(Path(path).resolve()), digest_size=4).hexdigest()


def _evaluate(case: Case, asked: EvalSettings, ranks: Ranks, precision: Precision, stop: StopRequest
              ) -> tuple[Evaluation, dict[str, Any]] | None:
    """The evaluation, and what metrics.json says of it; None: it was asked to stop."""
    candidate, data, images = case.candidate, case.data, case.images
    model, present = candidate.model.to(ranks.device), np.unique(images.targets)
    evaluator = Evaluator(
        data, images, build.prepare(data, model.num_classes), ranks, precision, stop, case.calibration,
        among=torch.as_tensor(present, device=ranks.device) if len(present) < model.num_classes else None)
    evaluate = partial(evaluator, model, title=candidate.path.name)
    evaluation = evaluate()
    if evaluation is None:
        return None
    real = {}
    if asked.labels == "real" and case.root is None:
        names = [images.name(index) for index in evaluation.indices]
        real = {"real_top1": real_top1(evaluation.predictions[:, 0], names)}
    result = {
        "checkpoint": str(candidate.path), "weights": candidate.weights, "calibrate": asked.calibrate,
        **evaluation.summary(), **real,
        "worst_classes": eval_results.by_class(evaluation, candidate.class_names)[:3],
        "data": Path(case.root).name if case.root else data.source, "root": data.root,
        "decoder": resolve_decoder(data.decoder), "img_size": list(model.img_size),
        "params": count_parameters(model), "flops": count_flops(model),
        "depth": model.depth, "dialect": model.load_report.dialect, "step": candidate.metadata.get("step"),
        "arch": candidate.metadata.get("arch"), "published": _published(candidate, data),
        "device": device_name(ranks.device), "devices": ranks.world, **versions()}
    if asked.ablate:
        result["ablations"] = _ablate(model, asked.ablate, evaluation, evaluate)
        if result["ablations"] is None:
            return None
    return evaluation, result


def _published(candidate: Candidate, data: Data) -> dict[str, Any] | None:
    """The published figure for this model on this data, where there is one; none for weights that were trained here."""
    if candidate.model.load_report.dialect == "ours":
        return None
    settings = dict(flat({"model": candidate.model.config, "data": vars(data)}))
    if isinstance(settings["model.img_size"], list):
        settings["model.img_size"] = settings["model.img_size"][0]
    found = published_of(settings)
    return {"model": found[0].model, "top1": found[0].top1, "source": SOURCES[found[0].source]} if found else None


def _ablate(model: ViT, what: str, whole: Evaluation, evaluate: Callable[[], Evaluation | None]
            ) -> list[dict[str, Any]] | None:
    """What the model still gets right without one of its parts (see `analysis.ablation`): prints a table, and gives for
    each form `form`, `top1`, `loss` and McNemar's test against the `whole` model; None: it was asked to stop."""
    found = []
    for form, inside in ablations(model, what).items():
        with inside:
            evaluation = evaluate()
        if evaluation is None:
            return None
        found.append({"form": form, "top1": evaluation.top1, "loss": evaluation.loss,
                      **mcnemar(whole.correct, evaluation.correct)})
    log.info("\n%s", eval_results.ablation_table(found, whole.top1))
    return found
