"""`load_model` and `load_weights`: a foreign file becomes one of our models, strictly, one tensor at a time."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from deepvit.config.signature import parameters_of
from deepvit.errors import Untold, UserError, choose, did_you_mean
from deepvit.importers import deepvit, google, lucidrains, ours, timm
from deepvit.importers.dialect import Dialect, Report, Source, Step, foreign_name, translate
from deepvit.importers.files import open_weights
from deepvit.importers.settings import Grid, empty_model, grid_of, settings_from_config, settings_from_shapes
from deepvit.models import ATTENTIONS, Attention, ViT, list_models, model_config
from deepvit.models.init import init_weights
from deepvit.models.stem import plain
from deepvit.models.vit import PLAIN

# In the order in which they are tried: timm's names are in ours and in the published checkpoints too
DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (
    ours.OURS, deepvit.DEEPVIT, google.GOOGLE, google.VIT_PYTORCH, lucidrains.FLAX, lucidrains.LUCIDRAINS, timm.TIMM)}
TIMM_HEADS = {192: "tiny has 3", 384: "small has 6", 768: "base has 12", 1024: "large has 16", 1280: "huge has 16"}
DECIDED = ("embed_dim", "depth", "num_heads", "in_chans", "patch_size", "qkv_bias")  # a keyword must not contradict
NAMED = ("ours", "deepvit", "timm")  # dialects whose files may identify the model by name alone
SCALARS = ("gelu", "norm_eps", "qk_scale", "block", "residual_scale", "map_scale", "pool", "final_norm")
TRAINING = ("theta_init", "attn_drop", "proj_drop", "norm_batch")  # of an attention
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WEIGHTS = {"auto": None, "ema": True, "raw": False}  # what a command is asked for -> `ema`
Head = Literal["keep", "reset", "zero"]
log = logging.getLogger("deepvit")


def load_model(path: str | Path, *, dialect: str | None = None, ema: bool | None = False, head: Head = "keep",
               arch: str | None = None, grid_size: Sequence[int] | None = None, **keywords: Any) -> ViT:
    """Builds the model that a weights file describes, and loads it strictly. See docs/importing.md for the dialects.

    Args:
        path: a file of weights, a run's folder, or a name such as `timm:NAME`: see `find_checkpoint`.
        dialect: one of `DIALECTS` (default: detected from the content).
        ema: take the averaged weights (None: if the file has any).
        head: `keep` the file's classifier, or start it anew (`reset`: random, `zero`).
        arch, grid_size: what the file does not say: the model that was trained, by a name of `list_models()`, of the
            published DeepViT code or of timm; and (rows, columns) of patches that its positions stand for.
        **keywords: of `ViT`, for what the file does not say (`num_heads`, `pool`, ...) or to change the image size.

    Returns a `ViT` in training mode with `.config` and `.load_report` (a `Report`). Raises UserError if the file is
    missing, torn, poisoned or foreign, or does not fit what was asked."""
    source = _understand(path, dialect, ema, arch, keywords)
    inferred = source.dialect.infer(source, keywords)
    _refuse_contradictions(source, inferred, keywords)
    config, grid = _settings(source, inferred, keywords, grid_size)
    model = empty_model(config, str(source))
    _fill(model, source, grid, head)
    return model


def _drop_other_names(report: Report, count: int, head: Head) -> None:
    """Classes are named by a file whose head is kept, and has as many."""
    names = report.said.get("classes")
    if names is not None and (head != "keep" or not isinstance(names, list) or len(names) != count):
        report.said = {key: value for key, value in report.said.items() if key not in ("classes", "class_names")}
        report.notes.append(f"the classes that the file names are not those of the {count} logits: left out")


def _is_uncalibrated(source: Source) -> bool:
    """Whether these are averages of ours from between two evaluations, each of which gives them statistics."""
    said = source.report.said
    is_evaluated = "metrics" in said or said.get("evaluated") == said.get("step")
    return "averaged" in said or source.file.is_average and not is_evaluated


def open_model(path: str | Path, weights: str = "auto", **keywords: Any) -> ViT:
    """`load_model` as the commands do, in eval mode. `weights`: `ema`, `raw`, or `auto`, the average if it has one."""
    return load_model(path, ema=choose("weights", weights, WEIGHTS), **keywords).eval()


def told_settings(path: str | Path, given: Mapping[str, Any], dialect: str | None
                  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's settings by the names and shapes alone of a weights file (the average, where there is one), and the
    file's metadata (`Report.said`). `given`: keywords of `ViT` that override the file. UserError as `load_model`."""
    source = _understand(path, dialect, None, None, given)
    return _settings(source, source.dialect.infer(source, given), given, None)[0], source.report.said


