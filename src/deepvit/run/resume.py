"""What a run takes from files: its own folder's, if this command may resume it, and the model of `init`."""

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import get_optimizer_info

from deepvit.config.compare import changed, typed_names
from deepvit.config.settings import Settings, read_group
from deepvit.config.signature import parameters_of
from deepvit.data import Splits, name_of_norm
from deepvit.engine import checkpoint
from deepvit.engine.folder import RunFolder
from deepvit.errors import Untold, UserError
from deepvit.importers import find_checkpoint, open_weights
from deepvit.models import ViT, build_model, model_config
from deepvit.run import build
from deepvit.run.micro_batches import allowed

KEPT = ("model", "data", "augment", "seed", "init", "head", "freeze", "ema", "optimizer")  # as they were, but for:
NAMED = ("optimizer.lr", "optimizer.clip_grad")
ADVICE = "choose another folder with hydra.run.dir=..., or start over with fresh=true."
OF_TRAINING = ("num_classes", "drop_rate", "pos_drop_rate", "attn_drop_rate", "drop_path_rate")  # not of `init`'s model
INIT_ADVICE = ("To train from it give settings as model.num_heads=... and a model's name as model=NAME; or write them "
               "into a file once: deepvit export FILE --to safetensors KEY=VALUE.")
Differences = dict[str, tuple[Any, Any]]  # what -> (before, now)

log = logging.getLogger(__name__)


# What earlier versions began

def settings_of(folder: RunFolder) -> Settings:
    """Those of the run in `folder`; UserError where there is none, or its config is torn."""
    if not folder.config.exists():
        raise UserError(f"There is no run in {folder.path}: it has no config.yaml.")
    return build.read_settings(_config_of(folder))


def _config_of(folder: RunFolder) -> dict[str, Any]:
    try:
        return upgraded(folder.read_config())
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{folder.config} is torn or not the config of a run: restore it from a copy.") from None


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config in today's settings: with the defaults of the model's new keywords, without what had no effect."""
    config = _with_its_stem(config, config)
    optimizer, schedule, attention = config["optimizer"], config["schedule"], config["model"]["attention"]
    info = get_optimizer_info(optimizer["opt"])
    idle = {name: None for name in ("momentum", "betas", "eps") if not getattr(info, f"has_{name}")}
    rest = {"cooldown_epochs": 0} if schedule["steps"] is not None else {}
    attention = {name: value for name, value in attention.items() if (name, value) != ("sync_norm", False)}
    usual = {name: one.default for name, one in parameters_of(ViT)[0].items() if one.default is not one.empty}
    return {**config, "loss": {"kind": "cross_entropy", **config["loss"]},
            "optimizer": {"kwargs": None, **optimizer, **idle}, "schedule": {**schedule, **rest},
            "model": {**usual, **config["model"], "attention": attention}}


def as_begun(config: Mapping[str, Any], folder: RunFolder) -> Mapping[str, Any]:
    """`config`, but a run keeps the precision that `auto` was when it began, and what it did before a setting existed:
    without `norm_batch` statistics of all images that a device takes at once, without `calibrate` no calibration."""
    run = folder.read_config()
    before = run["model"].get("attention") if isinstance(run.get("model"), dict) else None
    if not isinstance(before, dict):
        return config
    if "precision" in run and read_group("precision", config["precision"]).dtype == "auto":
        config = {**config, "precision": run["precision"]}
    if "calibrate" not in run and config["calibrate"] == "auto":
        config = {name: value for name, value in config.items() if name != "calibrate"}
    config = _with_its_stem(config, run)
    model = config["model"]
    is_other = any(before.get(name) != model["attention"].get(name) for name in ("class", "norm"))  # and is refused
    if is_other or "norm_batch" in before or "norm_batch" not in model["attention"]:
        return config
    log.info("This run was begun before model.attention.norm_batch existed, and continues without it (null).")
    attention = {name: value for name, value in model["attention"].items() if name != "norm_batch"}
    return {**config, "model": {**model, "attention": attention}}


def _with_its_stem(config: Mapping[str, Any], run: Mapping[str, Any]) -> Mapping[str, Any]:
    """`config` with the stem's statistics as they were, if `run` began before `calibrate` and `norm_batch` existed."""
    if "calibrate" in run or config["model"].get("stem") != "conv":
        return config
    return {**config, "model": {**config["model"], "stem": {"name": "conv", "norm_batch": None}}}


