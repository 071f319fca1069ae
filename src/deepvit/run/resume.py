"""Whether a command may go on with what stands in a run folder."""

import logging
from collections.abc import Mapping
from typing import Any

import yaml

from deepvit.engine.folder import RunFolder
from deepvit.errors import UserError
from deepvit.run import build

KEPT = ("model", "data", "augment", "seed", "init", "head", "ema", "optimizer")  # as they were, but for:
NAMED = ("optimizer.lr", "optimizer.clip_grad")
ADVICE = "choose another folder with hydra.run.dir=..., or start over with fresh=true."

log = logging.getLogger(__name__)


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that a continued run must share or be told about: no paths, no engine."""
    kept = {name: value for name, value in config.items() if name not in ("engine", "fresh", "dry", "probe", "logger")}
    kept["data"] = {name: value for name, value in config["data"].items()
                    if name not in ("root", "workers", "eval_batch_size", "in_memory_mb")}
    return kept


def images_of(splits) -> dict[str, list[Any]]:
    """How many images are in both splits, and which."""
    return {name: [len(part), part.fingerprint()] for name, part in (("train", splits.train), ("val", splits.val))}


def refuse_finished(folder: RunFolder, config: Mapping[str, Any]) -> None:
    """A finished run answers the command that made it, and no other."""
    before = yaml.safe_load(folder.config.read_text())
    differences = build.changed(comparable(before), comparable(config))
    if differences:
        raise UserError(f"The run in {folder.path} is finished with other settings: {_listed(differences)}. To train "
                        f"with these, {ADVICE}")
    roots = before["data"].get("root"), config["data"].get("root")
    if roots[0] != roots[1]:
        log.warning("It was trained on data.root=%s, not %s.", *roots)


def refuse_change(content: Mapping[str, Any], config: Mapping[str, Any], splits) -> None:
    """A continued run keeps its model, data, optimizer and randomness; another rate or schedule is only named.

    content: of the checkpoint that would be continued.
    """
    differences = build.changed(comparable(content["run"]), comparable(config))
    refused = {name: pair for name, pair in differences.items()
               if name.split(".")[0] in KEPT and name not in NAMED} | _other_data(content, splits)
    if refused:
        raise UserError(f"This run cannot be continued with other settings: {_listed(refused)}. Give them as before, "
                        f"{ADVICE}")
    for name, (old, new) in differences.items():
        log.warning("Continuing with %s=%s (was %s).", name, new, old)


def _other_data(content: Mapping[str, Any], splits) -> dict[str, tuple[Any, Any]]:
    before, now = content["classes"], splits.class_ids
    if len(before) != len(now):
        return {"the data": (f"{len(before)} classes", f"{len(now)} classes")}
    renamed = next(((old, new) for old, new in zip(before, now) if old != new), None)
    if renamed:
        return {"a class of the data": renamed}
    found, known = images_of(splits), content.get("pictures", {})
    return {f"the {name} set": (f"{known[name][0]} pictures", f"{count} others" if count == known[name][0] else count)
            for name, (count, mark) in found.items() if known.get(name, [count, mark]) != [count, mark]}


def _listed(differences: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} was {old} and is now {new}" for name, (old, new) in differences.items())
