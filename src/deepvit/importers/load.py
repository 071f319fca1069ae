"""`load_model` and `load_weights`: a foreign file becomes one of our models, strictly, one tensor at a time."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deepvit.errors import Untold, UserError, did_you_mean
from deepvit.importers import deepvit, deepvit_flax, google, lucidrains, ours, timm, vit_pytorch
from deepvit.importers.dialect import Dialect, Told
from deepvit.importers.files import WeightsFile, open_weights, takes_average
from deepvit.importers.fill import Head, Report, Source, fill, other_head
from deepvit.importers.positions import Grid, grid_of, native_grid, pair
from deepvit.importers.settings import empty_model, head_width, settings_from_config, settings_from_shapes
from deepvit.importers.table import translate
from deepvit.models import ViT, list_models, model_config

DIALECTS: dict[str, Dialect] = {module.DIALECT.name: module.DIALECT for module in (
    ours, deepvit, google, vit_pytorch, deepvit_flax, lucidrains, timm)}
DECIDED = ("embed_dim", "depth", "num_heads", "in_chans", "patch_size", "qkv_bias")  # a keyword must not contradict
NAMED = ("ours", "deepvit", "timm")  # dialects whose files may leave it to a name what the model is
SCALARS = ("gelu", "norm_eps", "residual_scale", "map_scale", "pool", "final_norm")  # told by no shape
log = logging.getLogger("deepvit")


def load_model(path: str | Path, *, dialect: str | None = None, ema: bool = False, head: Head = "keep",
               arch: str | None = None, grid_size: Sequence[int] | None = None, **keywords: Any) -> ViT:
    """Builds the model that a weights file describes, and loads it strictly. See docs/importing.md for the dialects.

    Args:
        path: a checkpoint of ours, a published `.pth.tar`, Google's `.npz`, flax's npz or msgpack, ...
        dialect: one of `DIALECTS`; None: found out from the content.
        ema: take the averaged weights.
        head: `keep` the file's classifier, or start it anew (`reset`: random, `zero`).
        arch: the model that was trained, where the file does not tell: a name of `list_models()`, of the published
            DeepViT code or of timm.
        grid_size: (rows, columns) of patches that the file's positions stand for, where it does not tell.
        **keywords: of `ViT`, for what the file does not tell (`num_heads`, `pool`, ...) or to change the image size.
    Returns:
        a `ViT` in training mode with `.config` and `.load_report` (a `Report`).
    Raises:
        UserError: the file is missing, torn, poisoned or foreign, or does not fit what was asked.
    """
    source = _understand(path, dialect, ema, arch, keywords)
    _refuse_contradictions(source, keywords)
    config, grid = _settings(source, keywords, grid_size)
    if head == "keep" and config["num_classes"] != source.told["num_classes"]:
        raise other_head(source, config["num_classes"])
    model = empty_model(config, str(source))
    fill(model, source, grid, head)
    model.load_report = source.report
    log.info("%s", source.report)
    return model


def open_model(path: str | Path, weights: str = "auto", **keywords: Any) -> ViT:
    """`load_model` as the commands do, in eval mode; weights: see `takes_average`."""
    return load_model(path, ema=takes_average(path, weights), **keywords).eval()


def told_settings(path: str | Path, given: Mapping[str, Any], dialect: str | None = None, ema: bool = False
                  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a weights file's names and shapes alone.

    Args:
        given: keywords of `ViT` that count whatever the file tells.
    Returns:
        the settings of the model that the file tells, and what it tells besides (`Report.said`).
    Raises:
        UserError: as `load_model`.
    """
    source = _understand(path, dialect, ema, None, given)
    return _settings(source, given, None)[0], source.report.said


def load_weights(model: ViT, path: str | Path, dialect: str | None = None, ema: bool = False, head: Head = "keep",
                 classes: Sequence[str] | None = None, grid_size: Sequence[int] | None = None) -> Report:
    """Loads a weights file into a model you have, strictly; position embeddings are resized to the model's images.

    Args:
        head: `keep` asks for as many classes as the model has; `reset` and `zero` leave the file's head out.
        classes: the model's, in order: a kept head of the same classes in another order is brought into theirs, one
            of other classes is refused, where the file names its own.
        grid_size: as `load_model`.
    Returns:
        a `Report` of what was resized, dropped or does not agree.
    Raises:
        UserError: as `load_model`; the model is unchanged if names or shapes do not fit.
    """
    if not isinstance(model, ViT):
        raise UserError(f"load_weights fills models of deepvit.create_model, not a {type(model).__name__}.")
    heads = model.blocks[0].attn.num_heads
    config = {"residual_scale": None, "map_scale": None, **getattr(model, "config", {}), "num_heads": heads}
    source = _understand(path, dialect, ema, None, config)
    rest = _tells(source, config)
    source.told["num_heads"] = {**source.told, **rest.settings}.get("num_heads", heads)
    source.report.notes += [f"the model has {key}={config[key]}, these weights were made with {rest.settings[key]}"
                            for key in SCALARS if config.get(key, rest.settings.get(key)) != rest.settings.get(key)
                            and key in rest.settings]
    grid = _grid(source, rest.settings.get("img_size"), model.grid_size, grid_size)
    try:
        if source.told["num_heads"] != heads:
            raise UserError(f"{source} has {source.told['num_heads']} heads, the model {heads}: its logits would be "
                            f"others.")
        fill(model, source, grid, head, classes)
    except UserError as error:
        raise UserError(f"{error}{_advice(source, config)}") from None
    log.info("%s", source.report)
    return source.report