# The model of a run that starts from `init`

def with_model_of_init(config: Mapping[str, Any], folder: RunFolder | None = None) -> Mapping[str, Any]:
    """`config` with the model and the normalisation of its images that `init` describes; a run resumed in `folder`
    keeps its own. What was typed wins: `model=NAME` wholly, `model.*` each for itself. Dropout and stochastic depth
    are the run's, and a recipe may ask for larger images than the file's, but not for smaller ones."""
    typed = typed_names(config.get("origin"), unknown=["model=", "data.norm="])
    if config["init"] is None or typed >= {"model", "data.norm"}:
        return config
    if "model" in typed:
        _, norm = _of_resumed(folder, config) or (None, _norm_of(open_weights(config["init"], None).said, config))
        return {**config, "data": {**config["data"], "norm": norm or config["data"]["norm"]}}
    model = config["model"]
    own = {name: model[name] for name in model if f"model.{name}" in typed}
    if "model/attention" in typed:
        own["attention"] = model["attention"]
    described, norm = _of_resumed(folder, config) or _of_file(config, own)
    options = {name: value for name, value in model["attention"].items() if f"model.attention.{name}" in typed}
    merged = {**described, **{name: model[name] for name in OF_TRAINING}, **own}
    merged["attention"] = {**merged["attention"], **options}
    data = config["data"] if "data.img_size" in typed else {**config["data"], "img_size": merged["img_size"]}
    if norm and "data.norm" not in typed:
        data = {**data, "norm": norm}
    return {**config, "model": merged, "data": data}


def _of_resumed(folder: RunFolder | None, config: Mapping[str, Any]) -> tuple[dict[str, Any], str] | None:
    if folder is None or config["fresh"] or not folder.last.exists():
        return None
    run = folder.read_config()
    with suppress(KeyError, TypeError):  # torn: whoever resumes the run says so
        return (run["model"], run["data"]["norm"]) if run["init"] is not None else None
    return None


