"""From an understood file into a model: every tensor or none, and a report of what was done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepvit.errors import Untold, UserError
from deepvit.importers.dialect import Dialect
from deepvit.importers.files import WeightsFile
from deepvit.importers.positions import Grid
from deepvit.importers.table import Translation, foreign_name
from deepvit.models import ViT
from deepvit.models.init import init_weights

Head = Literal["keep", "reset", "zero"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class Report:
    """What was done to load a file: `print(report)` says it in sentences."""

    path: Path
    dialect: str
    weights: str = "raw"  # or "ema"
    tensors: int = 0  # loaded into the model
    resized: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)  # name in the file -> why
    fresh: list[str] = field(default_factory=list)  # parameters that did not come from the file
    notes: list[str] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)  # what the file tells besides weights: arch, classes, ...
    head: nn.Module | None = None  # the classifier that came from the file, whose classes `said` names

    def __str__(self) -> str:
        which = "averaged (EMA)" if self.weights == "ema" else "raw"
        lines = [f"{self.path}: {self.tensors} tensors, {which} weights, read as dialect '{self.dialect}'"]
        lines += [f"  resized: {text}" for text in self.resized]
        for why in dict.fromkeys(self.dropped.values()):
            names = [name for name, reason in self.dropped.items() if reason == why]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  dropped: {', '.join(names[:3])}{more} ({why})")
        lines += [f"  not from the file: {', '.join(self.fresh)}"] if self.fresh else []
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass
class Source:
    """A file and what was understood of it."""

    file: WeightsFile
    spoken: Dialect
    translation: Translation
    told: dict[str, Any]  # settings that its tensors decide
    report: Report

    def __str__(self) -> str:
        return str(self.file.path)


def fill(model: ViT, source: Source, grid: Grid | None, head: Head, classes: Sequence[str] | None = None) -> None:
    """Copies the weights into the model, strictly.

    Args:
        model: with storage, or on the meta device, and then given storage once everything fits.
        grid: rows and columns of patches that the file's positions stand for, where known.
        classes: of the model; a kept head is brought into their order.
    Raises:
        UserError: names, shapes, classes or numbers do not fit; the model is unchanged but for unfit numbers.
    """
    if head not in ("keep", "reset", "zero"):
        raise UserError(f"head={head!r} is not known: choose from keep, reset, zero.")
    steps, shapes = dict(source.translation.steps), dict(source.translation.shapes)
    order = _order_of_classes(source, classes) if head == "keep" else None
    _set_head_aside(model, source, steps, shapes, head)
    _check_fit(model, source, shapes, head)
    _check_positions(model, source, grid)
    state = _with_storage(model, source)
    fresh = [name for name in state if name not in steps]
    with torch.no_grad():
        for name, step in steps.items():
            tensor = step.rule.ours(*(source.file.read(foreign) for foreign in step.foreign))
            _check_numbers(source.file, step.foreign, tensor)
            if name == "pos_embed" and grid and grid != model.grid_size:
                tensor = _resized(model, tensor, source, grid)
            if order is not None and name.startswith("head."):
                tensor = tensor[order]
            state[name].copy_(tensor)
        _start_fresh(model, state, fresh, head)
    source.report.tensors, source.report.fresh = len(steps), fresh
    source.report.head = model.head if head == "keep" else None


def other_head(source: Source, wanted: int) -> UserError:
    held = source.told["num_classes"]
    return UserError(f"{source} has {f'a head of {held} classes' if held else 'no head'}, the model is to have "
                     f"{wanted}: start the head anew with head=reset (or head=zero).")


def _order_of_classes(source: Source, classes: Sequence[str] | None) -> list[int] | None:
    """Rows of the file's head in the order of `classes`; None where they are as they stand, or names are not known."""
    held = source.report.said.get("classes")
    if classes is None or not isinstance(held, list) or len(held) != len(classes) or held == list(classes):
        return None
    held = list(map(str, held))
    places = {name: index for index, name in enumerate(held)}
    if absent := [name for name in classes if name not in places]:
        theirs = next(name for name in held if name not in set(classes))
        raise UserError(f"{source} classifies other classes (it has '{theirs}', the data '{absent[0]}'): start the "
                        f"head anew with head=reset (or head=zero).")
    source.report.notes.append("its classes are the data's in another order: the head's rows were brought into it")
    return [places[name] for name in classes]


