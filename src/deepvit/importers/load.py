"""`load_model` and `load_weights`: a foreign file becomes one of our models, strictly, one tensor at a time."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepvit.errors import UserError, did_you_mean
from deepvit.importers import deepvit, deepvit_flax, google, lucidrains, ours, timm, vit_pytorch
from deepvit.importers.dialect import Dialect
from deepvit.importers.files import WeightsFile, open_weights
from deepvit.importers.settings import native_grid, settings_from_shapes
from deepvit.importers.table import Translation, foreign_name, translate
from deepvit.models import ViT, build_model, model_config
from deepvit.models.init import init_weights

Head = Literal["keep", "reset", "zero"]
DIALECTS: dict[str, Dialect] = {module.DIALECT.name: module.DIALECT for module in (
    ours, deepvit, google, vit_pytorch, deepvit_flax, lucidrains, timm)}
DECIDED = ("embed_dim", "depth", "num_heads", "in_chans", "patch_size", "qkv_bias")  # a keyword must not contradict
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
log = logging.getLogger("deepvit")


@dataclass
class Report:
    """What was done to load a file: `print(report)` says it in sentences."""

    path: Path
    dialect: str
    tensors: int = 0  # loaded into the model
    resized: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)  # name in the file -> why
    fresh: list[str] = field(default_factory=list)  # parameters that did not come from the file
    notes: list[str] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)  # what the file tells beside weights: arch, classes, ...

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.tensors} tensors, read as dialect '{self.dialect}'"]
        lines += [f"  resized: {text}" for text in self.resized]
        for why in dict.fromkeys(self.dropped.values()):
            names = [name for name, reason in self.dropped.items() if reason == why]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  dropped: {', '.join(names[:3])}{more} ({why})")
        lines += [f"  not from the file: {', '.join(self.fresh)}"] if self.fresh else []
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def load_model(path: str | Path, *, dialect: str | None = None, ema: bool = False, head: Head = "keep",
               **keywords: Any) -> ViT:
    """Builds the model that a weights file tells, and loads it strictly. See docs/importing.md for the dialects.

    Args:
        path: a checkpoint of ours, a published `.pth.tar`, Google's `.npz`, flax's npz or msgpack, ...
        dialect: one of `DIALECTS`; None: found out from the content.
        ema: take the averaged weights.
        head: `keep` the file's classifier, or start it anew (`reset`: random, `zero`).
        **keywords: of `ViT`, for what the file does not tell (`num_heads`, `pool`, ...) or to change the picture size.
    Returns:
        a `ViT` in training mode with `.config` and `.load_report` (a `Report`).
    Raises:
        UserError: the file is missing, torn, poisoned or foreign, or does not fit what was asked.
    """
    file, spoken, translation, report = _understand(path, dialect, ema, keywords)
    config = _settings(file, spoken, translation, keywords, head, report)
    model = _empty_model(config, file)
    positions = translation.shapes["pos_embed"]
    if "img_size" not in keywords and positions[1:2] != model.pos_embed.shape[1:2]:
        raise UserError(f"{file.path} says img_size {config['img_size']}, which its positions {tuple(positions)} do "
                        f"not fit: it is torn or forged.")
    _fill(model, file, spoken, translation, head, report)
    model.load_report = report
    log.info("%s", report)
    return model


def load_weights(model: ViT, path: str | Path, dialect: str | None = None, ema: bool = False,
                 head: Head = "keep") -> Report:
    """Loads a weights file into a model you have, strictly; position embeddings are resized to the model's pictures.

    Args:
        head: `keep` asks for as many classes as the model has; `reset` and `zero` leave the file's head out.
    Returns:
        a `Report` of what was resized, dropped or does not agree.
    Raises:
        UserError: as `load_model`; the model is unchanged if names or shapes do not fit.
    """
    if not isinstance(model, ViT):
        raise UserError(f"load_weights fills models of deepvit.create_model, not a {type(model).__name__}.")
    config = getattr(model, "config", {})
    file, spoken, translation, report = _understand(path, dialect, ema, {"in_chans": config.get("in_chans")})
    told = settings_from_shapes(translation.shapes, str(file.path))
    heads = model.blocks[0].attn.num_heads
    rest = spoken.tells(file, told, translation.shapes,
                        {"residual_scale": None, "map_scale": None, **config, "num_heads": heads})
    if rest.settings.get("num_heads", heads) != heads:
        raise UserError(f"{file.path} has {rest.settings['num_heads']} heads, the model {heads}: its logits would be "
                        f"others; build the model with num_heads={rest.settings['num_heads']}.")
    report.notes += rest.notes
    for key in ("gelu", "norm_eps", "residual_scale", "map_scale", "pool", "final_norm"):
        if key in config and key in rest.settings and config[key] != rest.settings[key]:
            report.notes.append(f"the model has {key}={config[key]}, these weights were made with {rest.settings[key]}")
    _fill(model, file, spoken, translation, head, report)
    log.info("%s", report)
    return report


def _understand(path: str | Path, dialect: str | None, ema: bool,
                given: Mapping[str, Any]) -> tuple[WeightsFile, Dialect, Translation, Report]:
    if dialect is not None and dialect not in DIALECTS:
        raise UserError(f"dialect='{dialect}' is not known: choose from {', '.join(DIALECTS)}."
                        f"{did_you_mean(dialect, DIALECTS)}")
    file = open_weights(path, ema)
    spoken = DIALECTS[dialect] if dialect else _find_dialect(file)
    translation = translate(spoken.rows(file, given), file.shapes, f"{file.path} (read as dialect '{spoken.name}')")
    said = {key: value for key, value in file.said.items() if not isinstance(value, Tensor)}
    return file, spoken, translation, Report(file.path, spoken.name, dropped=dict(translation.dropped), said=said)


def _find_dialect(file: WeightsFile) -> Dialect:
    if ours.is_ours(file):
        return DIALECTS["ours"]
    if file.said.get("arch") in deepvit.ARCHS:  # a plain ViT of that code looks like timm's
        return DIALECTS["deepvit"]
    names = file.shapes.keys()
    for spoken in DIALECTS.values():
        if spoken.speaks(names):
            return spoken
    raise UserError(f"{file.path} holds tensors such as '{next(iter(names))[:80]}' that no dialect known here has: "
                    f"the dialects are {', '.join(DIALECTS)}.")


def _settings(file: WeightsFile, spoken: Dialect, translation: Translation, given: Mapping[str, Any], head: Head,
              report: Report) -> dict[str, Any]:
    """Settings of the model: by shapes, then by the dialect, then by the caller for what the file leaves open."""
    told = settings_from_shapes(translation.shapes, str(file.path))
    rest = spoken.tells(file, told, translation.shapes, given)
    report.notes += rest.notes
    for key, value in given.items():
        if key in DECIDED and key in told and value not in (told[key], (told[key],) * 2, [told[key]] * 2):
            raise UserError(f"{key}={value!r} is asked for, but the tensors of {file.path} say {told[key]!r}: "
                            f"leave {key} out.")
    config = model_config("vit") | {"num_heads": None, "img_size": None} | told | rest.settings | dict(given)
    if config["num_heads"] is None:
        raise UserError(f"{file.path} does not tell its number of heads: give num_heads=... "
                        f"({config['embed_dim']} channels).")
    if config["img_size"] is None:
        raise UserError(f"{file.path} has {translation.shapes['pos_embed'][1] - 1} patch positions, no square: "
                        f"give img_size=(height, width) in pixels.")
    if head == "keep" and config["num_classes"] != told["num_classes"]:
        raise _other_head(file, told["num_classes"], config["num_classes"])
    return config


def _other_head(file: WeightsFile, held: int, wanted: int) -> UserError:
    return UserError(f"{file.path} has {f'a head of {held} classes' if held else 'no head'}, the model is to have "
                     f"{wanted}: start the head anew with head=reset (or head=zero).")


def _empty_model(config: dict[str, Any], file: WeightsFile) -> ViT:
    """The model without storage: its shapes are compared with the file's before any memory is taken."""
    try:
        with torch.device("meta"):
            return build_model(config)
    except UserError as error:
        raise UserError(f"{file.path} with the settings given makes no model: {error}") from None
    except (RuntimeError, ValueError, TypeError, OverflowError, ZeroDivisionError, IndexError) as error:
        raise UserError(f"{file.path} has settings that make no model ({str(error).splitlines()[0][:100]}).") from None


