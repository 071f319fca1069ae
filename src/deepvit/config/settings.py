"""The types of all settings. Their values are in `conf/` alone, so that none is written twice."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml

from deepvit.config import CONF
from deepvit.config.compare import typed_names
from deepvit.config.signature import ABOVE_ZERO, BELOW_ONE, Ranges, check_arguments, check_ranges, ranges_of
from deepvit.errors import UserError

# With the smallest and the largest value
Count, NotNegativeInt, Cores = Annotated[int, (1, math.inf)], Annotated[int, (0, math.inf)], Annotated[int, (1, 1024)]
NotNegative, Positive = Annotated[float, (0, math.inf)], Annotated[float, (ABOVE_ZERO, math.inf)]
Share, Below1, AtMost1 = Annotated[float, (0, 1)], Annotated[float, (0, BELOW_ONE)], Annotated[float, (ABOVE_ZERO, 1)]
Epochs = Annotated[float, (ABOVE_ZERO, 10**6)]


@dataclass(frozen=True, kw_only=True)
class Data:
    source: str
    root: str | None
    img_size: Count | tuple[Count, Count]  # pixels; height, width
    batch_size: Count  # of all devices together
    eval_batch_size: Count  # of each device
    workers: Annotated[int, (0, 1024)]  # processes for each device
    norm: str
    crop_pct: Annotated[float, (0.1, 1)]
    interpolation: Literal["bilinear", "bicubic"]
    hflip: Share
    fraction: AtMost1
    classes: Annotated[int, (2, math.inf)] | str | None
    val_fraction: Below1 | None
    decoder: str
    max_bad: NotNegativeInt
    on_error: Literal["stop", "report"]
    in_memory_mb: NotNegativeInt
    exclude: str | None = None  # file with the names of images to leave out
    name: str | None = None  # of a timm data set, as the next two
    train_split: str = "train"
    val_split: str = "validation"
    on_device: bool = False


@dataclass(frozen=True, kw_only=True)
class Augment:
    crop_scale: tuple[AtMost1, AtMost1] | None
    crop_ratio: tuple[Positive, Positive]
    interpolation: str
    hflip: Share
    vflip: Share
    color_jitter: NotNegative | tuple[float, float, float] | tuple[float, float, float, float] | None
    auto_augment: str | None
    grayscale_prob: Share
    gaussian_blur_prob: Share
    random_erasing: Share
    erasing_mode: str
    erasing_count: Count
    repeats: Count
    mixup: NotNegative
    cutmix: NotNegative
    mix_prob: Share
    switch_prob: Share
    label_smoothing: Below1


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    opt: str
    lr: NotNegative
    weight_decay: NotNegative
    momentum: Share | None
    betas: list[Below1] | None
    eps: Positive | None
    kwargs: Mapping[str, Any] | None
    layer_decay: AtMost1 | None
    clip_grad: Positive | None


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    kind: Literal["cosine", "linear", "constant"]
    epochs: Epochs | None
    steps: Count | None
    warmup_epochs: Annotated[float, (0, 10**6)] | None
    warmup_steps: NotNegativeInt | None
    cooldown_epochs: Annotated[float, (0, 10**6)]
    warmup_lr: NotNegative
    min_lr: NotNegative
    decay_from: Literal["warmup", "start"]
    eval_epochs: Epochs | None
    eval_steps: Count | None


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings:
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    tf32: bool | Literal["auto"]
    scale_gradients: bool


@dataclass(frozen=True, kw_only=True)
class Engine:
    devices: Cores | None
    accelerator: Literal["auto", "cuda", "cpu"]
    device_batch: Count | Literal["auto"] | None
    log_every: Count
    save_every: Count | None
    keep_epochs: Count | None
    grad_checkpointing: bool
    compile: bool | Literal["default", "reduce-overhead", "max-autotune"]
    timeout_s: Annotated[float, (ABOVE_ZERO, 10**7)]
    max_restarts: NotNegativeInt
    max_skipped: Count
    keep: Literal["all", "best"] = "all"  # this default and those below are for the configs of earlier versions
    profile: Count | None = None
    threads: Cores | None = None
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class Ema:
    decay: Below1 | None
    warmup: bool


@dataclass(frozen=True, kw_only=True)
class Loss:
    cosine_blocks: NotNegativeInt
    cosine_weight: float
    kind: Literal["cross_entropy", "bce", "multi_label"] = "cross_entropy"  # for the configs of earlier versions


@dataclass(frozen=True, kw_only=True)
class Probe:
    images: NotNegativeInt
    every_epochs: Count | None


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
    calibrate: NotNegativeInt | Literal["auto"] = 0  # the defaults are for the configs of earlier versions
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
    calibrate: NotNegativeInt
    labels: Literal["real"] | None
    ablate: Literal["blocks", "theta"] | None
    also: str | list[str] | None
    knn: Count | None
    out: str | None
    model: Mapping[str, Any]
    origin: Mapping[str, Any] | None = None  # what was chosen and typed; in a sweep also `cell`, the cell's name


def read_evaluation(config: Mapping[str, Any]) -> EvalSettings:
    """`read_settings` for an evaluation."""
    settings = _read(EvalSettings, config)
    for name in ("ablate", "also", "calibrate", "labels"):
        if settings.knn and (value := getattr(settings, name)):
            raise UserError(f"{name}={value} has no effect with knn={settings.knn}: leave one of them out.")
    given, pixels = settings.data.get("img_size"), settings.model.get("img_size")
    if given not in (None, pixels):
        raise UserError(f"data.img_size={given} is not model.img_size={pixels}: set the latter alone.")
    return settings


def read_settings(config: Mapping[str, Any]) -> Settings:
    """A composed, resolved config as typed settings; UserError for an unknown key, a missing one, a value of the wrong
    type or out of its range, and settings that contradict each other or have no effect together."""
    settings = _read(Settings, config)
    if not 0 <= settings.seed <= 2**62:
        raise UserError(f"seed={settings.seed} must be from 0 to 2**62.")
    shared, engine = settings.model.get("share_maps", 1), settings.engine
    if shared != 1 and engine.compile and engine.grad_checkpointing:
        raise UserError(f"model.share_maps={shared} bars engine.compile with engine.grad_checkpointing: leave one out.")
    _check_durations(settings.schedule)
    batch, repeats = settings.data.batch_size, settings.augment.repeats
    if batch % repeats:
        raise UserError(f"augment.repeats={repeats} must divide data.batch_size={batch}.")
    if settings.loss.kind == "multi_label" and settings.augment.label_smoothing:
        raise UserError(f"augment.label_smoothing={settings.augment.label_smoothing} makes every class a target of "
                        f"loss.kind=multi_label: set it to 0.")
    if settings.ema.warmup and settings.ema.decay is None:
        raise UserError("ema.warmup=true has no effect without ema.decay: set ema.decay too.")
    for name, neutral in (("head", "keep"), ("dialect", None), ("freeze", None)):
        if getattr(settings, name) != neutral and settings.init is None:
            raise UserError(f"{name}={getattr(settings, name)} is for weights that are loaded: give init=CHECKPOINT "
                            f"too, or {name}={neutral or 'null'}.")
    return settings


def _read(kind: type, config: Mapping[str, Any]) -> Any:
    """`kind` of a config, with its groups in their typed forms."""
    groups = [name for name, hint in typing.get_type_hints(kind).items() if dataclasses.is_dataclass(hint)]
    check_arguments(kind, {name: value for name, value in config.items() if name not in groups}, "",
                    ignore_missing=groups)
    ranges = ranges_of(kind)
    check_ranges({name: config.get(name) for name in ranges}, ranges)
    return kind(**{**config, **{name: read_group(name, config.get(name)) for name in groups}})


def read_group(name: str, values: Mapping[str, Any]) -> Any:
    """One group of settings, such as `data`, as its typed form."""
    if not isinstance(values, Mapping):
        raise UserError(f"{name}={values} is a group of settings: set one of them, such as "
                        f"{name}.{dataclasses.fields(_GROUPS[name])[0].name}.")
    check_arguments(_GROUPS[name], values, name)
    check_ranges(values, RANGES[name], name)
    return _GROUPS[name](**values)


_GROUPS = {name: hint for name, hint in typing.get_type_hints(Settings).items() if dataclasses.is_dataclass(hint)}
RANGES: dict[str, Ranges] = {name: ranges_of(kind) for name, kind in _GROUPS.items()}


def _check_durations(schedule: ScheduleSettings) -> None:
    for unit in ("", "warmup_", "eval_"):
        epochs, steps = (getattr(schedule, f"{unit}{kind}") for kind in ("epochs", "steps"))
        if (epochs is None) == (steps is None):
            raise UserError(f"schedule.{unit}epochs={epochs}, schedule.{unit}steps={steps}: set one, null the other.")
    if schedule.cooldown_epochs and schedule.steps is not None:
        raise UserError(f"schedule.cooldown_epochs={schedule.cooldown_epochs} goes with schedule.epochs, but the run "
                        f"is given in schedule.steps={schedule.steps}: set schedule.cooldown_epochs=0.")


def idle_settings(settings: Settings) -> list[str]:
    """A sentence for each setting that was typed and has no effect beside the others."""
    augment, schedule = settings.augment, settings.schedule
    policy, is_constant = augment.auto_augment, schedule.kind == "constant"
    mixing = f"augment.mixup={augment.mixup:g} and augment.cutmix={augment.cutmix:g}"
    found = {  # setting -> what leaves it without effect, if it does
        "data.hflip": augment.hflip != settings.data.hflip and f"augment.hflip={augment.hflip:g}",
        "augment.color_jitter": policy and "3a" not in policy and f"augment.auto_augment={policy}",
        "augment.crop_ratio": augment.crop_scale is None and "augment.crop_scale=null",
        "augment.interpolation": augment.crop_scale is None and not policy and augment.interpolation == "random"
        and "augment.crop_scale=null",
        **dict.fromkeys(("augment.erasing_mode", "augment.erasing_count"),
                        not augment.random_erasing and "augment.random_erasing=0"),
        "augment.mix_prob": not (augment.mixup or augment.cutmix) and mixing,
        "augment.switch_prob": not (augment.mixup and augment.cutmix) and mixing,
        "probe.every_epochs": not settings.probe.images and "probe.images=0",
        "loss.cosine_weight": not settings.loss.cosine_blocks and "loss.cosine_blocks=0",
        **dict.fromkeys(("schedule.min_lr", "schedule.decay_from"), is_constant and "schedule.kind=constant"),
        "schedule.warmup_lr": not (schedule.warmup_epochs or schedule.warmup_steps) and "a warm-up of 0"}
    typed, rate = typed_names(settings.origin), settings.optimizer.lr
    idle = [f"{name} has no effect beside {other}." for name, other in found.items() if other and name in typed]
    for word in (settings.origin or {}).get("overrides", ()):
        file = CONF / f"{word.replace('=', '/')}.yaml"
        if word.startswith("optimizer=") and "optimizer.lr" not in typed and file.exists():
            own = yaml.safe_load(file.read_text()).get("lr")
            if isinstance(own, float) and own != rate:
                idle.append(f"lr={own:g} of {word} has no effect beside optimizer.lr={rate:g} of the recipe.")
    return idle