def load_weights(model: ViT, path: str | Path, dialect: str | None = None, ema: bool | None = False,
                 head: Head = "keep", classes: Sequence[str] | None = None,
                 grid_size: Sequence[int] | None = None) -> Report:
    """Loads a weights file into a model you have, strictly; position embeddings are resized to the model's images.

    Args:
        path, dialect, ema, grid_size: as `load_model`.
        head: `keep` asks for as many classes as the model has; `reset` and `zero` leave the file's head out.
        classes: the model's, in order: a kept head of the same classes is reordered, one of others is refused.

    Returns a `Report` of what was resized, dropped or does not agree, which is also the model's `.load_report`. Raises
    UserError as `load_model`; the model is unchanged if names or shapes do not fit."""
    if not isinstance(model, ViT):
        raise UserError(f"load_weights fills models of deepvit.create_model, not a {type(model).__name__}.")
    config = model.config
    source = _understand(path, dialect, ema, None, config)
    inferred = source.dialect.infer(source, config)
    mine, theirs = _shapeless(config), _shapeless(inferred)
    if theirs.get("pool") == "cls":
        theirs.pop("final_norm", None)  # of one token, which it gives the same before and after it is taken
    source.report.notes += [f"the model has {key}={mine.get(key)}, these weights were made with {value}"
                            for key, value in theirs.items() if mine.get(key) != value]
    grid = _grid(source, inferred.get("img_size"), model.grid_size, grid_size)
    source.settings["num_heads"] = heads = {**config, **source.settings, **inferred}["num_heads"]
    try:
        if heads != config["num_heads"]:
            raise UserError(f"{source} has {heads} heads, the model {config['num_heads']}: its logits would differ.")
        _fill(model, source, grid, head, classes)
    except UserError as error:
        raise UserError(f"{error}{_advice(source, config)}") from None
    return source.report


def _shapeless(config: Mapping[str, Any]) -> dict[str, Any]:
    """What no shape determines of a model's logits, by path: scalars, and all of the attention and the stem."""
    found, stem = {key: config[key] for key in SCALARS if key in config}, config.get("stem")
    if "attention" in config and isinstance(rule := config["attention"] or PLAIN, Mapping):
        usual = parameters_of(ATTENTIONS.get(str(rule.get("class")), Attention))[0]
        found |= {f"attention.{key}": rule.get(key, one.default) for key, one in usual.items() if key not in TRAINING}
        found["attention.class"] = rule.get("class")
    arithmetic = stem.get("arithmetic", "google") if isinstance(stem, Mapping) else "google"
    return found | ({"stem.arithmetic": arithmetic} if stem else {})


def _understand(path: str | Path, dialect: str | None, ema: bool | None, arch: str | None,
                given: Mapping[str, Any]) -> Source:
    known = None if dialect is None else choose("dialect", dialect, DIALECTS)
    file = open_weights(path, ema)
    if arch is not None:
        file.said |= {"arch": _known_arch(arch)} | ({} if file.said.get("arch") == arch else {"model_args": None})
    found = known or next((one for one in DIALECTS.values() if one.matches(file)), None)
    if found is None:
        raise UserError(f"{file.path} holds tensors such as '{next(iter(file.shapes))[:80]}', which are of no dialect "
                        f"of {', '.join(DIALECTS)}: give the weights of a ViT.")
    if arch is not None and (found.name not in NAMED or "config" in file.said):
        raise UserError(f"{file.path} already says which model it is (dialect '{found.name}'): leave arch={arch} out.")
    rows = found.rows(file, given)
    steps, dropped = translate(rows, file.shapes, f"{file.path} (read as dialect '{found.name}')")
    settings = settings_from_shapes({name: step.shape for name, step in steps.items()}, str(file.path))
    said = {key: value for key, value in file.said.items() if not isinstance(value, Tensor)}
    report = Report(file.path, found.name, "ema" if file.is_average else "raw", dropped=dropped, said=said)
    return Source(file, found, rows, steps, settings, report)


def _known_arch(arch: str) -> str:
    known = [*list_models(), *deepvit.ARCHS]
    if arch not in known and not timm.named_model(str(arch)):
        raise UserError(f"arch={arch} is not a known model: choose from {', '.join(known)}, or one of timm's "
                        f"vit_<size>_patch... names.{did_you_mean(arch, known)}")
    return arch


