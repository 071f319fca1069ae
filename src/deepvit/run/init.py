"""The model of a run that starts from a checkpoint: the one that the file tells."""

import logging
from collections.abc import Mapping
from typing import Any

import yaml

from deepvit.data import name_of_norm
from deepvit.engine.folder import RunFolder
from deepvit.errors import Untold
from deepvit.models import model_config

TRAINING = ("num_classes", "drop_rate", "pos_drop_rate", "attn_drop_rate", "drop_path_rate")  # not the file's
ADVICE = ("To train from it give settings as model.num_heads=... and a model's name as model=NAME; or write them into "
          "a file once: deepvit export FILE --to safetensors KEY=VALUE.")
log = logging.getLogger(__name__)


def with_model_of_init(config: Mapping[str, Any], folder: RunFolder | None = None) -> Mapping[str, Any]:
    """`config` with the model (and the normalisation of its images) that `init` tells.

    What was typed counts, whatever the file tells: `model=NAME` wholly, `model.*` each for itself. Dropout and
    stochastic depth are the run's, and a recipe may ask for larger images than the file's, but not for smaller ones. A
    run that goes on in `folder` keeps its model.

    Raises:
        UserError: the file cannot be read, or does not tell its model.
    """
    typed = {word.lstrip("+~").partition("=")[0] for word in (config.get("origin") or {}).get("overrides", ["model="])}
    if config["init"] is None or "model" in typed:
        return config
    model = config["model"]
    own = {name: model[name] for name in model if f"model.{name}" in typed}
    if "model/attention" in typed:
        own["attention"] = model["attention"]
    told, norm = _begun(folder, config) or _told(config, own)
    options = {name: value for name, value in model["attention"].items() if f"model.attention.{name}" in typed}
    merged = {**told, **{name: model[name] for name in TRAINING}, **own}
    merged["attention"] = {**merged["attention"], **options}
    data = {**config["data"], "img_size": merged["img_size"]}
    if norm and "data.norm" not in typed:
        data["norm"] = norm
    return {**config, "model": merged, "data": data}


def _begun(folder: RunFolder | None, config: Mapping[str, Any]) -> tuple[dict[str, Any], str] | None:
    """The model and the normalisation of the run that goes on, if one does."""
    if folder is None or config["fresh"] or not folder.last.exists() or not folder.config.exists():
        return None
    try:
        run = yaml.safe_load(folder.config.read_text())
        return (run["model"], run["data"]["norm"]) if run["init"] is not None else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return None  # whoever continues the run says so


def _told(config: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    from deepvit.importers import takes_average, told_settings
    try:
        told, said = told_settings(config["init"], own, config["dialect"], takes_average(config["init"]))
    except Untold as error:
        raise Untold(f"{error} {ADVICE}") from None
    usual = model_config(config["origin"].get("choices", {}).get("model", "vit"))["img_size"]
    wanted = config["model"]["img_size"]
    if wanted != usual and _pixels(wanted) > _pixels(told["img_size"]):
        told["img_size"] = wanted
    mean, std = said.get("mean"), said.get("std")
    norm = (said.get("run") or {}).get("data", {}).get("norm") or name_of_norm(mean, std)
    if norm is None and mean:
        log.warning("init=%s was trained on images of mean %s and std %s, which no data.norm has: it stays %s.",
                    config["init"], mean, std, config["data"]["norm"])
    return told, norm


def _pixels(size: Any) -> int:
    return size * size if isinstance(size, int) else size[0] * size[1]