def _of_file(config: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    from deepvit.importers import told_settings
    try:
        model, metadata = told_settings(config["init"], own, config["dialect"])
    except Untold as error:
        raise Untold(f"{error} {INIT_ADVICE}") from None
    usual = model_config(config["origin"].get("choices", {}).get("model", "vit"))["img_size"]
    wanted = config["model"]["img_size"]
    pixels, pixels_of_file = (np.prod(np.broadcast_to(size, 2)) for size in (wanted, model["img_size"]))
    if wanted != usual and pixels > pixels_of_file:
        model["img_size"] = wanted
    return model, _norm_of(metadata, config)


def _norm_of(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    mean, std = metadata.get("mean"), metadata.get("std")
    norm = (metadata.get("run") or {}).get("data", {}).get("norm") or name_of_norm(mean, std)
    if norm is None and mean:
        log.warning("No data.norm has the mean %s and std %s of init=%s: it stays %s.", mean, std, config["init"],
                    config["data"]["norm"])
    return norm


# Whether this command may resume the run

def identity(settings: Settings, splits: Splits, folder: RunFolder, world: int) -> dict[str, Any]:
    """What a run is made of besides its settings, as its checkpoints and `metrics.json` keep it: the images of both
    splits, the content of `init` (None if that file is gone, or one of this very run's, which keeps changing), and of
    batch norms without `norm_batch` the images that they see at once on `world` devices."""
    images = {name: [len(part), part.fingerprint(), part.size_mark()]
              for name, part in (("train", splits.train), ("val", splits.val))}
    digest = None
    if settings.init and not Path(settings.init).resolve().is_relative_to(folder.path.resolve()):
        with suppress(UserError, OSError), find_checkpoint(Path(settings.init))[0].open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()[:16]
    with torch.device("meta"):
        norm_batches = build_model({**settings.model, "num_classes": 2}).norm_batches
    seen = {"micro_batch": allowed(settings, norm_batches, world)[0]} if None in norm_batches else {}
    return {"pictures": images, "init": digest, **seen}


def refuse_finished(folder: RunFolder, config: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A finished run answers the command that made it, whose `identity` is `now`, and no other."""
    before, known = _config_of(folder), folder.read_result().get("made_of")
    if known is None:  # an earlier version's
        with suppress(UserError):
            _, known = checkpoint.load_newest(folder.last, folder.previous) or (None, None)
    known = known or {}
    differences = _same_init(changed(before, config), known, now) | _other_size(known, now) | _other_images(known, now)
    if differences:
        raise UserError(f"The run in {folder.path} is finished with other settings: {_listed(differences)}. To train "
                        f"with these, {ADVICE}")
    old, new = before["data"].get("root"), config["data"].get("root")
    if old != new:
        log.warning("It was trained on data.root=%s, not %s; the images are the same.", old, new)


def with_changes(config: Mapping[str, Any], begun: Mapping[str, Any], splits: Splits, now: Mapping[str, Any]
                 ) -> Mapping[str, Any]:
    """A run that is resumed from the checkpoint `begun` keeps its model, data, optimizer and randomness; another rate
    or schedule is only named, also in the config's origin. `now`: the command's `identity`."""
    differences = _same_init(changed(upgraded(begun["run"]), config), begun, now) | _other_size(begun, now)
    refused = {name: pair for name, pair in differences.items() if name.split(".")[0] in KEPT and name not in NAMED}
    refused |= _other_classes(begun["classes"], splits.class_ids) or _other_images(begun, now)
    if refused:
        raise UserError(f"This run cannot be continued with other settings: {_listed(refused)}. Give them as before, "
                        f"{ADVICE}")
    for name, (old, new) in differences.items():
        log.warning("Continuing with %s=%s (was %s).", name, new, old)
    changes = [*(begun["run"].get("origin") or {}).get("changes", ()),
               *(f"{name}={new} instead of {old} from step {begun['step']} on"
                 for name, (old, new) in differences.items())]
    return {**config, "origin": {**(config.get("origin") or {}), "changes": changes}} if changes else config


def refuse_past_the_end(step: int, total: int) -> None:
    """A schedule that ends before the checkpoint would be done at once, with the evaluation of another step."""
    if step > total:
        raise UserError(f"This run is at step {step} already and would now end at {total}: give a longer schedule, "
                        f"{ADVICE}")


def _same_init(differences: Differences, before: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """`init` is known by its content where both sides have it: a file may move, and another may take its path."""
    old, new = before.get("init"), now.get("init")
    if old is None or new is None:
        return differences
    others = {name: pair for name, pair in differences.items() if name != "init"}
    return others if old == new else {**others, "init": (f"a file with digest {old}", f"one with {new}")}


def _other_classes(before: list[str], now: list[str]) -> Differences:
    if len(before) != len(now):
        return {"the data": (f"{len(before)} classes", f"{len(now)} classes")}
    renamed = next(((old, new) for old, new in zip(before, now) if old != new), None)
    return {"a class of the data": renamed} if renamed else {}


def _other_size(before: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """Of micro-batches, where batch norms take their statistics over just these."""
    sizes = before.get("micro_batch"), now.get("micro_batch")
    return {} if None in sizes or sizes[0] == sizes[1] else {"engine.device_batch": sizes}


def _other_images(before: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """The splits whose images are others, as far as `before` says (earlier versions did not note their sizes)."""
    known, found = before.get("pictures", {}), now["pictures"]
    return {f"the {name} set": (f"{known[name][0]} images", f"{marks[0]} others")
            for name, marks in found.items() if name in known and known[name] != marks[:len(known[name])]}


def _listed(differences: Differences) -> str:
    return "; ".join(f"{name} was {old} and is now {new}" for name, (old, new) in differences.items())