def _fill(model: ViT, file: WeightsFile, spoken: Dialect, translation: Translation, head: Head, report: Report) -> None:
    if head not in ("keep", "reset", "zero"):
        raise UserError(f"head={head!r} is not known: choose from keep, reset, zero.")
    steps, shapes = dict(translation.steps), dict(translation.shapes)
    _set_head_aside(model, file, steps, shapes, head, report)
    _check_fit(model, file, translation, shapes, head)
    state = model.state_dict(keep_vars=True)
    fresh = [name for name in state if name not in steps]
    if any(tensor.is_meta for tensor in state.values()):
        try:
            model.to_empty(device="cpu")
        except RuntimeError as error:
            raise UserError(f"The model of {file.path} for pictures of {model.img_size} pixels does not fit into "
                            f"memory ({str(error)[-80:]}): choose a smaller img_size.") from None
        state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, step in steps.items():
            tensor = step.rule.ours(*(file.read(foreign) for foreign in step.foreign))
            _check_numbers(file, step.foreign, tensor)
            if name == "pos_embed" and tensor.shape != state[name].shape:
                tensor = _resize(model, tensor, file, spoken, report)
            state[name].copy_(tensor)
        _start_fresh(model, state, fresh, head)
    report.tensors, report.fresh = len(steps), fresh


