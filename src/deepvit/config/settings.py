"""The types of all settings. Their values stand in `conf/`, so that none stands twice."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deepvit.config.signature import ABOVE_ZERO, check_arguments, check_range
from deepvit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Data:
    source: str
    root: str | None
    img_size: int | list[int]  # pixels
    batch_size: int  # of all devices together
    eval_batch_size: int  # of each device
    workers: int  # processes for each device
    norm: str
    crop_pct: float
    interpolation: Literal["bilinear", "bicubic"]
    hflip: float
    fraction: float
    classes: int | None
    val_fraction: float | None
    decoder: str
    max_bad: int
    on_error: Literal["stop", "report"]
    in_memory_mb: int
    name: str | None = None  # of a timm data set, as the next two
    train_split: str = "train"
    val_split: str = "validation"


@dataclass(frozen=True, kw_only=True)
class Augment:
    crop_scale: list[float] | None
    crop_ratio: list[float]
    interpolation: str
    hflip: float
    vflip: float
    color_jitter: float | list[float] | None
    auto_augment: str | None
    grayscale_prob: float
    gaussian_blur_prob: float
    random_erasing: float
    erasing_mode: str
    erasing_count: int
    repeats: int
    mixup: float
    cutmix: float
    mix_prob: float
    switch_prob: float
    label_smoothing: float


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    opt: str
    lr: float
    weight_decay: float
    momentum: float
    betas: list[float] | None
    eps: float | None
    layer_decay: float | None
    clip_grad: float | None


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    kind: Literal["cosine", "linear", "constant"]
    epochs: float | None
    steps: int | None
    warmup_epochs: float | None
    warmup_steps: int | None
    cooldown_epochs: float
    warmup_lr: float
    min_lr: float
    decay_from: Literal["warmup", "start"]
    eval_epochs: float | None
    eval_steps: int | None


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings:
    dtype: Literal["float32", "bfloat16", "float16"]
    tf32: bool
    scale_gradients: bool


@dataclass(frozen=True, kw_only=True)
class Engine:
    devices: int | None
    accelerator: Literal["auto", "cuda", "cpu"]
    device_batch: int | Literal["auto"] | None
    log_every: int
    save_every: int | None
    keep_epochs: int | None
    grad_checkpointing: bool
    compile: bool
    timeout_s: float
    max_restarts: int
    max_skipped: int


@dataclass(frozen=True, kw_only=True)
class Ema:
    decay: float | None
    warmup: bool


@dataclass(frozen=True, kw_only=True)
class Loss:
    cosine_blocks: int
    cosine_weight: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    images: int
    every_epochs: int | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole run's. `model` holds `ViT`'s keywords, which the models check against their signatures."""

    model: Mapping[str, Any]
    data: Data
    augment: Augment
    optimizer: Optimizer
    schedule: ScheduleSettings
    precision: PrecisionSettings
    engine: Engine
    ema: Ema
    loss: Loss
    probe: Probe
    seed: int
    init: str | None
    dialect: str | None
    head: Literal["keep", "reset", "zero"]
    fresh: bool
    dry: bool
    logger: str | list[str] | None = None  # the default is for the configs of earlier versions


def read_settings(config: Mapping[str, Any]) -> Settings:
    """A composed, resolved config as typed settings.

    Raises:
        UserError: an unknown key, a missing one, a value of the wrong type or out of its range.
    """
    check_arguments(Settings, {name: value for name, value in config.items() if name not in _GROUPS}, "",
                    ignore_missing=_GROUPS)
    groups = {name: read_group(name, config[name]) for name in _GROUPS}
    settings = Settings(**{**config, **groups})
    _check_ranges(settings)
    return settings


def read_group(name: str, values: Mapping[str, Any]) -> Any:
    """One group of settings, such as `data`, as its typed form."""
    check_arguments(_GROUPS[name], values, name)
    return _GROUPS[name](**values)


_GROUPS = {name: hint for name, hint in typing.get_type_hints(Settings).items() if dataclasses.is_dataclass(hint)}


RANGES = {  # dotted name -> smallest, largest
    **dict.fromkeys(("data.batch_size", "data.eval_batch_size", "engine.log_every", "engine.devices",
                     "engine.device_batch", "engine.save_every", "engine.keep_epochs", "engine.max_skipped",
                     "schedule.eval_steps", "probe.every_epochs", "schedule.steps", "augment.repeats"), (1, math.inf)),
    **dict.fromkeys(("schedule.epochs", "schedule.eval_epochs", "optimizer.clip_grad", "engine.timeout_s",
                     "optimizer.eps", "optimizer.layer_decay"), (ABOVE_ZERO, math.inf)),
    **dict.fromkeys(("data.workers", "data.max_bad", "data.in_memory_mb", "optimizer.lr", "optimizer.weight_decay",
                     "probe.images", "schedule.warmup_epochs", "schedule.warmup_steps", "schedule.cooldown_epochs",
                     "schedule.warmup_lr", "schedule.min_lr", "engine.max_restarts", "augment.mixup",
                     "augment.cutmix"), (0, math.inf)),
    **dict.fromkeys(("augment.hflip", "augment.vflip", "augment.grayscale_prob", "augment.gaussian_blur_prob",
                     "augment.random_erasing", "augment.mix_prob", "augment.switch_prob", "augment.label_smoothing",
                     "optimizer.momentum"), (0, 1)),
    "seed": (0, 2**62)}


def _check_ranges(settings: Settings) -> None:
    for name, (least, most) in RANGES.items():
        group, _, key = name.rpartition(".")
        check_range(name, getattr(getattr(settings, group) if group else settings, key), least, most)
    if not 0 <= (settings.ema.decay or 0) < 1:
        raise UserError(f"ema.decay={settings.ema.decay} must be at least 0 and below 1 (null: no average).")
    for beta in settings.optimizer.betas or []:
        check_range("optimizer.betas", beta, 0, 1 - 1e-9)
    if settings.head != "keep" and settings.init is None:
        raise UserError(f"head={settings.head} is for weights that are loaded: give init=CHECKPOINT, or head=keep to "
                        f"train from random weights.")
    schedule = settings.schedule
    for unit in ("", "warmup_", "eval_"):
        epochs, steps = (getattr(schedule, f"{unit}{kind}") for kind in ("epochs", "steps"))
        if (epochs is None) == (steps is None):
            raise UserError(f"Give schedule.{unit}epochs or schedule.{unit}steps and set the other to null; they are "
                            f"{epochs} and {steps}.")