def _refuse_contradictions(source: Source, inferred: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    shaped, asked, told = source.settings, given.get("attention"), inferred.get("attention")
    if isinstance(asked, Mapping):  # what an attention says for itself wins over the model's
        given, shaped = {**given, **asked}, {**shaped, **(told if isinstance(told, Mapping) else {})}
    wrong = [key for key in given if key in DECIDED and key in shaped
             and given[key] not in (shaped[key], (shaped[key],) * 2, [shaped[key]] * 2)]
    if wrong:
        words = ", ".join(f"{key}={given[key]!r}" for key in wrong)
        raise UserError(f"{words} is asked for, but {source} says "
                        f"{', '.join(repr(shaped[key]) for key in wrong)}: leave {', '.join(wrong)} out.")


def _settings(source: Source, inferred: Mapping[str, Any], given: Mapping[str, Any], grid_size: Sequence[int] | None
              ) -> tuple[dict[str, Any], Grid]:
    """Settings by shapes, then by the dialect, then by the caller; and the grid of the file's positions."""
    shaped = source.settings
    config = model_config("vit") | {"num_heads": None} | shaped | inferred | dict(given)
    if config["num_heads"] is None:
        width, models = config["embed_dim"], {name: model_config(name) for name in list_models()}
        alike = [f"timm's {TIMM_HEADS[width]}"] if width in TIMM_HEADS else []
        alike += [f"{name} has {model['num_heads']}" for name, model in models.items()
                  if (model["embed_dim"], model["attention"]["class"]) == (width, "SelfAttention")]
        raise Untold(f"{source} does not give its number of heads: give num_heads=..., or arch=NAME of a known model"
                     f" (of width {width}: {', '.join(alike) or 'none'}).")
    if shaped["stem"] == "conv" and not {"residual_scale", "map_scale"} <= {**inferred, **given}.keys():
        raise Untold(f"{source} does not give residual_scale and map_scale: give them (published: 0.5 and, in L, 1.0, "
                     f"in S head_dim**-0.5), or arch=NAME (such as deepvit_s).")
    if "head_dim" not in {**inferred, **given}:
        inner, heads = source.steps["blocks.0.attn.qkv.weight"].shape[0] // 3, config["num_heads"]
        if not isinstance(heads, int) or heads < 1 or inner % heads:
            raise UserError(f"The {inner} channels of {source} do not divide into {heads} heads: change num_heads.")
        config["head_dim"] = None if inner == shaped["embed_dim"] else inner // heads
    own, patch = inferred.get("img_size"), shaped["patch_size"]
    wanted = grid_of(given["img_size"], patch) if "img_size" in given else None
    grid = _grid(source, own, wanted, grid_size)
    if wanted is None and not (own and grid_of(own, patch) == grid):
        config["img_size"] = plain([side * pixels for side, pixels in zip(grid, to_2tuple(patch), strict=True)])
    return config, grid


def _grid(source: Source, own: Any, wanted: Grid | None, given: Sequence[int] | None) -> Grid:
    """The grid of the file's positions: `given`, or of its `own` image size, or a square, or the `wanted` model's."""
    count = source.steps["pos_embed"].shape[1] - 1
    if given is not None:
        if not (isinstance(given, Sequence) and len(given) == 2 and all(isinstance(side, int) for side in given)
                and math.prod(given) == count):
            raise UserError(f"grid_size={given} does not make the {count} positions of {source}: give [rows, columns].")
        return tuple(given)
    if own and math.prod(grid := grid_of(own, source.settings["patch_size"])) == count:
        return grid
    side = math.isqrt(max(count, 0))
    fitting = [(side, side)] if side * side == count > 0 else []
    if wanted and math.prod(wanted) == count and not source.dialect.square_only and wanted not in fitting:
        fitting.append(wanted)
    if len(fitting) != 1:
        grids = " or ".join(f"{rows}x{columns}" for rows, columns in fitting) or "no square"
        raise Untold(f"{source} has {count} patch positions, {grids}: give grid_size=[rows, columns] of the file.")
    return fitting[0]


def _advice(source: Source, config: Mapping[str, Any]) -> str:
    """All settings in which a model differs from the file's tensors, as a command line would set them."""
    mine = config | settings_from_config({**config, "num_classes": source.settings["num_classes"]}, "the model")
    changes = [f"{_typed(key, value)} (now {_typed(key, mine[key]).partition('=')[2]})"
               for key, value in source.settings.items() if key in mine and mine[key] != value]
    return f" The weights are of a model with {', '.join(changes)}." if changes else ""


def _typed(key: str, value: Any) -> str:
    """A setting as a command line has it."""
    if key == "attention":
        return f"model/attention={value['name']}"
    shown = "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")
    return f"model.{key}={shown}"