def _set_head_aside(model: ViT, file: WeightsFile, steps: dict, shapes: dict, head: Head, report: Report) -> None:
    """Takes the head out of the plan where it is to start anew; refuses one of another size where it is not."""
    held = shapes["head.weight"][0] if "head.weight" in shapes else 0
    if head == "keep" and held != model.num_classes:
        raise _other_head(file, held, model.num_classes)
    without = () if head == "keep" else ("head.", "pre_logits.") if _no_pre_logits(model) else ("head.",)
    for name in [name for name in steps if name.startswith(without)] if without else []:
        report.dropped |= dict.fromkeys(steps.pop(name).foreign, f"head={head}")
        del shapes[name]


def _no_pre_logits(model: ViT) -> bool:
    return isinstance(model.pre_logits, nn.Identity)


def _check_fit(model: ViT, file: WeightsFile, translation: Translation, shapes: Mapping[str, torch.Size],
               head: Head) -> None:
    """Every parameter and buffer must be in the file with its shape, and nothing else."""
    rows, state = translation.rows, model.state_dict()
    for name, tensor in state.items():
        if name not in shapes:
            if name.endswith("num_batches_tracked") or (head != "keep" and name.startswith("head.")):
                continue
            raise UserError(f"{file.path} lacks '{foreign_name(rows, name)}', which the model needs.")
        if shapes[name] != tensor.shape and name != "pos_embed":
            raise UserError(f"{file.path} has '{foreign_name(rows, name)}' as {tuple(shapes[name])} in our layout, the "
                            f"model has {tuple(tensor.shape)}.")
    if extra := [name for name in shapes if name not in state]:
        raise UserError(f"{file.path} has '{foreign_name(rows, extra[0])}'"
                        f"{f' and {len(extra) - 1} more' if len(extra) > 1 else ''}, for which the model has no place.")
    if len(shapes["pos_embed"]) != 3 or shapes["pos_embed"][2] != model.embed_dim:
        raise UserError(f"{file.path} has position embeddings of {tuple(shapes['pos_embed'])}, "
                        f"the model needs {tuple(model.pos_embed.shape)}.")


def _check_numbers(file: WeightsFile, names: tuple[str, ...], tensor: Tensor) -> None:
    if names[0].endswith("num_batches_tracked") and not tensor.is_complex():
        return
    if tensor.dtype not in FLOATS:
        raise UserError(f"{file.path} holds '{names[0]}' as {tensor.dtype}, no floating point of 16 to 64 bits: "
                        f"it is refused.")
    if not tensor.isfinite().all():
        raise UserError(f"{file.path} holds NaN or infinity in '{names[0]}': its training went wrong, take another "
                        f"checkpoint.")


def _resize(model: ViT, pos: Tensor, file: WeightsFile, spoken: Dialect, report: Report) -> Tensor:
    old = native_grid({"pos_embed": pos.shape}, {}, list(model.patch_size))
    if old is None:
        raise UserError(f"{file.path} has {pos.shape[1] - 1} patch positions, no square, and the model needs "
                        f"{model.pos_embed.shape[1] - 1}: load it at its own picture size.")
    report.resized.append(f"pos_embed {old[0]}x{old[1]} -> {model.grid_size[0]}x{model.grid_size[1]} patches "
                          f"by the rule '{spoken.resize.__name__}'")
    return spoken.resize(pos, old, model.grid_size)


def _start_fresh(model: ViT, state: Mapping[str, Tensor], fresh: list[str], head: Head) -> None:
    if head != "keep" and isinstance(model.head, nn.Linear):
        init_weights(model.head) if head == "reset" else [nn.init.zeros_(p) for p in model.head.parameters()]
    for name in fresh:
        if name.endswith("num_batches_tracked"):
            state[name].zero_()
