"""Whether a command may go on with what stands in a run folder."""

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from timm.optim import get_optimizer_info

from deepvit.config.compare import changed
from deepvit.config.settings import Settings, read_group
from deepvit.config.signature import parameters_of
from deepvit.data import Splits
from deepvit.engine import checkpoint
from deepvit.engine.folder import RunFolder
from deepvit.errors import UserError
from deepvit.importers import find_checkpoint
from deepvit.models import ViT
from deepvit.run import build

KEPT = ("model", "data", "augment", "seed", "init", "head", "freeze", "ema", "optimizer")  # as they were, but for:
NAMED = ("optimizer.lr", "optimizer.clip_grad")
ADVICE = "choose another folder with hydra.run.dir=..., or start over with fresh=true."

log = logging.getLogger(__name__)


def settings_of(folder: RunFolder) -> Settings:
    """
    Raises:
        UserError: no run there, or one whose config is torn.
    """
    if not folder.config.exists():
        raise UserError(f"There is no run in {folder.path}: it has no config.yaml.")
    return build.read_settings(_config_of(folder))


def _config_of(folder: RunFolder) -> dict[str, Any]:
    """A run's own config, in today's settings."""
    try:
        return upgraded(folder.read_config())
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{folder.config} is torn or not the config of a run: restore it from a copy.") from None


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config in today's settings: a keyword of the model that it does not know has its default, and what had no
    effect, and was accepted then, is left out."""
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
    """`config`, but a run keeps the precision that `auto` was when it began, one begun before `norm_batch` existed
    the batch statistics that it had, those of all images that a device takes at once, and one begun before
    `calibrate` existed its evaluation."""
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
    if "norm_batch" in before or "norm_batch" not in model["attention"]:
        return config
    log.info("This run was begun before model.attention.norm_batch existed, and goes on without it (null).")
    attention = {name: value for name, value in model["attention"].items() if name != "norm_batch"}
    return {**config, "model": {**model, "attention": attention}}


def _with_its_stem(config: Mapping[str, Any], run: Mapping[str, Any]) -> Mapping[str, Any]:
    """`config` with the stem's statistics as they were, if `run` began before `calibrate` and `norm_batch` existed."""
    if "calibrate" in run or config["model"].get("stem") != "conv":
        return config
    return {**config, "model": {**config["model"], "stem": {"name": "conv", "norm_batch": None}}}


def identity(settings: Settings, splits: Splits, folder: RunFolder) -> dict[str, Any]:
    """What a run is made of beside its settings: the images of both splits, and the content of `init`.

    A checkpoint and `metrics.json` keep it, so that a path is no answer to what lay there.
    """
    images = {name: [len(part), part.fingerprint(), part.size_mark()]
                for name, part in (("train", splits.train), ("val", splits.val))}
    return {"pictures": images, "init": settings.init and _digest(Path(settings.init), folder)}


def _digest(init: Path, folder: RunFolder) -> str | None:
    """None where there is no such file (any more), or one of this very run's, which goes on changing."""
    if init.resolve().is_relative_to(folder.path.resolve()):
        return None
    with suppress(UserError, OSError), find_checkpoint(init)[0].open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


def refuse_finished(folder: RunFolder, config: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A finished run answers the command that made it, and no other.

    now: the command's `identity`.
    """
    before = _config_of(folder)
    known = folder.read_result().get("made_of")
    if known is None:  # an earlier version's
        with suppress(UserError):
            known = (checkpoint.load_newest(folder.last, folder.previous) or (None, None))[1]
    known = known or {}
    differences = _same_init(changed(before, config), known, now) | _other_images(known, now)
    if differences:
        raise UserError(f"The run in {folder.path} is finished with other settings: {_listed(differences)}. To train "
                        f"with these, {ADVICE}")
    roots = before["data"].get("root"), config["data"].get("root")
    if roots[0] != roots[1]:
        log.warning("It was trained on data.root=%s, not %s; the images are the same.", *roots)


def refuse_change(content: Mapping[str, Any], config: Mapping[str, Any], splits: Splits, now: Mapping[str, Any]
                  ) -> None:
    """A continued run keeps its model, data, optimizer and randomness; another rate or schedule is only named.

    Args:
        content: of the checkpoint that would be continued.
        now: the command's `identity`.
    """
    differences = _same_init(changed(upgraded(content["run"]), config), content, now)
    refused = {name: pair for name, pair in differences.items() if name.split(".")[0] in KEPT and name not in NAMED}
    refused |= _other_classes(content["classes"], splits.class_ids) or _other_images(content, now)
    if refused:
        raise UserError(f"This run cannot be continued with other settings: {_listed(refused)}. Give them as before, "
                        f"{ADVICE}")
    for name, (old, new) in differences.items():
        log.warning("Continuing with %s=%s (was %s).", name, new, old)


def _same_init(differences: dict[str, tuple[Any, Any]], before: Mapping[str, Any], now: Mapping[str, Any]
               ) -> dict[str, tuple[Any, Any]]:
    """`init` is known by its content where both sides tell it: a file may move, and another may take its path."""
    old, new = before.get("init"), now.get("init")
    if old is None or new is None:
        return differences
    others = {name: pair for name, pair in differences.items() if name != "init"}
    return others if old == new else {**others, "init": (f"a file with digest {old}", f"one with {new}")}


def _other_classes(before: list[str], now: list[str]) -> dict[str, tuple[Any, Any]]:
    if len(before) != len(now):
        return {"the data": (f"{len(before)} classes", f"{len(now)} classes")}
    renamed = next(((old, new) for old, new in zip(before, now) if old != new), None)
    return {"a class of the data": renamed} if renamed else {}


def _other_images(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The splits whose images are others, as far as `before` tells (earlier versions did not note their sizes)."""
    known, found = before.get("pictures", {}), now["pictures"]
    return {f"the {name} set": (f"{known[name][0]} images", f"{marks[0]} others")
            for name, marks in found.items() if name in known and known[name] != marks[:len(known[name])]}


def _listed(differences: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} was {old} and is now {new}" for name, (old, new) in differences.items())