def _fill(model: ViT, source: Source, grid: Grid, head: Head, classes: Sequence[str] | None = None) -> None:
    """Copies the weights into the model, which is unchanged unless names, shapes and classes fit, and reports it."""
    choose("head", head, dict.fromkeys(get_args(Head)))
    report, steps = source.report, dict(source.steps)
    order = _order_of_classes(source, classes) if head == "keep" else None
    _set_head_aside(model, source, steps, head)
    _check_fit(model, source, steps, head)
    state = _with_storage(model, source)
    with torch.no_grad():
        for name, step in steps.items():
            tensor = _read(source, step)
            if name == "pos_embed" and grid != model.grid_size:
                tensor = source.dialect.resize(tensor, grid, model.grid_size)
                sizes = " -> ".join(f"{rows}x{columns}" for rows, columns in (grid, model.grid_size))
                report.resized.append(f"pos_embed {sizes} patches by the rule '{source.dialect.resize.__name__}'")
            state[name].copy_(tensor[order] if order and name.startswith("head.") else tensor)
        for name in state.keys() - steps:
            if name.endswith("num_batches_tracked"):
                state[name].zero_()
        if head != "keep" and isinstance(model.head, nn.Linear):
            if head == "reset":
                init_weights(model.head, model.config["init_std"])
            else:
                nn.init.zeros_(model.head.weight)
                nn.init.zeros_(model.head.bias)
    report.tensors, report.fresh = len(steps), [name for name in state if name not in steps]
    report.head = model.head if head == "keep" else None
    if model.norm_batches and _is_uncalibrated(source):
        report.notes.append("its weights are averages with the batch statistics of others: evaluate with calibrate=512")
    _drop_other_names(report, model.num_classes, head)
    model.load_report = report
    log.info("%s", report)


def _order_of_classes(source: Source, classes: Sequence[str] | None) -> list[int] | None:
    """Rows of the file's head in the order of `classes`; None if they are already, or the file names no classes."""
    held = source.report.said.get("classes")
    if classes is None or not isinstance(held, list) or len(held) != len(classes) or held == list(classes):
        return None
    places = {str(name): index for index, name in enumerate(held)}
    if strange := {*places} ^ {*classes}:
        raise UserError(f"{source} and the data differ in classes such as {', '.join(sorted(map(repr, strange))[:4])}: "
                        f"start the head anew with head=reset (or head=zero).")
    source.report.notes.append("its classes are the data's in another order: the head's rows were reordered")
    source.report.said |= {"classes": list(classes), "class_names": None}
    return [places[name] for name in classes]


def _set_head_aside(model: ViT, source: Source, steps: dict[str, Step], head: Head) -> None:
    """Leaves out a head that starts anew; refuses one of another size that is kept."""
    held = source.settings["num_classes"]
    if head == "keep":
        if held != model.num_classes:
            raise UserError(f"{source} has {held} classes, the model {model.num_classes}: set head=reset (or zero).")
        return
    without = ("head.", "pre_logits.") if isinstance(model.pre_logits, nn.Identity) else ("head.",)
    for name in [name for name in steps if name.startswith(without)]:
        source.report.dropped |= dict.fromkeys(steps.pop(name).foreign, f"head={head}")


def _check_fit(model: ViT, source: Source, steps: Mapping[str, Step], head: Head) -> None:
    """The file must hold every parameter and buffer with its shape, except the number of positions, and no other."""
    rows, state = source.rows, model.state_dict()
    for name, tensor in state.items():
        if name not in steps:
            if name.endswith("num_batches_tracked") or (head != "keep" and name.startswith("head.")):
                continue
            raise UserError(f"{source} lacks '{foreign_name(rows, name)}', which the model needs.")
        if steps[name].shape != tensor.shape and name != "pos_embed":
            raise UserError(f"{source} has '{foreign_name(rows, name)}' as {tuple(steps[name].shape)} in our layout, "
                            f"the model has {tuple(tensor.shape)}.")
    if extra := next((name for name in steps if name not in state), None):
        raise UserError(f"{source} has '{foreign_name(rows, extra)}', for which the model has no place.")


def _with_storage(model: ViT, source: Source) -> dict[str, Tensor]:
    """The model's parameters and buffers, in memory."""
    try:
        if model.cls_token.is_meta:
            model.to_empty(device="cpu")
    except RuntimeError:
        raise UserError(f"{source} at {model.img_size} pixels does not fit into memory: reduce img_size.") from None
    return model.state_dict(keep_vars=True)


def _read(source: Source, step: Step) -> Tensor:
    """A parameter from the file; UserError for one that is no finite floating point."""
    tensor, name = step.rule.ours(*(source.file.read(foreign) for foreign in step.foreign)), step.foreign[0]
    if name.endswith("num_batches_tracked") and not tensor.is_complex():
        return tensor
    if tensor.dtype not in FLOATS:
        raise UserError(f"{source} holds '{name}' as {tensor.dtype}: give floating point of 16 to 64 bits.")
    if not tensor.isfinite().all():
        raise UserError(f"{source} holds NaN or infinity in '{name}': take an earlier checkpoint.")
    return tensor
