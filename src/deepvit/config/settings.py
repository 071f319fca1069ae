"""The types of all settings. Their values stand in `conf/`, so that none stands twice."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deepvit.config.signature import ABOVE_ZERO, BELOW_ONE, Ranges, check_arguments, check_ranges
from deepvit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Data:
    source: str
    root: str | None
    img_size: int | tuple[int, int]  # pixels; height, width
    batch_size: int  # of all devices together
    eval_batch_size: int  # of each device
    workers: int  # processes for each device
    norm: str
    crop_pct: float
    interpolation: Literal["bilinear", "bicubic"]
    hflip: float
    fraction: float
    classes: int | str | None
    val_fraction: float | None
    decoder: str
    max_bad: int
    on_error: Literal["stop", "report"]
    in_memory_mb: int
    exclude: str | None = None  # file with the names of images to leave out
    name: str | None = None  # of a timm data set, as the next two
    train_split: str = "train"
    val_split: str = "validation"
    on_device: bool = False


@dataclass(frozen=True, kw_only=True)
class Augment:
    crop_scale: tuple[float, float] | None
    crop_ratio: tuple[float, float]
    interpolation: str
    hflip: float
    vflip: float
    color_jitter: float | tuple[float, float, float] | tuple[float, float, float, float] | None
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
    momentum: float | None
    betas: list[float] | None
    eps: float | None
    kwargs: Mapping[str, Any] | None
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    tf32: bool | Literal["auto"]
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
    compile: bool | Literal["default", "reduce-overhead", "max-autotune"]
    timeout_s: float
    max_restarts: int
    max_skipped: int
    keep: Literal["all", "best"] = "all"  # this default and those below are for the configs of earlier versions
    profile: int | None = None
    threads: int | None = None
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class Ema:
    decay: float | None
    warmup: bool


@dataclass(frozen=True, kw_only=True)
class Loss:
    cosine_blocks: int
    cosine_weight: float
    kind: Literal["cross_entropy", "bce"] = "cross_entropy"  # the default is for the configs of earlier versions


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
    freeze: int | Literal["backbone"] | None = None
    fresh: bool
    dry: bool
    calibrate: int | Literal["auto"] = 0  # the defaults are for the configs of earlier versions
    logger: str | list[str] | None = None
    origin: Mapping[str, Any] | None = None  # what was chosen and typed: see `config.provenance.origin`


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What `deepvit eval` is asked. `data`: what is not as in training; `model`: keywords of `load_model`."""

    data: Mapping[str, Any]
    precision: PrecisionSettings
    engine: Engine
    checkpoint: str | list[str] | None
    weights: Literal["auto", "ema", "raw"]
    dialect: str | None
    calibrate: int
    labels: Literal["real"] | None
    ablate: Literal["blocks", "theta"] | None
    also: str | list[str] | None
    knn: int | None
    out: str | None
    model: Mapping[str, Any]


def read_evaluation(config: Mapping[str, Any]) -> EvalSettings:
    """`read_settings` for an evaluation."""
    settings = _read(EvalSettings, config)
    if settings.ablate and settings.knn:
        raise UserError(f"ablate={settings.ablate} evaluates the classifier, knn={settings.knn} does not: leave one "
                        f"of them out.")
    return settings


def read_settings(config: Mapping[str, Any]) -> Settings:
    """A composed, resolved config as typed settings.

    Raises:
        UserError: an unknown key, a missing one, a value of the wrong type or out of its range.
    """
    settings = _read(Settings, config)
    if not 0 <= settings.seed <= 2**62:
        raise UserError(f"seed={settings.seed} must be from 0 to 2**62.")
    _check_pairs(settings)
    return settings


def _read(kind: type, config: Mapping[str, Any]) -> Any:
    """`kind` of a config, with its groups in their typed forms."""
    groups = [name for name, hint in typing.get_type_hints(kind).items() if dataclasses.is_dataclass(hint)]
    check_arguments(kind, {name: value for name, value in config.items() if name not in groups}, "",
                    ignore_missing=groups)
    check_ranges({name: config.get(name) for name in ("calibrate", "knn")}, {"calibrate": NOT_NEGATIVE, "knn": COUNT})
    return kind(**{**config, **{name: read_group(name, config.get(name)) for name in groups}})


def read_group(name: str, values: Mapping[str, Any]) -> Any:
    """One group of settings, such as `data`, as its typed form."""
    if not isinstance(values, Mapping):
        raise UserError(f"{name}={values} is a group of settings: set one of them, such as "
                        f"{name}.{dataclasses.fields(_GROUPS[name])[0].name}.")
    check_arguments(_GROUPS[name], values, name)
    check_ranges(values, RANGES.get(name, {}), name)
    return _GROUPS[name](**values)