def _set_head_aside(model: ViT, source: Source, steps: dict, shapes: dict, head: Head) -> None:
    """Takes the head out of the plan where it is to start anew; refuses one of another size where it is not."""
    if head == "keep":
        if source.told["num_classes"] != model.num_classes:
            raise other_head(source, model.num_classes)
        return
    without = ("head.", "pre_logits.") if isinstance(model.pre_logits, nn.Identity) else ("head.",)
    for name in [name for name in steps if name.startswith(without)]:
        source.report.dropped |= dict.fromkeys(steps.pop(name).foreign, f"head={head}")
        del shapes[name]


def _check_fit(model: ViT, source: Source, shapes: Mapping[str, torch.Size], head: Head) -> None:
    """Every parameter and buffer must be in the file with its shape, and nothing else."""
    rows, state = source.translation.rows, model.state_dict()
    for name, tensor in state.items():
        if name not in shapes:
            if name.endswith("num_batches_tracked") or (head != "keep" and name.startswith("head.")):
                continue
            raise UserError(f"{source} lacks '{foreign_name(rows, name)}', which the model needs.")
        if shapes[name] != tensor.shape and name != "pos_embed":
            raise UserError(f"{source} has '{foreign_name(rows, name)}' as {tuple(shapes[name])} in our layout, the "
                            f"model has {tuple(tensor.shape)}.")
    if extra := [name for name in shapes if name not in state]:
        raise UserError(f"{source} has '{foreign_name(rows, extra[0])}'"
                        f"{f' and {len(extra) - 1} more' if len(extra) > 1 else ''}, for which the model has no place.")


def _check_positions(model: ViT, source: Source, grid: Grid | None) -> None:
    shape = source.translation.shapes["pos_embed"]
    if len(shape) != 3 or shape[0] != 1 or shape[2] != model.embed_dim:
        raise UserError(f"{source} has position embeddings of {tuple(shape)}, the model needs "
                        f"{tuple(model.pos_embed.shape)}.")
    if grid is None:
        raise Untold(f"{source} has {shape[1] - 1} patch positions, no square, and the model needs "
                     f"{model.pos_embed.shape[1] - 1}: give grid_size=[rows, columns] of the file.")


def _with_storage(model: ViT, source: Source) -> dict[str, Tensor]:
    """The model's parameters and buffers, in memory."""
    state = model.state_dict(keep_vars=True)
    if not any(tensor.is_meta for tensor in state.values()):
        return state
    try:
        model.to_empty(device="cpu")
    except RuntimeError as error:
        raise UserError(f"The model of {source} for images of {model.img_size} pixels does not fit into memory "
                        f"({str(error)[-80:]}): choose a smaller img_size.") from None
    return model.state_dict(keep_vars=True)


def _check_numbers(file: WeightsFile, names: tuple[str, ...], tensor: Tensor) -> None:
    if names[0].endswith("num_batches_tracked") and not tensor.is_complex():
        return
    if tensor.dtype not in FLOATS:
        raise UserError(f"{file.path} holds '{names[0]}' as {tensor.dtype}, no floating point of 16 to 64 bits: "
                        f"it is refused.")
    if not tensor.isfinite().all():
        raise UserError(f"{file.path} holds NaN or infinity in '{names[0]}': its training went wrong, take another "
                        f"checkpoint.")


def _resized(model: ViT, pos: Tensor, source: Source, old: Grid) -> Tensor:
    """Positions `[1, 1 + old rows * columns, D]` for the model's grid."""
    new, rule = model.grid_size, source.spoken.resize
    source.report.resized.append(f"pos_embed {old[0]}x{old[1]} -> {new[0]}x{new[1]} patches by the rule "
                                 f"'{rule.__name__}'")
    return rule(pos, old, new)


def _start_fresh(model: ViT, state: Mapping[str, Tensor], fresh: list[str], head: Head) -> None:
    if head != "keep" and isinstance(model.head, nn.Linear):
        init_weights(model.head) if head == "reset" else [nn.init.zeros_(p) for p in model.head.parameters()]
    for name in fresh:
        if name.endswith("num_batches_tracked"):
            state[name].zero_()