def _understand(path: str | Path, dialect: str | None, ema: bool, arch: str | None,
                given: Mapping[str, Any]) -> Source:
    if dialect is not None and dialect not in DIALECTS:
        raise UserError(f"dialect='{dialect}' is not known: choose from {', '.join(DIALECTS)}."
                        f"{did_you_mean(dialect, DIALECTS)}")
    file = open_weights(path, ema)
    if arch is not None:
        file.said |= {"arch": _known_arch(arch)} | ({} if file.said.get("arch") == arch else {"model_args": None})
    spoken = DIALECTS[dialect] if dialect else _find_dialect(file)
    if arch is not None and (spoken.name not in NAMED or "config" in file.said):
        raise UserError(f"{file.path} already says which model it is (dialect '{spoken.name}'): leave arch={arch} out.")
    translation = translate(spoken.rows(file, given), file.shapes, f"{file.path} (read as dialect '{spoken.name}')")
    told = settings_from_shapes(translation.shapes, str(file.path))
    said = {key: value for key, value in file.said.items() if not isinstance(value, Tensor)}
    return Source(file, spoken, translation, told, Report(
        file.path, spoken.name, "ema" if ema else "raw", dropped=dict(translation.dropped), said=said))


def _known_arch(arch: str) -> str:
    known = [*list_models(), *deepvit.ARCHS]
    if arch not in known and not timm.named_model(str(arch)):
        raise UserError(f"arch={arch} is no model known here: choose from {', '.join(known)}, or one of timm's "
                        f"vit_<size>_patch... names.{did_you_mean(arch, known)}")
    return arch


def _find_dialect(file: WeightsFile) -> Dialect:
    names = file.shapes.keys()
    if ours.is_ours(file):
        return DIALECTS["ours"]
    if file.said.get("arch") in deepvit.ARCHS:  # a plain ViT of that code looks like timm's
        return DIALECTS["deepvit"]
    for spoken in DIALECTS.values():
        if spoken.speaks(names):
            return spoken
    raise UserError(f"{file.path} holds tensors such as '{next(iter(names))[:80]}' that no dialect known here has: "
                    f"the dialects are {', '.join(DIALECTS)}.")


def _tells(source: Source, given: Mapping[str, Any]) -> Told:
    rest = source.spoken.tells(source.file, source.told, source.translation.shapes, given)
    source.report.notes += rest.notes
    return rest


def _refuse_contradictions(source: Source, given: Mapping[str, Any]) -> None:
    told = source.told
    wrong = [key for key, value in given.items()
             if key in DECIDED and key in told and value not in (told[key], (told[key],) * 2, [told[key]] * 2)]
    if wrong:
        asked = ", ".join(f"{key}={given[key]!r}" for key in wrong)
        raise UserError(f"{asked} is asked for, but the tensors of {source} say "
                        f"{', '.join(repr(told[key]) for key in wrong)}: leave {', '.join(wrong)} out.")


def _settings(source: Source, given: Mapping[str, Any], grid_size: Sequence[int] | None
              ) -> tuple[dict[str, Any], Grid]:
    """Settings of the model: by shapes, then by the dialect, then by the caller; and the grid of the file's
    positions."""
    told, rest = source.told, _tells(source, given)
    config = model_config("vit") | {"num_heads": None} | told | rest.settings | dict(given)
    if config["num_heads"] is None:
        raise Untold(f"{source} does not tell its number of heads: give num_heads=... ({config['embed_dim']} "
                     f"channels).")
    if "head_dim" not in {**rest.settings, **given}:
        config["head_dim"] = head_width(source.translation.shapes, config["num_heads"], str(source))
    own = rest.settings.get("img_size")
    asked = grid_of(given["img_size"], told["patch_size"]) if "img_size" in given else None
    grid = _grid(source, own, asked, grid_size)
    if asked is None and not (own and grid_of(own, told["patch_size"]) == grid):
        height, width = (side * patch for side, patch in zip(grid, pair(told["patch_size"]), strict=True))
        config["img_size"] = height if height == width else [height, width]
    return config, grid


def _grid(source: Source, own: Any, asked: Grid | None, given: Sequence[int] | None) -> Grid | None:
    """Rows and columns of patches that the file's positions stand for: what is given, what the file's own image size
    makes of them, what is asked for, or a square."""
    count = source.translation.shapes["pos_embed"][1] - 1
    if given is not None:
        if not (isinstance(given, Sequence) and len(given) == 2 and all(isinstance(side, int) for side in given)
                and math.prod(given) == count):
            raise UserError(f"grid_size={given} is not the grid of the {count} patch positions of {source}: give "
                            f"[rows, columns].")
        return tuple(given)
    own = grid_of(own, source.told["patch_size"]) if own else None
    grid = native_grid(count, own, asked or own or (0, 0), source.spoken.square_only, str(source))
    if grid is None and asked is None:
        raise Untold(f"{source} has {count} patch positions, no square: give img_size=[height, width] in pixels.")
    return grid


def _advice(source: Source, config: Mapping[str, Any]) -> str:
    """All settings in which a model differs from the file's tensors, as a command line would set them."""
    if "embed_dim" not in config:
        return ""
    mine = config | settings_from_config({**config, "num_classes": source.told["num_classes"]}, "the model")
    changes = [f"{_typed(key, value)} (now {_typed(key, mine[key]).partition('=')[2]})"
               for key, value in source.told.items() if key in mine and mine[key] != value]
    return f" The weights are of a model with {', '.join(changes)}." if changes else ""


def _typed(key: str, value: Any) -> str:
    """A setting as a command line has it."""
    if key == "attention":
        return f"model/attention={value['name']}"
    plain = "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")
    return f"model.{key}={plain}"