_GROUPS = {name: hint for name, hint in typing.get_type_hints(Settings).items() if dataclasses.is_dataclass(hint)}

COUNT, POSITIVE, NOT_NEGATIVE, SHARE = (1, math.inf), (ABOVE_ZERO, math.inf), (0, math.inf), (0, 1)
RANGES: dict[str, Ranges] = {
    "data": {
        **dict.fromkeys(("img_size", "batch_size", "eval_batch_size"), COUNT),
        **dict.fromkeys(("max_bad", "in_memory_mb"), NOT_NEGATIVE),
        "classes": (2, math.inf), "workers": (0, 1024), "hflip": SHARE, "val_fraction": (0, BELOW_ONE),
        "fraction": (ABOVE_ZERO, 1), "crop_pct": (0.1, 1)},
    "augment": {
        **dict.fromkeys(("hflip", "vflip", "grayscale_prob", "gaussian_blur_prob", "random_erasing", "mix_prob",
                         "switch_prob"), SHARE),
        **dict.fromkeys(("mixup", "cutmix", "color_jitter"), NOT_NEGATIVE),
        **dict.fromkeys(("repeats", "erasing_count"), COUNT),
        "crop_scale": (ABOVE_ZERO, 1), "crop_ratio": POSITIVE, "label_smoothing": (0, BELOW_ONE)},
    "optimizer": {
        **dict.fromkeys(("lr", "weight_decay"), NOT_NEGATIVE),
        **dict.fromkeys(("eps", "clip_grad"), POSITIVE), "layer_decay": (ABOVE_ZERO, 1),
        "momentum": SHARE, "betas": (0, BELOW_ONE)},
    "schedule": {
        **dict.fromkeys(("steps", "eval_steps"), COUNT),
        **dict.fromkeys(("epochs", "eval_epochs"), (ABOVE_ZERO, 10**6)),
        **dict.fromkeys(("warmup_epochs", "cooldown_epochs"), (0, 10**6)),
        **dict.fromkeys(("warmup_steps", "warmup_lr", "min_lr"), NOT_NEGATIVE)},
    "engine": {
        **dict.fromkeys(("device_batch", "log_every", "save_every", "keep_epochs", "max_skipped", "profile"), COUNT),
        **dict.fromkeys(("devices", "threads"), (1, 1024)), "timeout_s": (ABOVE_ZERO, 10**7),
        "max_restarts": NOT_NEGATIVE},
    "ema": {"decay": (0, BELOW_ONE)},
    "loss": {"cosine_blocks": NOT_NEGATIVE},
    "probe": {"images": NOT_NEGATIVE, "every_epochs": COUNT}}


def _check_pairs(settings: Settings) -> None:
    """Settings that contradict each other, or have no effect beside each other."""
    shared, engine = settings.model.get("share_maps", 1), settings.engine
    if shared > 1 and engine.compile and engine.grad_checkpointing:
        raise UserError(f"model.share_maps={shared} goes with engine.compile or engine.grad_checkpointing, not with "
                        f"both: leave one out.")
    _check_durations(settings.schedule)
    batch, repeats = settings.data.batch_size, settings.augment.repeats
    if batch % repeats:
        raise UserError(f"augment.repeats={repeats} must divide data.batch_size={batch}.")
    if settings.ema.warmup and settings.ema.decay is None:
        raise UserError("ema.warmup=true has no effect without ema.decay: set ema.decay too.")
    for name, neutral in (("head", "keep"), ("dialect", None), ("freeze", None)):
        if getattr(settings, name) != neutral and settings.init is None:
            raise UserError(f"{name}={getattr(settings, name)} is for weights that are loaded: give init=CHECKPOINT "
                            f"too, or leave {name} out to train from random weights.")


def _check_durations(schedule: ScheduleSettings) -> None:
    for unit in ("", "warmup_", "eval_"):
        epochs, steps = (getattr(schedule, f"{unit}{kind}") for kind in ("epochs", "steps"))
        if (epochs is None) == (steps is None):
            raise UserError(f"Give schedule.{unit}epochs or schedule.{unit}steps and set the other to null; they are "
                            f"{epochs} and {steps}.")
    if schedule.cooldown_epochs and schedule.steps is not None:
        raise UserError(f"schedule.cooldown_epochs={schedule.cooldown_epochs} goes with schedule.epochs, but the run "
                        f"is given in schedule.steps={schedule.steps}: set schedule.cooldown_epochs=0.")
